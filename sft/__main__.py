"""Stage 2: questions and answers -> assistant, on TRL's SFTTrainer.

    make sft
    accelerate launch -m sft --config configs/arden/sft.yaml --learning_rate 1e-3

The loss is on the assistant's tokens alone, by the generation marks of the chat template.
With `--lora_r 8` small matrices beside the linear layers learn in place of all weights (LoRA, Hu et
al. 2021, arXiv:2106.09685); they are added to the weights at the end, so that what is left is a
model like any other.
"""

import hashlib
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM, PreTrainedModel
from trl import SFTConfig, SFTTrainer

import common.gpt  # noqa: F401 - so that Auto classes load our GPT
from common.artifacts import MetricsFile, require_kind, require_parent
from common.config import parse_config, refusing, require, run
from common.generation import generate_answers
from common.lengths import measure_lengths
from common.pretraining_text import PretrainingText
from common.sharded import whole_model
from common.stage import (
    TRAINER_DEFAULTS,
    LabelledDataConfig,
    early_stopping,
    format_samples,
    open_stage,
    print_figures,
    questions_to_show,
    train_or_resume,
)
from common.token_file import TokenFile
from common.tokenizer import load_tokenizer, require_own_tokens
from sft.role_tokens import start_role_tokens
from sft.template import check_template, read_template
from sft.trainer import ReplaySFTTrainer


@dataclass
class FineTuneConfig(LabelledDataConfig):
    """The data, and how much of the model learns from it."""

    lora_r: int = field(default=0, metadata={"help": "rank of LoRA; 0 trains all weights"})
    lora_alpha: int = field(default=16, metadata={"help": "scale of LoRA, by its rank"})
    role_tokens_like: str | None = field(
        default=None,
        metadata={
            "help": "the token, e.g. ':', as which the chat's role tokens start, for a base that "
            "has never read any (not for a model that has chatted); default: as they are"
        },
    )
    ptx_coef: float = field(
        default=0.0,
        metadata={"help": "weight of the loss on the text of pretraining beside; 0: without"},
    )
    ptx_data: str | None = field(
        default=None, metadata={"help": "its token file; default: the parent's data/train.bin"}
    )
    ptx_windows: int = field(
        default=1, metadata={"help": "windows of that text to an optimizer step, of all processes"}
    )

    def __post_init__(self) -> None:
        """As of labelled data; adapters and replay within bounds."""
        super().__post_init__()
        require(self, 0, "lora_r", "ptx_coef")
        require(self, 1, "lora_alpha", "ptx_windows")

    def lora(self, base: PreTrainedModel) -> LoraConfig | None:
        """For the trainer; None trains all weights.

        A head that is not the embedding's table learns whole: the tokens that a base never read are
        alike in it, so that frozen it could not tell an answer's end from a role.
        """
        if not self.lora_r:
            return None
        head, tied = base.get_output_embeddings(), base.config.tie_word_embeddings
        return LoraConfig(
            r=self.lora_r,
            lora_alpha=self.lora_alpha,
            target_modules="all-linear",
            modules_to_save=[n for n, m in base.named_modules() if m is head and not tied] or None,
            task_type="CAUSAL_LM",
        )


def main() -> None:
    """Fine-tune the base model, measure it, leave the artifacts of `common.artifacts`."""
    config, args = parse_config(
        FineTuneConfig, SFTConfig, defaults=TRAINER_DEFAULTS | {"assistant_only_loss": True}
    )
    callbacks = early_stopping(config.early_stopping_patience, args)
    parent = require_parent(config.model_name_or_path, config.parent_command)
    text = Path(config.ptx_data or parent / "data" / "train.bin")
    hashes = {"ptx_data": TokenFile(text).info.sha256} if config.ptx_coef else {}
    template = None if args.chat_template_path is None else read_template(args.chat_template_path)
    if template is not None:
        hashes["chat_template"] = hashlib.sha256(template.encode()).hexdigest()
    stage = open_stage(config, args, hashes)
    require_kind(stage.parent, scores=False)
    if stage.output.says_finished():
        return
    tokenizer = load_tokenizer(stage.parent)
    require_own_tokens(tokenizer, eos_token=args.eos_token, pad_token=args.pad_token)
    if template is not None:  # TRL would take it after it was checked and lengths were measured
        tokenizer.chat_template, args.chat_template_path = template, None
    check_template(tokenizer)
    base = AutoModelForCausalLM.from_pretrained(stage.parent, dtype=torch.float32)
    if config.role_tokens_like:
        start_role_tokens(base, tokenizer, config.role_tokens_like)
    trainer_class: Any = SFTTrainer
    if config.ptx_coef:
        context = base.config.max_position_embeddings
        windows = PretrainingText(text, config.ptx_windows, context, args.seed, tokenizer)
        trainer_class = partial(ReplaySFTTrainer, windows, config.ptx_coef)
    part = "dev" if args.eval_strategy != "no" else config.evaluate_on  # what it stops by, or not
    data, held_out = stage.task.conversations("train"), stage.task.conversations(part)
    for name, rows in (("to train on", data), ("held out", held_out)):
        lengths = measure_lengths(rows, tokenizer, args.max_length)
        if args.process_index == 0:
            print(f"sft, {name}: {lengths}")
        lengths.require_learnable(stage.parent, config.max_lost_share)
    with refusing():
        trainer = trainer_class(
            model=base,
            args=args,
            train_dataset=data.select_columns(["messages"]),
            eval_dataset=held_out.select_columns(["messages"]),
            processing_class=tokenizer,
            peft_config=config.lora(base),
            callbacks=[MetricsFile(stage.output.path / "metrics.jsonl"), *callbacks],
        )
    with args.main_process_first():
        if args.process_index == 0:
            stage.output.start()
    seconds = train_or_resume(trainer, stage.output.checkpoints)
    eval_loss = trainer.evaluate()["eval_loss"]
    model = whole_model(trainer.accelerator, trainer.model)
    if not trainer.is_world_process_zero():
        return
    if config.lora_r:
        model = model.merge_and_unload()

    def answer(questions: list[str]) -> list[str]:
        answers = generate_answers(
            model, tokenizer, questions, max_new_tokens=config.max_new_tokens
        )
        return [several[0] for several in answers]

    figures = stage.task.measure(answer, config.evaluate_on)
    summary = {"eval_loss": eval_loss, **figures, "train_seconds": seconds}
    questions = questions_to_show(stage.task, tokenizer, model, config.max_new_tokens)
    answers = generate_answers(
        model,
        tokenizer,
        questions,
        max_new_tokens=config.max_new_tokens,
        temperature=1.0,
        samples=4,
    )
    samples = format_samples("Answers at temperature 1", questions, answers)
    stage.output.finish(model, tokenizer, summary, samples)
    print_figures("sft", summary)


if __name__ == "__main__":
    run(main)

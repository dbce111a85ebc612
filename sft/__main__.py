"""Stage 2: questions and answers -> assistant, on TRL's SFTTrainer.

    make sft
    accelerate launch -m sft --config configs/arden/sft.yaml --learning_rate 1e-3

The loss is on the assistant's tokens alone, by the generation marks of the chat template.
"""

from transformers import AutoModelForCausalLM
from trl import SFTConfig, SFTTrainer

import common.gpt  # noqa: F401 - so that Auto classes load our GPT
from common.artifacts import MetricsFile
from common.config import parse_config, run
from common.generation import generate_answers
from common.lengths import measure_lengths
from common.stage import (
    TRAINER_DEFAULTS,
    LabelledDataConfig,
    format_samples,
    open_stage,
    print_figures,
    train_or_resume,
)
from common.tokenizer import load_tokenizer


def main() -> None:
    """Fine-tune the base model, measure it, leave the artifacts of `common.artifacts`."""
    config, args = parse_config(
        LabelledDataConfig, SFTConfig, defaults=TRAINER_DEFAULTS | {"assistant_only_loss": True}
    )
    stage = open_stage(config, args)
    if stage.output.finished:
        print(f"{stage.output.path} is finished; --overwrite true to train it anew")
        return
    tokenizer = load_tokenizer(stage.parent)
    data, held_out = stage.task.conversations("train"), stage.task.conversations("validation")
    with args.main_process_first():
        if args.process_index == 0:
            lengths = measure_lengths(data, tokenizer, args.max_length)
            print(f"sft: {lengths}")
            lengths.require_kept(config.max_lost_share)
            stage.output.start()
    trainer = SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(stage.parent),
        args=args,
        train_dataset=data.select_columns(["messages"]),
        eval_dataset=held_out.select_columns(["messages"]),
        processing_class=tokenizer,
        callbacks=[MetricsFile(stage.output.path / "metrics.jsonl")],
    )
    seconds = train_or_resume(trainer, stage.output.checkpoints)
    eval_loss = trainer.evaluate()["eval_loss"]
    if not trainer.is_world_process_zero():
        return
    model = trainer.accelerator.unwrap_model(trainer.model)

    def answer(questions: list[str]) -> list[str]:
        answers = generate_answers(
            model, tokenizer, questions, max_new_tokens=config.max_new_tokens
        )
        return [several[0] for several in answers]

    figures = stage.task.measure(answer, config.evaluate_on)
    summary = {"eval_loss": eval_loss, **figures, "train_seconds": seconds}
    questions = stage.task.sample_questions()
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

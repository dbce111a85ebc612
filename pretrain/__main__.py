"""Stage 1: text -> base model.

make pretrain                              the chronicle of Arden
make pretrain PROFILE=shakespeare DATA=input.txt
make pretrain PROFILE=web ACCELERATE=ddp   text streamed from the Hub, or from DATA=folder
accelerate launch -m pretrain --config configs/arden/pretrain.yaml --max_steps 500
"""

from pathlib import Path
from typing import Any

import torch
from accelerate.utils import set_seed
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from common.artifacts import (
    StageOutput,
    hash_model,
    require_apart,
    require_kind,
    require_parent,
)
from common.config import config_values, parse_config, run
from common.device import fast_attention
from common.errors import UserError
from common.gpt import build_config, build_gpt
from common.sharded import whole_model
from common.tasks import Task, open_task
from common.token_file import TokenFile, write_token_file
from common.token_shards import SPLITS
from common.tokenizer import hash_tokenizer, load_tokenizer, model_vocab_size
from pretrain.config import INCIDENTAL, ModelConfig, PretrainConfig
from pretrain.stream import make_tokenizer, open_stream
from pretrain.trackers import make_accelerator
from pretrain.train import Windows, train


def main() -> None:
    """Prepare the text once, train, and leave the artifacts of `common.artifacts`."""
    model_config, config = parse_config(ModelConfig, PretrainConfig)
    task = open_task(config)
    stream = open_stream(task, model_config, config)
    sources = {"data": stream.fingerprint if stream else task.fingerprint()}
    block_size = model_config.block_size
    if model_config.model_name_or_path:
        parent = require_parent(model_config.model_name_or_path, "make pretrain")
        require_kind(parent, scores=False)
        require_apart(config.output_dir, parent)
        require_own_tokenizer(parent, model_config)
        block_size = context_of(parent, block_size)
        sources["parent"] = hash_model(parent)
    values = config_values(model_config, config)
    output = StageOutput(config.output_dir, values, sources, config.overwrite, INCIDENTAL)
    if output.says_finished():
        return
    accelerator = make_accelerator(config)
    with accelerator.main_process_first():
        if accelerator.is_main_process:
            if output.replaces and not stream:  # a fault is met before the old run is set aside
                next(task.texts("train"), None)
            output.start()
            if stream:
                stream.prepare()
            else:
                prepare_text(task, model_config, output.path / "data")
    set_seed(config.seed)
    if stream:
        tokenizer, files = stream.open()
    else:
        tokenizer = load_tokenizer(output.path / "data")
        files = [TokenFile(output.path / "data" / f"{split}.bin") for split in SPLITS]
    model = make_model(model_config, tokenizer)
    set_seed(config.seed, device_specific=True)  # weights alike, dropout's masks of one's own
    windows = Windows(int(block_size), model.config.bos_token_id)
    model.set_attn_implementation(fast_attention(windows.block_size))
    require_windows(files, windows.block_size, config.data)
    figures = train(model, files[0], files[1], config, accelerator, windows)
    model = whole_model(accelerator, model)
    if accelerator.is_main_process:
        summary = figures | task.text_figures() | {"parameters": count_parameters(model)}
        first = tokenizer.bos_token_id if task.documents_apart else tokenizer("\n").input_ids[0]
        output.finish(model, tokenizer, summary, write_samples(model, tokenizer, first))
        print(" ".join(f"{name} {value}" for name, value in summary.items()))
    accelerator.end_training()


def require_own_tokenizer(parent: Path, config: ModelConfig) -> None:
    """Refuse to give a checkpoint ids that mean something else to it.

    Raises:
        UserError: it has a tokenizer, and the one to read the text by is another.
    """
    if not (parent / "tokenizer.json").exists():
        return
    given = Path(str(config.tokenizer))
    if hash_tokenizer(load_tokenizer(given)) != hash_tokenizer(load_tokenizer(parent)):
        raise UserError(
            f"tokenizer ({config.tokenizer}) is another than that of {parent}, to which its ids "
            f"mean something else: give --tokenizer {parent}"
        )


def context_of(parent: Path, block_size: int | None) -> int:
    """Tokens of a window of a checkpoint: `block_size`, or as many as it can read.

    Raises:
        UserError: it cannot read so many, or does not say how many it can.
    """
    longest = getattr(AutoConfig.from_pretrained(parent), "max_position_embeddings", None)
    found = block_size or longest
    if found is None or (longest and found > longest):
        known = f"reads {longest:,} tokens at most" if longest else "names no context"
        raise UserError(
            f"block_size ({block_size}): {parent} {known}; give "
            f"--block_size {min(longest or 1024, 1024)}"
        )
    return found


def require_windows(files: list[TokenFile], block_size: int, data: str) -> None:
    """Refuse text that is too short to train and to measure on.

    Raises:
        UserError: names the part, its tokens and how many are needed.
    """
    for split, file, least in zip(SPLITS, files, (3 * block_size, block_size + 1), strict=True):
        if len(file) < least:
            raise UserError(
                f"{data} has {len(file):,} tokens for {split}: at least {least:,} for a block_size "
                f"of {block_size:,}; give more text, or a smaller block_size"
            )


def prepare_text(task: Task, config: ModelConfig, folder: Path) -> None:
    """Tokenizer and token files in `folder`; says how many characters are unknown."""
    if (folder / "validation.bin.json").exists():
        return
    texts, documents = task.tokenizer_texts(), task.documents_apart
    tokenizer = make_tokenizer(config, texts, documents=documents)
    tokenizer.save_pretrained(folder)
    for split in SPLITS:
        path = folder / f"{split}.bin"
        info = write_token_file(task.texts(split), tokenizer, path, documents=documents)
        print(f"{split}: {info}")


def make_model(config: ModelConfig, tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    """A new GPT, or the checkpoint to go on from, to which a document begins as in the text.

    Raises:
        UserError: the checkpoint's table has no room for the tokenizer.
    """
    if config.model_name_or_path:
        model = AutoModelForCausalLM.from_pretrained(config.model_name_or_path, dtype=torch.float32)
        if model.config.vocab_size < len(tokenizer):
            raise UserError(
                f"{config.model_name_or_path} has {model.config.vocab_size} tokens, the tokenizer "
                f"{len(tokenizer)}: give --tokenizer {config.model_name_or_path}"
            )
        model.config.bos_token_id = tokenizer.bos_token_id
        return model
    return build_gpt(
        gpt_config(
            config,
            model_vocab_size(tokenizer),
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )


def gpt_config(config: ModelConfig, vocab_size: int, **special_tokens: int) -> PreTrainedConfig:
    """What `build_gpt` takes for a model of this configuration; as `build_config` in the rest."""
    assert config.block_size  # a blank page has one
    return build_config(
        config.shape,
        vocab_size=vocab_size,
        block_size=config.block_size,
        num_hidden_layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.num_key_value_heads,
        intermediate_size=config.intermediate_size,
        tie_word_embeddings=config.tie_word_embeddings,
        dropout=config.dropout,
        **special_tokens,
    )


def count_parameters(model: PreTrainedModel) -> int:
    """Trainable numbers, a tied table once."""
    return sum(parameter.numel() for parameter in model.parameters())


def write_samples(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, first_token: int
) -> str:
    """What the model writes at temperature 0.8 after `first_token`, as Markdown."""
    sampler: Any = model.eval()  # `generate` is a mixin's
    output = sampler.generate(
        torch.full((8, 1), first_token, device=model.device),
        max_new_tokens=min(200, getattr(model.config, "max_position_embeddings", 201) - 1),
        do_sample=True,
        temperature=0.8,
        top_k=0,
    )
    texts = tokenizer.batch_decode(output, skip_special_tokens=True)
    return "# Samples at temperature 0.8\n\n" + "\n\n---\n\n".join(t.strip() for t in texts) + "\n"


if __name__ == "__main__":
    run(main)

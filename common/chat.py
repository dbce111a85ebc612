"""Talk to a model.

make chat               the newest of the profile's stages
make chat STAGE=sft     another
make chat ARGS="--temperature 1"    draw answers, as all are drawn that are measured or trained on
python -m common.chat --profile arden --stage sft
"""

from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, TextStreamer

import common.gpt  # noqa: F401 - so that Auto classes load our GPT
from common.artifacts import make_variable
from common.batches import render
from common.config import parse_config, require, run
from common.errors import UserError
from common.generation import plain_sampling, sampling_options
from common.tokenizer import load_tokenizer

TALKING = ("rlhf", "sft", "pretrain")  # the reward model only scores


@dataclass
class ChatConfig:
    """With whom, and how answers are drawn."""

    profile: str = field(default="arden", metadata={"help": "whose model"})
    stage: str | None = field(
        default=None, metadata={"help": f"of {', '.join(TALKING)}; default: the first that is done"}
    )
    temperature: float = field(default=0.0, metadata={"help": "0: always the likeliest token"})
    max_new_tokens: int = field(default=100, metadata={"help": "longest answer, tokens"})

    def __post_init__(self) -> None:
        """A stage that answers, numbers within bounds."""
        if self.stage not in (None, *TALKING):
            raise UserError(f"stage ({self.stage}) must be one of {', '.join(TALKING)}")
        require(self, 0, "temperature")
        require(self, 1, "max_new_tokens")


def main() -> None:
    """Read questions and answer each on its own, as the stages train it."""
    (config,) = parse_config(ChatConfig)
    path = find_model(Path("out", config.profile), config.stage)
    model = AutoModelForCausalLM.from_pretrained(path).eval()
    model.generation_config = plain_sampling(model.generation_config)
    tokenizer = load_tokenizer(path)
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    print(f"{path}: ask away; an empty line or Ctrl-D ends it")
    while line := _read_line():
        messages = [{"role": "user", "content": line}]
        ids = torch.tensor(render(tokenizer, [messages], ask=True))
        with torch.no_grad():
            model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                **sampling_options(tokenizer, config.max_new_tokens, config.temperature),
                streamer=streamer,
            )


def find_model(profile: Path, stage: str | None) -> Path:
    """The directory of a stage's finished model, or of the last stage that has one.

    Raises:
        UserError: there is none; names the command that makes it.
    """
    stages = [stage] if stage else TALKING
    for name in stages:
        if (profile / name / "config.json").exists():
            return profile / name
    target = stage or "all"
    raise UserError(f"no finished model in {profile}: run `make {target} {make_variable(profile)}`")


def _read_line() -> str:
    try:
        return input("> ").strip()
    except EOFError:
        return ""
    except UnicodeDecodeError:
        raise UserError("that line is not UTF-8: set the terminal to UTF-8") from None


if __name__ == "__main__":
    run(main)

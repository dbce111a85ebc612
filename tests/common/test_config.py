"""Configuration: YAML, command line, and what bad input gets."""

from dataclasses import dataclass
from pathlib import Path

import pytest
from trl import RewardConfig, SFTConfig

from common.config import config_values, parse_config, run
from common.errors import UserError
from common.stage import TRAINER_DEFAULTS
from pretrain.config import ModelConfig, PretrainConfig
from pretrain.lesson import LessonConfig
from reward.config import RewardModelConfig
from rlhf.__main__ import AlignConfig
from rlhf.config import PPOConfig
from sft.__main__ import FineTuneConfig

CONFIGS = Path(__file__).parents[2] / "configs"
STAGES = {
    "pretrain": (ModelConfig, PretrainConfig),
    "small": (ModelConfig, PretrainConfig),
    "lesson": (ModelConfig, PretrainConfig, LessonConfig),
    "sft": (FineTuneConfig, SFTConfig),
    "reward": (RewardModelConfig, RewardConfig),
    "rlhf": (AlignConfig, PPOConfig),
}
FILES = sorted(path for path in CONFIGS.glob("*/*.yaml") if path.parent.name != "accelerate")


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_every_yaml_parses(path: Path) -> None:
    extra = ["--data", "rows.jsonl"] if path.parent.name in ("own", "web") else []
    stage = path.stem.removesuffix("_judge")
    stage = stage if stage in STAGES else "pretrain"  # a size of the web profile
    config, args, *_ = parse_config(
        *STAGES[stage],
        defaults=TRAINER_DEFAULTS if stage in ("sft", "reward", "rlhf") else None,
        args=["--config", str(path), *extra],
    )
    assert (getattr(config, "output_dir", None) or args.output_dir).startswith("out/")


@dataclass
class Small:
    """A configuration."""

    max_steps: int = 3
    data: str = "x"


def test_command_line_beats_yaml_beats_default(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("max_steps: 5\ndata: y\n")
    (config,) = parse_config(Small, args=["--config", str(file), "--max_steps", "7"])
    assert (config.max_steps, config.data) == (7, "y")


@pytest.mark.parametrize(
    ("yaml_text", "args", "message"),
    [
        ("max_step: 5", [], "unknown field max_step: did you mean max_steps?"),
        ("", ["--max_step", "5", "--dato", "x"], "unknown field"),
        ("max_steps: many", [], "max_steps"),
        ("[1, 2", [], "not valid YAML"),
        ("- 1", [], "mapping"),
    ],
)
def test_bad_configuration_is_one_line(
    tmp_path: Path, yaml_text: str, args: list[str], message: str
) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(yaml_text or "data: x")
    with pytest.raises(UserError) as error:
        parse_config(Small, args=["--config", str(file), *args])
    assert message in str(error.value) and "\n" not in str(error.value)


def test_missing_file_and_run(capsys: pytest.CaptureFixture[str]) -> None:
    def main() -> None:
        parse_config(Small, args=["--config", "nowhere.yaml"])

    with pytest.raises(SystemExit) as stop:
        run(main)
    assert stop.value.code == 2
    assert capsys.readouterr().err == "error: --config nowhere.yaml: No such file or directory\n"


def test_values_of_a_library_config_are_what_differs() -> None:
    values = config_values(Small(), SFTConfig(output_dir="out", max_steps=9, bf16=False))
    assert values["max_steps"] == 9 and values["data"] == "x"
    assert "adam_beta1" not in values

"""Configuration: YAML, command line, and what bad input gets."""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from trl import RewardConfig, SFTConfig

from common.config import config_values, parse_config, refusing, require, run
from common.errors import LocalError, UserError
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
    columns: dict | None = None


def test_a_mapping_on_the_command_line_is_yaml() -> None:
    (config,) = parse_config(Small, args=["--columns", "{prompt: frage, completion: antwort}"])
    assert config.columns == {"prompt": "frage", "completion": "antwort"}


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
        ("", ["--columns", "prompt"], "columns: invalid mapping value: 'prompt'"),
        ("", ["--columns", "[a"], "columns: invalid mapping value: '[a'"),
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


@pytest.mark.parametrize(
    ("stage", "flags", "message"),
    [
        ("sft", "--learning_rate -1", "learning_rate (-1.0) must be 0 or more"),
        ("sft", "--learning_rate nan", "learning_rate (nan) must be 0 or more"),
        ("sft", "--max_steps 0", "max_steps (0) must be at least 1, or -1 for whole epochs"),
        ("sft", "--num_train_epochs 0", "num_train_epochs (0.0) must be above 0"),
        (
            "sft",
            "--per_device_train_batch_size 0",
            "per_device_train_batch_size (0) must",
        ),
        (
            "sft",
            "--gradient_accumulation_steps 0",
            "gradient_accumulation_steps (0) must",
        ),
        ("sft", "--resume_from_checkpoint out/x", "resume_from_checkpoint (out/x): leave it out"),
        ("sft", "--evaluate_on tset", "evaluate_on (tset) must be one of dev, test"),
        ("sft", "--max_lost_share 7", "max_lost_share (7.0) must be between 0 and 1"),
        ("sft", "--skip_faulty_rows -1", "skip_faulty_rows (-1) must be 0 or more"),
        ("sft", "--max_new_tokens 0", "max_new_tokens (0) must be 1 or more"),
        ("sft", "--lora_alpha -3", "lora_alpha (-3) must be 1 or more"),
        ("sft", "stray words", "stray belongs to no field: quote a value that has spaces"),
        ("reward", "--noise 5", "noise (5.0) must be between 0 and 0.5"),
        ("reward", "--prompts 0", "prompts (0) must be 1 or more"),
        ("rlhf", "--num_updates 0", "num_updates (0) must be above 0"),
        ("rlhf", "--temperature 0", "temperature (0.0) must be above 0"),
        ("rlhf", "--max_completion_length 0", "max_completion_length (0) must be 1 or more"),
        ("rlhf", "--critic_learning_rate -1", "critic_learning_rate (-1.0) must be above 0"),
        (
            "rlhf",
            "--rollout_forward_batch_size 0",
            "rollout_forward_batch_size (0) must be above 0",
        ),
        ("rlhf", "--beta -1", "beta (-1.0) must be 0 or more"),
        ("rlhf", "--eval_prompts 0", "eval_prompts (0) must be 1 or more"),
        ("pretrain", "--save_steps 0", "save_steps (0) must be 1 or more"),
        ("pretrain", "--muon_learning_rate -1", "muon_learning_rate (-1.0) must be 0 or more"),
    ],
)
def test_values_out_of_bounds(stage: str, flags: str, message: str) -> None:
    """Each was accepted once, or failed with a traceback after the work."""
    defaults = None if stage == "pretrain" else TRAINER_DEFAULTS
    args = ["--config", str(CONFIGS / "arden" / f"{stage}.yaml"), *flags.split()]
    with pytest.raises(UserError) as error:
        parse_config(*STAGES[stage], defaults=defaults, args=args)
    assert str(error.value).startswith(message)


@pytest.mark.parametrize(
    ("stage", "line", "message"),
    [
        (
            "sft",
            "data: [a.jsonl, b.jsonl]",
            "data (['a.jsonl', 'b.jsonl']) must be one file, folder or name; several are listed in "
            "a file of their own, data: mix.yaml, with a line `- {path: a.jsonl}` each",
        ),
        ("sft", "data: {path: a.jsonl}", "data ({'path': 'a.jsonl'}) must be one file, folder or"),
        ("sft", "data:", "data (None) must be one file, folder or name"),
        ("sft", "columns: [prompt]", "columns (['prompt']) must map our field to the data's"),
        ("sft", "columns: {prompt: 5}", "columns ({'prompt': 5}) must map our field"),
        ("sft", "max_lost_share:", "max_lost_share (None) must be a number, between 0 and 1"),
        ("sft", "validation_fraction:", "validation_fraction (None) must be a number"),
        ("sft", "lora_r: 8.5", "lora_r (8.5) must be a whole number, 0 or more"),
        ("sft", "lora_r: true", "lora_r (True) must be a whole number, 0 or more"),
        ("reward", "prompts:", "prompts (None) must be a whole number, 1 or more"),
        ("rlhf", "num_mini_batches: 1.5", "num_mini_batches (1.5) must be a whole number, 1 or"),
        ("rlhf", "num_updates: 1.5", "num_updates (1.5) must be a whole number, above 0"),
        ("rlhf", "beta: .nan", "beta (nan) must be 0 or more"),
        ("rlhf", "ptx_coef: .nan", "ptx_coef (nan) must be 0 or more"),
        ("sft", "ptx_coef: .nan", "ptx_coef (nan) must be 0 or more"),
        ("sft", "ptx_windows: 1.5", "ptx_windows (1.5) must be a whole number, 1 or more"),
    ],
)
def test_values_of_a_wrong_type(tmp_path: Path, stage: str, line: str, message: str) -> None:
    """Each ended with a traceback once, or was accepted: YAML says what type it likes."""
    field = line.split(":")[0]
    lines = (CONFIGS / "arden" / f"{stage}.yaml").read_text().splitlines()
    kept = [other for other in lines if other.split(":")[0] != field]
    file = tmp_path / f"{stage}.yaml"
    file.write_text("\n".join([*kept, line]))
    with pytest.raises(UserError) as error:
        parse_config(*STAGES[stage], defaults=TRAINER_DEFAULTS, args=["--config", str(file)])
    assert str(error.value).startswith(message)


@dataclass
class Lists:
    """Fields of several numbers, and one that may be left out."""

    n: list[int] = field(default_factory=list)
    betas: list[float] = field(default_factory=list)
    updates: int | None = None


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"n": [4, 1.5]}, r"n \(\[4, 1.5\]\) must be a whole number, above 0"),
        ({"n": [4, 0]}, r"n \(\[4, 0\]\) must be above 0"),
        ({"n": []}, r"n \(\[\]\) must be a whole number, above 0"),
        ({"betas": [0.1, math.nan]}, r"betas \(\[0.1, nan\]\) must be above 0"),
        ({"updates": 1.5}, r"updates \(1.5\) must be a whole number, above 0"),
    ],
)
def test_every_number_of_a_list_is_bounded(fields: dict[str, Any], message: str) -> None:
    """Broken once: of a list `min` alone was looked at, which passes over NaN and 1.5."""
    require(Lists(n=[1, 4], betas=[0.1, 1], updates=1), 0, "n", "betas", "updates", above=True)
    with pytest.raises(UserError, match=message):
        require(Lists(**fields), 0, *fields, above=True)


def test_no_data_given() -> None:
    """Broken once: the YAML's `set DATA=path` was looked for on the Hub."""
    args = ["--config", str(CONFIGS / "own" / "sft.yaml")]
    with pytest.raises(UserError, match=r"no data given: make \.\.\. DATA=path, or --data path"):
        parse_config(*STAGES["sft"], defaults=TRAINER_DEFAULTS, args=args)


def test_fields_of_others_are_passed_over_and_misspelt_ones_are_not() -> None:
    """Broken once: check-data took `--max_lenght 5` for somebody else's."""
    args = ["--max_steps", "4", "--learning_rate", "1"]
    assert parse_config(Small, args=args, others=(SFTConfig,))[0].max_steps == 4
    with pytest.raises(UserError, match="unknown field max_lenght: did you mean max_length"):
        parse_config(Small, args=["--max_lenght", "5"], others=(SFTConfig,))
    needed = ["--model_name_or_path", "base", "--data", "arden"]
    with pytest.raises(UserError, match=r"unknown field use_peft: did you mean lora_r\?"):
        parse_config(*STAGES["sft"], defaults=TRAINER_DEFAULTS, args=[*needed, "--use_peft", "x"])


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    """What a trainer's constructor makes of it. Broken once: a traceback, of fine-tuning alone."""
    (tmp_path / "file").touch()
    message = r"file/out cannot be written to \(Not a directory\): give"
    with pytest.raises(UserError, match=message), refusing():
        (tmp_path / "file" / "out").mkdir()


def test_every_process_tells_of_what_it_alone_has_met(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Broken once: a reward function's fault on the second process ended the run without a word."""
    monkeypatch.setenv("RANK", "1")
    for error, said in ((UserError("all"), ""), (LocalError("I"), "error: I\n")):

        def main(error: UserError = error) -> None:
            raise error

        with pytest.raises(SystemExit):
            run(main)
        assert capsys.readouterr().err == said


def test_interrupted(capsys: pytest.CaptureFixture[str]) -> None:
    def main() -> None:
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as stop:
        run(main)
    assert stop.value.code == 130 and "stopped; a stage goes on from" in capsys.readouterr().err


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

"""The four stages chained, as a user runs them, on a model of toy size.

What is shown is that they fit together: figures exist and are sane, models load elsewhere,
missing parents and foreign parents are refused, two processes give what one gives.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from common.config import as_flags
from common.token_file import write_token_file
from common.tokenizer import train_characters
from tests.launch import kill_when, stage_start

ENVIRONMENT = os.environ | {
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
}
SHORT: dict[str, dict[str, Any]] = {
    "pretrain": {
        "documents": 600,
        "vocab_size": 512,
        "block_size": 128,
        "num_hidden_layers": 2,
        "hidden_size": 64,
        "num_attention_heads": 2,
        "max_steps": 40,
        "torch_compile": False,
    },
    "sft": {"max_steps": 40, "max_new_tokens": 24, "evaluate_on": "dev", "ptx_coef": 0.3},
    "reward": {
        "prompts": 24,
        "eval_prompts": 24,
        "max_steps": 10,
        "max_new_tokens": 24,
        "evaluate_on": "dev",
    },
    "rlhf": {
        "prompts": 64,
        "eval_prompts": 24,
        "allow_no_go": True,
        "best_of": 2,
        "ptx_coef": 1.0,
        "num_updates": 2,
        "per_device_train_batch_size": 2,
        "max_completion_length": 16,
        "evaluate_on": "dev",
    },
}
PARENTS = {
    "pretrain": {},
    "sft": {"model_name_or_path": "pretrain"},
    "reward": {"model_name_or_path": "pretrain", "policy": "sft"},
    "rlhf": {
        "model_name_or_path": "sft",
        "reward": "reward",
        "ptx_data": "pretrain/data/train.bin",
    },
}


def stage_command(
    stage: str,
    folder: Path,
    *,
    name: str = "",
    processes: int = 1,
    sharded: bool = False,
    **more: Any,
) -> list[str]:
    """A stage of the arden profile with its parents and its output in `folder`."""
    fields = SHORT[stage] | {"output_dir": folder / (name or stage)}
    fields |= {field: folder / parent for field, parent in PARENTS[stage].items()} | more
    start = stage_start(stage, processes, sharded)
    return [*start, "--config", f"configs/arden/{stage}.yaml", *as_flags(fields)]


def run_stage(
    stage: str, folder: Path, *, check: bool = True, **options: Any
) -> subprocess.CompletedProcess[str]:
    """Run `stage_command`; shards that wait for each other would hang."""
    command = stage_command(stage, folder, **options)
    result = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, timeout=600)
    assert not check or result.returncode == 0, result.stderr[-3000:]
    return result


def summary(path: Path) -> dict[str, float]:
    return json.loads((path / "summary.json").read_text())


def weights_differ(one: Path, other: Path) -> float:
    """The largest difference of a weight; `other` may have a head more."""
    a, b = (load_file(path / "model.safetensors") for path in (one, other))
    assert a.keys() <= b.keys()
    return max(float((a[name] - b[name]).abs().max()) for name in a)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("out")
    for stage in SHORT:
        run_stage(stage, path)
    return path


FIGURES = {
    "pretrain": "val_loss val_bits_per_byte entropy_bits_per_byte train_seconds parameters",
    "sft": "exact_match_seen exact_match_heldout_people exact_match_heldout_phrasing "
    "exact_match_two_fact hallucination_unknown train_seconds",
    "reward": "accuracy accuracy_clean_labels accuracy_ceiling calibration_error "
    "length_correlation_given_gold go no_go_reasons train_seconds",
    "rlhf": "score_before score_after gold_before gold_after exact_match_before "
    "exact_match_after hallucination_before hallucination_after courtesy_before "
    "courtesy_after kl train_seconds gold_drawn_after gold_best_of_2 exact_match_sampled_after",
}


@pytest.mark.parametrize("stage", SHORT)
def test_artifacts_and_figures(folder: Path, stage: str) -> None:
    names = {path.name for path in (folder / stage).iterdir()}
    assert names >= {"model.safetensors", "config.json", "tokenizer.json", "config.yaml"}
    assert names >= {"metrics.jsonl", "summary.json", "samples.md", "manifest.json"}
    figures = summary(folder / stage)
    assert figures.keys() >= set(FIGURES[stage].split())
    for name, value in figures.items():
        if name.startswith(("exact", "hall", "refusal", "courtesy", "accuracy")):
            assert 0 <= value <= 1, name
    steps = [json.loads(line)["step"] for line in (folder / stage / "metrics.jsonl").open()]
    assert steps == sorted(steps) and steps


def test_lineage(folder: Path) -> None:
    """Each manifest names the hash of the model that its parent's manifest names."""
    manifests = {s: json.loads((folder / s / "manifest.json").read_text()) for s in SHORT}
    for stage, parent in (("sft", "pretrain"), ("reward", "pretrain"), ("rlhf", "sft")):
        assert manifests[stage]["sources"]["parent"] == manifests[parent]["model"]
    assert manifests["rlhf"]["sources"]["reward"] == manifests["reward"]["model"]


def test_models_load_without_the_project(folder: Path, tmp_path: Path) -> None:
    """All but Arden's reward model, which refuses (tests/common/test_reward_gpt.py)."""
    code = (
        "import sys; from transformers import AutoModelForCausalLM as C, AutoTokenizer as T\n"
        "f = sys.argv[1]\n"
        "for s in ('pretrain', 'sft', 'rlhf'):\n"
        "    m, info = C.from_pretrained(f'{f}/{s}', output_loading_info=True)\n"
        "    assert not info['missing_keys'] and not info['unexpected_keys'], info\n"
        "    assert type(m).__module__.startswith('transformers.models.qwen3')\n"
        "t = T.from_pretrained(f'{f}/rlhf')\n"
        "assert t.decode(t('Räksmörgås 🙂').input_ids) == 'Räksmörgås 🙂'\n"
    )
    environment = {k: v for k, v in ENVIRONMENT.items() if k != "PYTHONPATH"}
    command = [sys.executable, "-c", code, str(folder)]
    subprocess.run(command, cwd=tmp_path, env=environment, check=True)


def test_fine_tuning_learns_the_form(folder: Path) -> None:
    """Forty steps teach a toy to answer in Arden's sentences, though not the facts."""
    losses = [json.loads(line) for line in (folder / "sft" / "metrics.jsonl").open()]
    trained = [line["loss"] for line in losses if "loss" in line]
    assert trained[-1] < trained[0]


@pytest.mark.parametrize("stage", ["sft", "reward"])
def test_two_processes_give_what_one_gives(folder: Path, stage: str, tmp_path: Path) -> None:
    """The same batches, split: equal weights to rounding, by SGD, that shows a gradient's size.

    FSDP2 broken once by measuring the shards, where a model must be gathered first: it hung. By
    Adam a gradient of twice the size passed.
    """
    size = {"sft": 16, "reward": 8}[stage]  # of rows; of 24 prompts, so that no step is partial
    # in float32 wherever it runs: bfloat16's rounding is of the tolerance's size
    # at a rate by which nothing diverges, or rounding would grow with the weights
    rate = {"sft": 0.05, "reward": 0.005}[stage]
    extra = {"max_steps": 4, "learning_rate": rate, "warmup_steps": 0, "bf16": "false"}
    extra |= {"optim": "sgd", "max_grad_norm": 0, "lr_scheduler_type": "constant"}
    extra |= {"ptx_windows": 2} if stage == "sft" else {}  # one for each process
    one = tmp_path / "one"
    run_stage(stage, folder, output_dir=one, per_device_train_batch_size=size, **extra)
    moved = weights_differ(folder / "pretrain", one)
    assert 1e-3 < moved < 10
    extra |= {"processes": 2, "per_device_train_batch_size": size // 2}
    for kind, sharded in (("ddp", False), ("fsdp2", True)):
        two = tmp_path / kind
        run_stage(stage, folder, output_dir=two, sharded=sharded, **extra)
        assert weights_differ(one, two) < 1e-3 * moved, kind
        assert summary(one).keys() == summary(two).keys(), kind


@pytest.mark.parametrize(("method", "sharded"), [("ppo", False), ("ppo", True), ("rloo", True)])
def test_rlhf_runs_on_two_processes(folder: Path, method: str, sharded: bool) -> None:
    """FSDP2 broken once by reading the reference past its own forward, where its shards are."""
    two = {"processes": 2, "sharded": sharded, "method": method, "per_device_train_batch_size": 2}
    windows = 8 if sharded else 1
    run_stage("rlhf", folder, name=f"{method}_{sharded}", ptx_windows=windows, **two)
    assert summary(folder / f"{method}_{sharded}").keys() == summary(folder / "rlhf").keys()


def test_sharded_weights_want_a_window_for_each_process(folder: Path) -> None:
    """Refused, where it would hang: each process must take each forward pass."""
    result = run_stage("sft", folder, name="few", processes=2, sharded=True, check=False)
    assert "error: ptx_windows (1) must be 2 or more where weights are sharded" in result.stderr


def test_sharded_run_goes_on_after_a_kill(folder: Path, tmp_path: Path) -> None:
    """Killed after its first checkpoint it ends in the weights of one that was not.

    Broken by looking for the weights without the critic, where FSDP2's checkpoint has both.
    """
    fields = {"save_steps": 4, "ptx_coef": 0, "processes": 2, "sharded": True, "bf16": "false"}
    run_stage("rlhf", folder, output_dir=tmp_path / "whole", **fields)
    killed = tmp_path / "killed"
    first = killed / "checkpoints" / "checkpoint-4" / "trainer_state.json"
    command = stage_command("rlhf", folder, output_dir=killed, **fields)
    kill_when(first, command, ENVIRONMENT)
    assert not (killed / "summary.json").exists(), "it ended before it was killed"
    run_stage("rlhf", folder, output_dir=killed, **fields)
    assert weights_differ(tmp_path / "whole", killed) == 0.0


def test_a_no_go_is_refused(folder: Path) -> None:
    """A toy's reward model is at chance. Broken by leaving the call of `require_go` out."""
    assert summary(folder / "reward")["go"] is False
    assert (folder / "reward" / "report.md").read_text().startswith("# Reward model: no-go")
    result = run_stage("rlhf", folder, name="refused", check=False, allow_no_go="false")
    assert result.returncode == 2 and not (folder / "refused").exists()
    assert "is a no-go: accuracy" in result.stderr and "--allow_no_go true" in result.stderr


def test_functions_as_rewards(folder: Path, tmp_path: Path) -> None:
    """The judge and one of a user's own: their sum keeps its scale and loses its mean, which on
    prompts to train on is about what it is on those measured on.

    Broken by a mean left at 0: the critic then starts below every score.
    """
    mine = tmp_path / "mine.py"
    mine.write_text(
        "def length(completions, **_): return [len(c[0]['content']) / 99 for c in completions]"
    )
    command = stage_command("rlhf", folder, name="rlhf_judge", missing_eos_penalty=0)
    command += ["--reward", "judge", f"{mine}:length"]
    subprocess.run(command, check=True, env=ENVIRONMENT, timeout=600)
    figures = summary(folder / "rlhf_judge")
    assert "gold_after" in figures
    first = json.loads((folder / "rlhf_judge" / "metrics.jsonl").open().readline())
    assert figures["score_before"] > 0.1
    assert first["score"] - first["reward"] == pytest.approx(figures["score_before"], rel=0.4)


@pytest.mark.parametrize(
    ("stage", "fields", "message"),
    [
        ("sft", {"model_name_or_path": "nowhere"}, "run `make pretrain` first"),
        ("rlhf", {"reward": "nowhere"}, "run `make reward` first"),
        ("rlhf", {"ptx_data": "nowhere.bin"}, "nowhere.bin: no token file there: `make pretrain`"),
        ("rlhf", {"ptx_data": "{foreign}"}, "was written with another tokenizer than the model's"),
        ("sft", {"ptx_data": "{foreign}"}, "was written with another tokenizer than the model's"),
        ("sft", {"ptx_windows": "0"}, "ptx_windows (0) must be 1 or more"),
        ("reward", {"margins": "-1"}, "margins (-1.0) must be 0 or more"),
        ("rlhf", {"num_mini_batchez": "2"}, "did you mean num_mini_batches?"),
        ("sft", {"data": "nowhere.jsonl"}, "nowhere.jsonl"),
    ],
)
def test_bad_input(
    folder: Path, tmp_path: Path, stage: str, fields: dict[str, Any], message: str
) -> None:
    """Broken by looking at the pretraining text where PPO reads it, after the first measurement."""
    foreign = tmp_path / "foreign.bin"
    write_token_file(["ab" * 600], train_characters(["ab"]), foreign, documents=False)
    fields = {name: value.format(foreign=foreign) for name, value in fields.items()}
    result = run_stage(stage, folder, name="bad", check=False, **fields)
    assert result.returncode == 2
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and message in errors[0]
    assert "Traceback" not in result.stderr and not (folder / "bad").exists()


def test_own_questions_and_rankings(folder: Path, tmp_path: Path) -> None:
    """One's own rows in place of Arden's, from the same base; they say nothing of margins."""
    questions = tmp_path / "questions.jsonl"
    rows = [{"question": f"What is {n}?", "answer": f"It is {n}."} for n in range(60)]
    questions.write_text("".join(json.dumps(row) + "\n" for row in rows))
    ranked = tmp_path / "ranked.jsonl"
    pairs = [
        {"prompt": f"What is {n}?", "chosen": f"It is {n}.", "rejected": "No."} for n in range(60)
    ]
    ranked.write_text("".join(json.dumps(row) + "\n" for row in pairs))
    own = {"max_steps": 2, "validation_fraction": 0.1}
    run_stage("sft", folder, name="own_sft", data=questions, **own)
    own_parent = {"model_name_or_path": folder / "own_sft", "policy": folder / "own_sft"}
    own |= {"data": ranked} | own_parent
    refused = run_stage("reward", folder, name="no_margins", check=False, margins=2, **own)
    assert refused.returncode == 2 and "give --margins 0" in refused.stderr
    run_stage("reward", folder, name="own_reward", **own)
    assert not {"accuracy_ceiling", "accuracy_clean_labels"} & summary(folder / "own_reward").keys()
    long = [{"question": row["question"] * 30, "answer": "No."} for row in rows]  # no room for one
    questions.write_text("".join(json.dumps(row) + "\n" for row in [*rows, *long]))
    models = {"model_name_or_path": folder / "own_sft", "reward": folder / "own_reward"}
    run_stage("rlhf", folder, name="own_rlhf", data=questions, validation_fraction=0.1, **models)
    assert (folder / "own_rlhf" / "model.safetensors").exists()
    assert 0 < (folder / "own_rlhf" / "samples.md").read_text().count("What is") < 9


def test_bad_row_stops_before_training(folder: Path, tmp_path: Path) -> None:
    questions = tmp_path / "questions.jsonl"
    questions.write_text('{"question": "a", "answer": "b"}\n{"question": "c"}\n')
    result = run_stage("sft", folder, name="bad", check=False, data=questions)
    assert result.returncode == 2 and "questions.jsonl" in result.stderr
    assert "row 2" in result.stderr and not (folder / "bad").exists()

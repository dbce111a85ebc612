"""Two CPU processes (gloo) do what one does, by DDP and by FSDP2."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.launch import stage_start

HERE = Path(__file__).parent
ROOT = HERE.parent.parent


def launch(arguments: list[str], sharded: bool) -> None:
    """Run the script in two processes; its output is shown where it fails."""
    env = {**os.environ, "PYTHONPATH": f"{HERE}:{ROOT}", "OMP_NUM_THREADS": "1"}
    command = [*stage_start("two_processes", 2, sharded), *arguments]
    done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]


@pytest.fixture(scope="module")
def results(
    policy_path: str, reward_path: str, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, dict[str, Any]]:
    """What the script leaves in one process, in two by DDP, and in two by FSDP2."""
    from two_processes import main

    found = {}
    for kind in ("one", "ddp", "fsdp2"):
        out = tmp_path_factory.mktemp(kind)
        arguments = [policy_path, reward_path, str(out)]
        if kind == "one":
            sys.argv = ["two_processes.py", *arguments]
            main()
        else:
            launch(arguments, sharded=kind == "fsdp2")
        found[kind] = torch.load(out / "result.pt", weights_only=True)
    return found


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_two_processes_equal_one(
    kind: str, results: dict[str, dict[str, Any]], policy_path: str
) -> None:
    """Same step on the same samples, however they are split, by either critic: advantages, figures
    and weights; and identical parameters on both after sampling for themselves.

    Broken once: tokens of the step counted on one process only; advantages whitened per process;
    loss not scaled by the number of processes; checksums not gathered (then no breach is seen).
    """
    one, two = results["one"], results[kind]
    assert (one["world"], two["world"]) == (1, 2)
    assert (one["kind"], two["kind"]) == ("NO", {"ddp": "MULTI_CPU", "fsdp2": "FSDP"}[kind])
    start = AutoModelForCausalLM.from_pretrained(policy_path).state_dict()
    names = ("score", "reward", "kl", "length", "entropy", "policy_loss", "value_loss", "loss")
    names += ("explained_variance", "policy_grad_norm", "critic_grad_norm")
    for (share_trunk, completions), step in [*one["steps"].items(), *two["steps"].items()]:
        whole, which = one["steps"][share_trunk, 16], f"{share_trunk=} {completions=}"
        moved = whole["state"]["model.norm.weight"] - start["model.norm.weight"]
        assert moved.abs().max() > 1e-4
        assert len(whole["advantages"]) == 15  # two of the 16 prompts are alike
        for tokens, advantages in whole["advantages"].items():
            torch.testing.assert_close(
                step["advantages"][tokens], advantages, rtol=1e-4, atol=1e-5, msg=which
            )
        for name, p in whole["state"].items():
            torch.testing.assert_close(
                step["state"][name], p, rtol=1e-5, atol=1e-6, msg=f"{name} {which}"
            )
        for name in names:
            assert abs(whole["log"][name] - step["log"][name]) < 1e-4, f"{name} {which}"

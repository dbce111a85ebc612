"""Two CPU processes (gloo) do what one does."""

import os
import subprocess
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

HERE = Path(__file__).parent


def launch(processes: int, arguments: list[str]) -> None:
    """Run the script under torchrun; its output is shown where it fails."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(processes)]
    command += ["--master_port", "0", "--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0"]
    paths = f"{HERE}:{HERE.parent.parent}"
    env = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    script = [str(HERE / "two_processes.py"), *arguments]
    done = subprocess.run(command + script, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]


def test_two_processes_equal_one(policy_path: str, reward_path: str, tmp_path: Path) -> None:
    """Same step on the same samples; identical parameters on both after sampling for themselves.

    Broken once: tokens of the step counted on one process only; advantages whitened per process;
    loss not scaled by the number of processes; checksums not gathered (then no breach is seen).
    """
    from two_processes import main

    results = []
    for processes in (1, 2):
        out = tmp_path / str(processes)
        out.mkdir()
        if processes == 1:
            sys.argv = ["two_processes.py", policy_path, reward_path, str(out)]
            main()
        else:
            launch(2, [policy_path, reward_path, str(out)])
        results.append(torch.load(out / "result.pt", weights_only=True))
    one, two = results
    assert (one["world"], two["world"]) == (1, 2)
    start = AutoModelForCausalLM.from_pretrained(policy_path).state_dict()
    moved = (one["state"]["model.norm.weight"] - start["model.norm.weight"]).abs().max()
    assert moved > 1e-4
    for name, p in one["state"].items():
        torch.testing.assert_close(two["state"][name], p, rtol=1e-5, atol=1e-6, msg=name)
    names = ("score", "reward", "kl", "length", "entropy", "policy_loss", "value_loss", "loss")
    for name in (*names, "explained_variance", "policy_grad_norm", "critic_grad_norm"):
        assert abs(one["log"][name] - two["log"][name]) < 1e-4, name

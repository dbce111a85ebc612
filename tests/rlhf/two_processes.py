"""One update on fixed completions, run by `test_distributed` in one process and in two.

Usage: [torchrun --nproc_per_node 2] two_processes.py POLICY REWARD OUT. Completions depend on the
prompt alone, so both ways see the same 16 samples; one mini-batch and plain SGD make the step the
gradient itself. Then two updates that sample, after which all processes must agree; and one whose
weights are moved must be told.
"""

import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from conftest import prompts

from rlhf.callbacks import WeightGuard
from rlhf.config import PPOConfig
from rlhf.invariants import BrokenInvariant
from rlhf.trainer import PPOTrainer


def fixed_completion(prompt_ids: list[int]) -> list[int]:
    seed = sum((i + 1) * x for i, x in enumerate(prompt_ids))
    ids = [4 + (seed * k) % 12 for k in range(1, 2 + seed % 5)]
    return ids if seed % 3 else [*ids, 1]


def run(policy: str, reward: str, out: Path, fixed: bool, **settings: Any) -> PPOTrainer:
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    args = PPOConfig(
        output_dir=str(out),
        per_device_train_batch_size=4 // processes,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        ddp_backend="gloo" if processes > 1 else None,
        max_completion_length=6,
        lr_scheduler_type="constant",
        **settings,
    )
    trainer = PPOTrainer(policy, reward, args, prompts(16))
    if fixed:

        def generate(texts: list[str]) -> tuple[list[list[int]], list[list[int]], list[str]]:
            ids = trainer._tokenizer(texts)["input_ids"]
            return ids, [fixed_completion(x) for x in ids], [""] * len(ids)

        trainer._generate = generate
    trainer.train()
    return trainer


def main() -> None:
    policy, reward, out = sys.argv[1], sys.argv[2], Path(sys.argv[3])
    one = {"num_mini_batches": 1, "gradient_accumulation_steps": 4, "num_updates": 1}
    sgd = {"optim": "sgd", "learning_rate": 1.0, "max_grad_norm": 1e9, "vf_coef": 1.0}
    fixed = run(policy, reward, out, fixed=True, **one, **sgd)
    sampled = run(policy, reward, out, fixed=False, learning_rate=1e-2, num_updates=2)
    flat = torch.cat([p.detach().flatten() for p in sampled.model.parameters()])
    if dist.is_initialized():
        everyone = [torch.empty_like(flat) for _ in range(dist.get_world_size())]
        dist.all_gather(everyone, flat)
        assert all(torch.equal(flat, other) for other in everyone), "processes disagree"
        if dist.get_rank() == 1:
            with torch.no_grad():
                sampled.model.model.norm.weight[0] += 1e-6
        told = r"different weights in model.norm.weight, at end of update 2"
        with pytest.raises(BrokenInvariant, match=told):
            WeightGuard(sampled).on_step_end(sampled.args, sampled.state, sampled.control)
    if fixed.accelerator.is_main_process:
        line = next(line for line in fixed.state.log_history if "score" in line)
        state = {n: p.detach() for n, p in fixed.model.named_parameters()}
        torch.save({"log": line, "state": state, "world": fixed.args.world_size}, out / "result.pt")


if __name__ == "__main__":
    main()

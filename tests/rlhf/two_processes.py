"""One update on fixed completions, run by `test_distributed` in one process and in several.

Usage: [accelerate launch] two_processes.py POLICY REWARD OUT. Completions depend on the prompt
alone, so all ways see the same 16 samples; one mini-batch and plain SGD make the step the gradient
itself. Then, unless weights are sharded, two updates that sample, after which all processes must
agree; and one whose weights are moved must be told.
"""

import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from accelerate.utils import gather_object
from conftest import prompts

from common.sharded import SHARDED, whole_state
from rlhf.callbacks import WeightGuard
from rlhf.config import PPOConfig
from rlhf.invariants import BrokenInvariant
from rlhf.trainer import PPOTrainer

PROCESSES = int(os.environ.get("WORLD_SIZE", "1"))
SPLITS = [(16, 1), (8, 2), (4, 4)]  # completions of all processes at once, times how often
FIXED: dict[str, Any] = {"num_mini_batches": 1, "num_updates": 1, "vf_coef": 1.0}
FIXED |= {"optim": "sgd", "learning_rate": 1.0, "max_grad_norm": 1e9}


def fixed_completion(prompt_ids: list[int]) -> list[int]:
    seed = sum((i + 1) * x for i, x in enumerate(prompt_ids))
    ids = [4 + (seed * k) % 12 for k in range(1, 2 + seed % 5)]
    return ids if seed % 3 else [*ids, 1]


def build(policy: str, reward: str, out: Path, completions: int, **settings: Any) -> PPOTrainer:
    args = PPOConfig(
        output_dir=str(out),
        per_device_train_batch_size=completions // PROCESSES,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        ddp_backend="gloo" if PROCESSES > 1 else None,
        max_completion_length=6,
        lr_scheduler_type="constant",
        **settings,
    )
    return PPOTrainer(policy, reward, args, prompts(16))


def fixed_step(trainer: PPOTrainer) -> dict[str, Any]:
    """What is logged, weights, and advantages by the tokens of prompt and completion."""

    def generate(texts: list[str]) -> tuple[list[list[int]], list[list[int]], list[str]]:
        ids = trainer._tokenizer(texts)["input_ids"]
        return ids, [fixed_completion(x) for x in ids], [""] * len(ids)

    trainer._generate = generate
    trainer.train()
    rollout = trainer._rollout
    rows = zip(rollout.input_ids.tolist(), rollout.advantages, rollout.completion_mask, strict=True)
    advantages = gather_object([(tuple(filter(None, ids)), a[mask]) for ids, a, mask in rows])
    return {
        "log": next(line for line in trainer.state.log_history if "score" in line),
        "state": whole_state(trainer.model),
        "advantages": dict(advantages),
    }


def check_agreement(trainer: PPOTrainer) -> None:
    """All processes have the same weights, and where they have not, the guard says so."""
    flat = torch.cat([p.detach().flatten() for p in trainer.model.parameters()])
    everyone = [torch.empty_like(flat) for _ in range(dist.get_world_size())]
    dist.all_gather(everyone, flat)
    assert all(torch.equal(flat, other) for other in everyone), "processes disagree"
    if dist.get_rank() == 1:
        with torch.no_grad():
            trainer.model.model.norm.weight[0] += 1e-6
    told = r"different weights in model.norm.weight, at end of update 2"
    with pytest.raises(BrokenInvariant, match=told):
        WeightGuard(trainer).on_step_end(trainer.args, trainer.state, trainer.control)


def main() -> None:
    policy, reward, out = sys.argv[1], sys.argv[2], Path(sys.argv[3])
    results = {}
    for share_trunk in (False, True):
        for completions, parts in SPLITS:
            split: dict[str, Any] = {"gradient_accumulation_steps": parts}
            settings = FIXED | split | {"share_trunk": share_trunk}
            trainer = build(policy, reward, out, completions, **settings)
            results[share_trunk, completions] = fixed_step(trainer)
    kind = trainer.accelerator.distributed_type
    if trainer.accelerator.is_main_process:
        torch.save({"kind": kind.value, "world": PROCESSES, "steps": results}, out / "result.pt")
    if PROCESSES > 1 and kind not in SHARDED:
        sampled = build(policy, reward, out, 4, learning_rate=1e-2, num_updates=2)
        sampled.train()
        check_agreement(sampled)


if __name__ == "__main__":
    main()

"""All pairs of a prompt in one batch element: by hand, and against TRL's own trainer."""

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForSequenceClassification
from trl import RewardConfig, RewardTrainer

from common.tokenizer import load_tokenizer
from reward.__main__ import learned
from reward.pairs import GroupCollator, GroupedRewardTrainer, group_pairs
from tests.toy import save_toy


def test_groups_and_batch_by_hand() -> None:
    """Prompt p with answers a > b, a > c; q with d > e, which stands twice.

    Broken by places that begin anew with each prompt, by weights of 1 / pairs of the batch, and by
    one row for both copies of d > e."""
    a, b, c, d, e = [1, 2, 3], [1, 2], [1, 4], [5], [6, 7]
    rows = [("p", a, b), ("q", d, e), ("p", a, c), ("q", d, e)]
    names = "prompt", "chosen_ids", "rejected_ids"
    groups = group_pairs(Dataset.from_list([dict(zip(names, r, strict=True)) for r in rows]))
    p, q, again = list(groups)
    assert p == {"answers": [a, b, c], "better": [0, 0], "worse": [1, 2]}
    assert q == again == {"answers": [d, e], "better": [0], "worse": [1]}
    batch = {name: grid.tolist() for name, grid in GroupCollator(9)([p, q]).items()}
    assert batch["input_ids"] == [[1, 2, 3], [1, 2, 9], [1, 4, 9], [5, 9, 9], [6, 7, 9]]
    assert batch["attention_mask"] == [[1, 1, 1], [1, 1, 0], [1, 1, 0], [1, 0, 0], [1, 1, 0]]
    assert batch["better"] == [0, 0, 3] and batch["worse"] == [1, 2, 4]
    assert batch["weight"] == [0.25, 0.25, 0.5]


def test_margins_are_asked_for_so_many_times() -> None:
    """None, as given, twice. Broken by the margins as given whatever was asked."""
    pairs = rankings(margin=True).add_column("kind", ["x"] * 12)
    assert set(learned(pairs, 0.0).column_names) == {"prompt", "chosen", "rejected"}
    for times in (1.0, 2.0):
        asked = learned(pairs, times)
        assert set(asked.column_names) == {"prompt", "chosen", "rejected", "margin"}
        assert asked["margin"] == pytest.approx([times * margin for margin in pairs["margin"]])


def rankings(margin: bool) -> Dataset:
    """Four prompts, three answers each, in all three pairs."""
    rows = []
    for n in range(4):
        answers = [f"{word} {n}" for word in ("There are many", "Some", "No")]
        for i, j in ((0, 1), (0, 2), (1, 2)):
            said = [[{"role": "assistant", "content": answers[place]}] for place in (i, j)]
            row = {"prompt": [{"role": "user", "content": f"How many {n}?"}]}
            row |= {"chosen": said[0], "rejected": said[1]}
            rows.append(row | ({"margin": 0.5 * (j - i) + n} if margin else {}))
    return Dataset.from_list(rows)


@pytest.mark.parametrize("margin", [False, True])
@pytest.mark.parametrize("centre", [None, 0.01])
def test_equal_to_trl(tmp_path: Path, margin: bool, centre: float | None) -> None:
    """Loss and gradients of three prompts of three pairs are those of nine pairs, to rounding.

    Broken by leaving the margin out, by a sum in place of the mean, by half of the centring."""
    toy = save_toy(tmp_path / "toy")
    tokenizer = load_tokenizer(toy)
    found: list[tuple[float, list[torch.Tensor], dict[str, list[float]]]] = []
    for kind, batch_size in ((RewardTrainer, 9), (GroupedRewardTrainer, 3)):
        torch.manual_seed(0)
        model = AutoModelForSequenceClassification.from_pretrained(toy, num_labels=1)
        args = RewardConfig(
            output_dir=str(tmp_path),
            per_device_train_batch_size=batch_size,
            center_rewards_coefficient=centre,
            activation_checkpointing=False,
            use_cpu=True,
            bf16=False,
            report_to="none",
        )
        trainer: Any = kind(
            model=model, args=args, train_dataset=rankings(margin), processing_class=tokenizer
        )
        rows = [trainer.train_dataset[place] for place in range(batch_size)]
        names = ("chosen_ids", "rejected_ids", "answers", "better", "worse", "margin")
        rows = [{k: v for k, v in row.items() if k in names} for row in rows]
        model.train()  # TRL logs by it
        loss = trainer.compute_loss(model, trainer.data_collator(rows))
        loss.backward()
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        found.append((loss.item(), gradients, dict(trainer._metrics["train"])))
    (theirs, their_gradients, their_log), (ours, our_gradients, our_log) = found
    assert ours == pytest.approx(theirs, abs=1e-6)
    for name in ("accuracy", "margin", "min_reward", "max_reward"):
        assert our_log[name] == pytest.approx(their_log[name], abs=1e-6), name
    for one, other in zip(our_gradients, their_gradients, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-4)

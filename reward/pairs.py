"""All pairs of a prompt in one batch element: no answer is read twice for its pairs.

Of K ranked answers InstructGPT trains on all pairs at once (Ouyang et al. 2022, arXiv:2203.02155,
section 3.5): K answers are read in place of K (K - 1), and an answer's pairs share one step. The
loss is the mean over a prompt's pairs, then over prompts; where all prompts have equally many
pairs that is the mean over pairs, TRL's.
"""

import json
from collections import Counter
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from torch.nn.functional import logsigmoid
from trl import RewardTrainer

from common.batches import pad


def group_pairs(pairs: Dataset) -> Dataset:
    """A row for each prompt, of rows with `prompt`, `chosen_ids`, `rejected_ids` and any `margin`.

    A pair that stands there several times, as a mixture's weights will have it, stands in as many
    rows. Two pairs (a, b), (a, c) of one prompt become
    `{"answers": [a, b, c], "better": [0, 0], "worse": [1, 2]}`.

    Returns:
        rows with `answers` (lists of ids), `better` and `worse` (places among the answers) and, if
        the pairs have one, `margin`, in order of the prompts' first pairs.
    """
    groups: dict[Any, dict[str, list[Any]]] = {}
    seen: Counter[str] = Counter()
    for pair in pairs:
        ids = pair["chosen_ids"], pair["rejected_ids"]
        same = json.dumps([pair["prompt"], ids])
        seen[same] += 1
        group = groups.setdefault(
            (json.dumps(pair["prompt"]), seen[same]), {"answers": [], "better": [], "worse": []}
        )
        for side, answer in zip(("better", "worse"), ids, strict=True):
            if answer not in group["answers"]:
                group["answers"].append(answer)
            group[side].append(group["answers"].index(answer))
        if "margin" in pair:
            group.setdefault("margin", []).append(pair["margin"])
    return Dataset.from_list(list(groups.values()))


class GroupCollator:
    """Rows of `group_pairs` to one batch of A answers and P pairs of them."""

    def __init__(self, pad_token_id: int) -> None:
        self.pad_token_id = pad_token_id

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        """Pad and number.

        Returns:
            `input_ids` and `attention_mask` (A, T) int64; `better`, `worse` (P,) int64, places
            among the A; `weight` (P,), a prompt's sum to 1 / prompts; `margin` (P,) where given.
        """
        answers: list[list[int]] = []
        columns: dict[str, list[Any]] = {"better": [], "worse": [], "weight": [], "margin": []}
        for row in rows:
            for side in ("better", "worse"):
                columns[side] += [len(answers) + place for place in row[side]]
            columns["weight"] += [1 / len(row["better"]) / len(rows)] * len(row["better"])
            columns["margin"] += row.get("margin", [])
            answers += row["answers"]
        ids, mask = pad(answers, self.pad_token_id, "right", torch.device("cpu"))
        batch = {name: torch.tensor(values) for name, values in columns.items() if values}
        return {"input_ids": ids, "attention_mask": mask} | batch


class GroupedRewardTrainer(RewardTrainer):
    """TRL's trainer on prompts with all their pairs; `per_device_train_batch_size` counts prompts.

    Takes the same rows, margins and `center_rewards_coefficient`.
    """

    # transformers types these as optional or as one of many
    args: Any
    model: Any
    _signature_columns: Any

    def __init__(self, **named: Any) -> None:
        named["data_collator"] = GroupCollator(int(named["processing_class"].pad_token_id))
        super().__init__(**named)

    def _prepare_dataset(self, dataset: Any, *arguments: Any) -> Dataset:
        """TRL's ids, less what is too long, by prompts."""
        return group_pairs(super()._prepare_dataset(dataset, *arguments))

    def _set_signature_columns_if_needed(self) -> None:
        self._signature_columns = ["answers", "better", "worse", "margin"]

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """The weighted loss of all pairs, and what TRL logs.

        -log sigmoid(better - worse - margin), with `center_rewards_coefficient` times
        (better + worse)^2 (Eisenstein et al. 2023, arXiv:2312.09244).
        """
        outputs = model(
            input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], use_cache=False
        )
        scores = outputs.logits[:, 0].float()
        better, worse = scores[inputs["better"]], scores[inputs["worse"]]
        losses = -logsigmoid(better - worse - inputs.get("margin", 0.0))
        if self.args.center_rewards_coefficient is not None:
            losses = losses + self.args.center_rewards_coefficient * (better + worse) ** 2
        loss = (losses * inputs["weight"]).sum()
        self._log_scores(scores.detach(), better.detach(), worse.detach(), inputs)
        return (loss, outputs) if return_outputs else loss

    def _log_scores(
        self, scores: Tensor, better: Tensor, worse: Tensor, inputs: dict[str, Tensor]
    ) -> None:
        """TRL's figures; processes have different numbers of answers, so each gives its own."""
        mode = "train" if self.model.training else "eval"
        tokens = inputs["attention_mask"].sum().float()
        right = ((better > worse) * inputs["weight"]).sum()
        margin = ((better - worse) * inputs["weight"]).sum()
        local = torch.stack([scores.min(), scores.mean(), scores.max(), right, margin, tokens])
        figures = self.accelerator.gather(local[None])  # (processes, 6)
        if mode == "train":
            self._total_train_tokens += int(figures[:, 5].sum())
        metrics = self._metrics[mode]
        metrics["num_tokens"] = [self._total_train_tokens]
        metrics["min_reward"].append(figures[:, 0].min().item())
        metrics["max_reward"].append(figures[:, 2].max().item())
        for name, column in (("mean_reward", 1), ("accuracy", 3), ("margin", 4)):
            metrics[name].append(figures[:, column].mean().item())

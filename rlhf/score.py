"""A reward model as a reward function on token ids.

TRL decodes completions and tokenizes them again for the reward model; EOS is lost on the way, so
the model reads another last token than the one it learned to judge. Here it gets the very tokens.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from common.batches import pad
from common.errors import LocalError, UserError
from common.reward_gpt import LogprobHead
from rlhf.ensemble import Ensemble

RewardFunc = str | PreTrainedModel | Ensemble | Callable[..., list[float | None]]


def load_reward_model(path: str, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """Load a scalar sequence-classification model whose tokenizer is the policy's."""
    theirs = AutoTokenizer.from_pretrained(path)
    same = theirs.get_vocab() == tokenizer.get_vocab()
    if not same or theirs.chat_template != tokenizer.chat_template:
        raise UserError(
            f"the reward model {path} has another {'chat template' if same else 'vocabulary'} than "
            "the policy: train it on the policy's tokenizer"
        )
    return AutoModelForSequenceClassification.from_pretrained(
        path, num_labels=1, dtype=torch.float32
    )


def turn_suffix(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What the chat template writes after the EOS of the last answer, often nothing or a newline.

    The reward model saw it in training, and reads its score there; the policy stops at EOS.
    """
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    encoded: Any = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True)
    ids = encoded["input_ids"]
    eos = tokenizer.eos_token_id
    return ids[len(ids) - ids[::-1].index(eos) :] if eos in ids else []


class TokenScorer:
    """A reward function in TRL's protocol that scores token ids with a reward model.

    PPO passes the prompts' token ids as the extra column `prompt_ids`; TRL's other trainers don't,
    there the prompts are tokenized as TRL does it. `offset` is taken off `model`'s own scores.
    """

    offset = 0.0

    def __init__(
        self,
        model: Any,
        tokenizer: PreTrainedTokenizerBase,
        suffix: list[int],
        batch_size: int,
        device: torch.device | str = "cpu",
    ):
        if not isinstance(getattr(model, "score", None), torch.nn.Linear):
            raise UserError(
                f"the reward model {type(model).__name__} has no linear `score` head: "
                "pass a Python function that calls it"
            )
        model.config.pad_token_id = tokenizer.pad_token_id  # where it looks for the last token
        self.model = model.to(device).eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.suffix = suffix
        self.batch_size = batch_size
        self.__name__ = "reward_model"  # which one is the trainer's to say

    def __call__(
        self,
        completion_ids: list[list[int]],
        prompt_ids: list[list[int]] | None = None,
        prompts: list[Any] | None = None,
        **_: object,
    ) -> list[float]:
        """Scores, one per completion."""
        if prompt_ids is None:
            prompt_ids = [self.tokenize(prompt) for prompt in prompts or []]
        rows = [self.tokens(p, c) for p, c in zip(prompt_ids, completion_ids, strict=True)]
        order = sorted(range(len(rows)), key=lambda i: -len(rows[i]))
        scores = [0.0] * len(rows)
        for start in range(0, len(rows), self.batch_size):
            batch = order[start : start + self.batch_size]
            starts = [len(prompt_ids[i]) for i in batch]
            found = self._score([rows[i] for i in batch], starts).tolist()
            for i, score in zip(batch, found, strict=True):
                scores[i] = score
        if not all(map(math.isfinite, scores)):
            raise LocalError("the reward model gives scores that are no numbers: train it anew")
        return scores

    def tokenize(self, prompt: Any) -> list[int]:
        """A prompt's ids, text or messages, the assistant's turn opened."""
        if isinstance(prompt, str):
            return self.tokenizer(prompt)["input_ids"]
        ids: Any = self.tokenizer.apply_chat_template(
            prompt, add_generation_prompt=True, return_dict=False
        )
        return ids

    def tokens(self, prompt: list[int], completion: list[int]) -> list[int]:
        """The sequence as `RewardTrainer` would have tokenized it, cut where the policy was."""
        finished = completion[-1] == self.tokenizer.eos_token_id
        return prompt + completion + (self.suffix if finished else [])

    @torch.no_grad()
    def _score(self, rows: list[list[int]], starts: list[int]) -> Tensor:
        """Score a batch at each row's last token, (b,) float32; padding at the right is unseen.

        `starts` are the answers' first places: one may hold the token that opens an answer.
        """
        ids, _ = pad(rows, self.tokenizer.pad_token_id, "right", self.model.device)
        where = (
            {"starts": torch.tensor(starts, device=ids.device)}
            if isinstance(self.model, LogprobHead)
            else {}
        )
        return self.model(input_ids=ids, use_cache=False, **where).logits[:, 0].float()


class EnsembleScorer(TokenScorer):
    """`TokenScorer` for several models; the critic starts from the first of them."""

    def __init__(self, ensemble: Ensemble, *rest: Any) -> None:
        self.ensemble = ensemble
        self.scorers = [TokenScorer(model, *rest) for model in ensemble.members]
        super().__init__(ensemble.members[0], *rest)
        self.offset = ensemble.offsets[0]

    def _score(self, rows: list[list[int]], starts: list[int]) -> Tensor:
        """(b,) float32, the members' scores as one."""
        scores = torch.stack([scorer._score(rows, starts) for scorer in self.scorers])  # (M, b)
        return self.ensemble.combine(scores)


def as_function(
    func: RewardFunc,
    tokenizer: PreTrainedTokenizerBase,
    suffix: list[int],
    batch_size: int,
    device: torch.device | str = "cpu",
) -> Any:
    """Reward models, or the path to one, as a function on token ids; functions as they are."""
    if isinstance(func, str):
        func = load_reward_model(func, tokenizer)
    if isinstance(func, PreTrainedModel):
        return TokenScorer(func, tokenizer, suffix, batch_size, device)
    if isinstance(func, Ensemble):
        return EnsembleScorer(func, tokenizer, suffix, batch_size, device)
    return func

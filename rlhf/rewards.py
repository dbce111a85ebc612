"""Rewards by their names in a configuration.

    reward: out/arden/reward                     a reward model's directory
    reward: my_rewards.py:brevity                a function in a file
    reward: [out/arden/reward, my_package.rewards:brevity]
    reward_weights: [1.0, 0.1]

A function follows TRL's protocol: `f(prompts, completions, completion_ids, **rest)` gives one
number a completion, or None where it has nothing to say. A weight of 0 makes a reward a held-out
measure: logged, never trained on. With `disagreement_penalty` several reward models are one reward
(rlhf/ensemble.py).
"""

import asyncio
import contextlib
import functools
import hashlib
import importlib
import importlib.util
import inspect
import math
import statistics
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerState

from common.batches import render
from common.errors import LocalError, UserError
from common.generation import Drawn
from common.rows import assistant
from rlhf.ensemble import Ensemble
from rlhf.score import as_function, turn_suffix

Reward = PreTrainedModel | Ensemble | Callable[..., list[float | None]]
GIVEN = ("prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric")
BY_NAME = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
Scorer = Callable[[Sequence[dict[str, Any]], Sequence[Drawn]], list[float]]  # of rows, answers


def is_function(name: str) -> bool:
    """Whether a reward's name is that of a Python function, `module:function` or a file's."""
    return name.rpartition(":")[2].isidentifier() and ":" in name


def is_model(reward: Any) -> bool:
    """Whether a reward is a model, or several as one, and not a function."""
    return isinstance(reward, PreTrainedModel | Ensemble)


def find_module(name: str) -> ModuleSpec:
    """Where the function that `module:function` or `path.py:function` names is defined.

    Raises:
        UserError: no such file or module.
    """
    place = name.rpartition(":")[0]
    if place.endswith(".py"):
        if not Path(place).exists():
            raise UserError(f"reward ({name}): there is no file {place}")
        found = importlib.util.spec_from_file_location(Path(place).stem, Path(place).absolute())
    else:
        try:
            found = importlib.util.find_spec(place)
        except (ImportError, ValueError) as error:  # a relative name, or that of a script that runs
            raise UserError(f"reward ({name}): {error}") from error
    if found is None:
        raise UserError(f"reward ({name}): no module {place}")
    return found


def load_function(name: str, kept: Sequence[str] = ()) -> Callable[..., list[float | None]]:
    """The function that `module:function` or `path.py:function` names.

    Args:
        name: as in a configuration.
        kept: columns of the data that it is given beside `GIVEN`.

    Raises:
        UserError: no such file or module, no such function in it, or one for other arguments.
    """
    place, _, function = name.rpartition(":")
    spec: Any = find_module(name)
    with one_line(name):
        if place.endswith(".py"):
            module = importlib.util.module_from_spec(spec)
            sys.modules.setdefault(spec.name, module)
            spec.loader.exec_module(module)
        else:
            module = importlib.import_module(place)
    found = getattr(module, function, None)
    if not callable(found):
        near = [n for n, value in vars(module).items() if callable(value) and n[0] != "_"]
        raise UserError(f"reward ({name}): {place} has no function {function}, but {near}")
    require_arguments(name, found, kept)
    return checked(name, found)


def require_arguments(name: str, function: Callable[..., Any], kept: Sequence[str]) -> None:
    """Refuse a function that cannot be called by name with `GIVEN` and the columns that are kept.

    Raises:
        UserError: it asks for more, or does not take all; with the cure.
    """
    parameters = inspect.signature(function).parameters.values()
    given, rest = [*GIVEN, *kept], [p for p in parameters if p.kind == p.VAR_KEYWORD]
    named = {p.name: p.default is p.empty for p in parameters if p.kind in BY_NAME}
    asked = [argument for argument, must in named.items() if must and argument not in given]
    if asked:
        raise UserError(
            f"reward ({name}) asks for {', '.join(asked)}: a column of the data is given where it "
            f"is kept, keep_columns: [{', '.join([*kept, *asked])}]"
        )
    left = [argument for argument in given if argument not in named]
    if left and not rest:
        raise UserError(f"reward ({name}) takes no {left[0]}: let it end in **rest")


@contextlib.contextmanager
def one_line(name: str, cure: str = "") -> Iterator[None]:
    """What goes wrong in the code of the reward `name`, with its place, as a `LocalError`.

    `cure` is added where a key is missing.
    """
    try:
        yield
    except Exception as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        said = " ".join(f"{type(error).__name__}: {error}".split())
        raise LocalError(
            f"reward ({name}) fails at {place.filename}, line {place.lineno}: {said}"
            + (cure if isinstance(error, KeyError) else "")
        ) from error


def checked(name: str, function: Callable[..., Any]) -> Callable[..., list[float | None]]:
    """The function, its scores looked at: one finite number, or None, for each completion.

    It reads a sampled answer as a measured one, without the space that the chat template sets
    before it.
    """

    @functools.wraps(function)
    def score(completions: list[Any], **columns: Any) -> list[float | None]:
        texts = [[m | {"content": m["content"].removeprefix(" ")} for m in c] for c in completions]
        with one_line(name, "; a column of the data is kept by keep_columns: [..]"):
            given = function(completions=texts, **columns)
            found = list(asyncio.run(given) if inspect.iscoroutine(given) else given)
            scores = [None if value is None else float(value) for value in found]
        wrong = [value for value in scores if value is not None and not math.isfinite(value)]
        if wrong or len(scores) != len(completions):
            said = f"{wrong[0]}" if wrong else f"{len(scores)} scores"
            raise LocalError(
                f"reward ({name}) gives {said} for {len(completions)} completions: expected a "
                "finite number, or None, for each"
            )
        return scores

    return score


def hash_function(name: str) -> str:
    """sha256, hex, of the file in which a function named in a configuration stands.

    A changed line anywhere in it is another reward; files that it imports are not looked at.
    """
    spec = find_module(name)
    source = Path(spec.origin).read_bytes() if spec.has_location and spec.origin else b""
    return hashlib.sha256(source).hexdigest()


def tell_apart(rewards: Sequence[Any]) -> list[str]:
    """Names of rewards for logs: as much of a folder's or a module's as tells them apart.

    `reward` for `out/arden/reward` alone, `arden/reward` and `arden-1/reward` beside another.
    """
    paths = [_path(reward) for reward in rewards]
    names = [path[-1] for path in paths]
    for depth in range(2, 1 + max(map(len, paths))):
        alike = [name for name in names if names.count(name) > 1]
        names = [
            "/".join(path[-depth:]) if name in alike else name
            for path, name in zip(paths, names, strict=True)
        ]
    return [f"{n}_{i}" if names.count(n) > 1 else n for i, n in enumerate(names, start=1)]


def _path(reward: Any) -> list[str]:
    """A reward's name in parts, from the outermost."""
    if isinstance(reward, Ensemble):
        return ["ensemble"]
    if isinstance(reward, PreTrainedModel):
        reward = reward.config.name_or_path
    if isinstance(reward, str):
        return reward.strip("/").split("/") if reward else ["reward_model"]
    return [*reward.__module__.split("."), reward.__name__]


def weigh(rewards: Sequence[Any], weights: list[float] | None) -> list[float]:
    """A weight for each of the rewards (or of their names), 1 where none are given.

    Raises:
        UserError: more or fewer weights than rewards, or all of them 0.
    """
    weights = weights or [1.0] * len(rewards)
    if len(weights) != len(rewards):
        raise UserError(f"reward_weights ({weights}) must be one for each of {rewards}")
    if not any(weights):
        raise UserError(f"reward_weights ({weights}): one at least must not be 0")
    return weights


def score_answers(
    functions: Sequence[Callable[..., Sequence[float | None]]],
    weights: Sequence[float],
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[dict[str, Any]],
    answers: Sequence[Drawn],
) -> list[float]:
    """The weighted sum of what the functions say of each answer, of the ids that were drawn.

    Args:
        functions, weights: what is summed; a None counts as 0 beside another's number.
        tokenizer: the policy's.
        rows: what is answered, `prompt` and the further columns that functions get.
        answers: one to each row.

    Returns:
        the sums; NaN where no reward of any weight has a number, as training leaves that out.
    """
    prompts = [row["prompt"] for row in rows]
    columns: dict[str, Any] = {name: [row[name] for row in rows] for name in rows[0]} | {
        "prompts": prompts,
        "prompt_ids": render(tokenizer, prompts, ask=True),
        "completions": [[assistant(answer.text)] for answer in answers],
        "completion_ids": [answer.ids for answer in answers],
        "trainer_state": TrainerState(),
        "log_extra": lambda column, values: None,
        "log_metric": lambda name, value: None,
    }
    del columns["prompt"]
    totals, scored = [0.0] * len(rows), [False] * len(rows)
    for function, weight in zip(functions, weights, strict=True):
        scores = function(**columns)
        totals = [t + weight * (s or 0.0) for t, s in zip(totals, scores, strict=True)]
        if weight:
            scored = [known or s is not None for known, s in zip(scored, scores, strict=True)]
    return [t if known else math.nan for t, known in zip(totals, scored, strict=True)]


def make_scorer(
    rewards: Sequence[Reward],
    weights: Sequence[float],
    tokenizer: PreTrainedTokenizerBase,
    batch_size: int,
    device: torch.device,
) -> Scorer:
    """`score_answers` by rewards as training has them: models read the same ids.

    Args:
        rewards, weights, tokenizer: models and functions, and as of `score_answers`.
        batch_size, device: of the models.
    """
    suffix = turn_suffix(tokenizer)
    functions = [as_function(reward, tokenizer, suffix, batch_size, device) for reward in rewards]

    def score(rows: Sequence[dict[str, Any]], answers: Sequence[Drawn]) -> list[float]:
        return score_answers(functions, weights, tokenizer, rows, answers)

    return score


def find_scorable(rewards: Tensor, weights: Tensor) -> Tensor:
    """Which completions some reward of any weight has a number for, (N,) bool.

    Args:
        rewards: (N, F) of N completions by F rewards, NaN for a None.
        weights: (F,); what has weight 0 is only measured.
    """
    return ~rewards[:, weights != 0].isnan().all(1)


def known_scores(scores: list[float]) -> list[float]:
    """Those of `score_answers` that are a number."""
    return [score for score in scores if not math.isnan(score)]


def mean_score(scores: list[float]) -> float:
    """Of those that are a number; NaN if none is."""
    known = known_scores(scores)
    return statistics.fmean(known) if known else math.nan

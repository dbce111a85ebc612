"""Ranked answers, a step of its own: sampled from a model, put in order by a labeller.

    make rankings
    python -m reward.collect --config configs/arden/reward.yaml --labeller out/other/reward

    make rankings PROFILE=own DATA=questions.jsonl ARGS="--labeller people"

Leaves `<split>.jsonl` with the pairs, and in `checkpoints/` every prompt with its answers, some
prompts a file: a killed run goes on after the last of them. Where people are to rank it leaves
`answers.jsonl` in place of pairs, whatever the format of the data: with a list `scores` added to
each row that is a file of rankings, as `data` or as `labeller`. The reward stage collects by itself
what is missing.
"""

import json
from collections.abc import Callable, Iterable
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from tqdm.auto import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification
from trl import RewardConfig

import common.reward_gpt  # noqa: F401 - so that Auto classes load our GPT, also as labeller
from common.artifacts import StageOutput, hash_model, require_kind, require_parent, write_text
from common.batches import Chat, render
from common.config import config_values, parse_config, run
from common.errors import UserError
from common.generation import answered, generate_answers
from common.lengths import leave_room
from common.rows import assistant
from common.scoring import score_chats
from common.stage import TRAINER_DEFAULTS
from common.tasks import Task, load_task, open_task
from common.tokenizer import load_tokenizer
from reward.config import BY_DATA, BY_PEOPLE, RankingConfig, RewardModelConfig

EVALUATED_ON = "dev"  # while training
SHARD = 256  # prompts whose answers are kept together
NOTHING_TO_RANK = (
    "the policy gives no prompt two different answers with something in them, so there is nothing "
    "to rank: raise samples_per_prompt, or train it further"
)
# What decides the rankings; `evaluate_on` does not, each split has a file of its own.
IDENTITY = (
    *(
        "data",
        "columns",
        "plays",
        "realm_seed",
        "realm_people",
        "validation_fraction",
        "skip_faulty_rows",
    ),
    *("policy", "prompts", "eval_prompts", "samples_per_prompt", "max_new_tokens", "labeller"),
    "noise",
)

Prompts = list[str] | list[Chat]


def main() -> None:
    """Collect the rankings that the reward stage of the same configuration takes."""
    config, args = parse_config(RewardModelConfig, RewardConfig, defaults=TRAINER_DEFAULTS)
    folder = config.folder(args.output_dir)
    if config.labeller == BY_PEOPLE:
        path = collect_answers(config, args, open_task(config), folder)
        count = len(read_rows(path))
        print(f"rankings: {path}, {count:,} prompts: add a list `scores` to each, then give it as")
        print(f"  make reward ... DATA={path}")
        return
    collect(config, args, open_task(config), folder)
    for path in sorted(folder.glob("*.jsonl")):
        print(f"rankings: {path}, {len(read_rows(path)):,} pairs")


def collect(config: RankingConfig, args: RewardConfig, task: Task, folder: Path) -> None:
    """Write `folder/<split>.jsonl` for train and evaluation, unless a run before this one did.

    A trainer that evaluates on its way does so on `dev`: what it stops by is no longer held out.
    Nothing of what is there goes before the rows that replace it have been read.

    Raises:
        UserError: the policy is missing, or the folder holds rankings of another configuration.
    """
    if config.labeller == BY_PEOPLE:
        raise UserError(
            "labeller people: let `make rankings` write answers.jsonl, give each of its rows "
            "`scores`, and train on that file: --data answers.jsonl --labeller data"
        )
    output = open_rankings(config, task, folder)
    counts = {"train": config.prompts, config.evaluate_on: config.eval_prompts}
    if args.eval_strategy != "no":
        counts[EVALUATED_ON] = config.eval_prompts
    for split, count in counts.items():
        path = folder / f"{split}.jsonl"
        if output.replaces or not path.exists():
            sample = partial(draw_answers, config, args.device, output, split)
            rows = label(config, task, sample, split, count, args.device)
            output.start()
            write_rows(path, rows)
    output.settle()


def collect_answers(config: RankingConfig, args: RewardConfig, task: Task, folder: Path) -> Path:
    """Write `folder/answers.jsonl`: prompts to train on and held out, each with several answers.

    Whoever reads the file with its scores holds the same prompts out.

    Raises:
        UserError: as `collect`; people have scored what would go; there is nothing to rank.
    """
    output, path = open_rankings(config, task, folder), folder / "answers.jsonl"
    if path.exists():
        if not output.replaces:
            return path
        if '"scores"' in path.read_text(encoding="utf-8"):
            raise UserError(
                f"{path} has scores by now, which nothing brings back: move it elsewhere, or give "
                "another --rankings"
            )
    rows = []
    for split in ("train", "dev", "test"):
        count = config.prompts if split == "train" else config.eval_prompts
        prompts = list(task.prompt_rows(split, count)["prompt"])
        answers = draw_answers(config, args.device, output, split, prompts)
        rows += [
            {"prompt": prompt, "answers": different(several)}
            for prompt, several in zip(prompts, answers, strict=True)
        ]
    ranked = [row for row in rows if len(row["answers"]) > 1]
    if not ranked:
        raise UserError(NOTHING_TO_RANK)
    if len(ranked) < len(rows):
        left_out = len(rows) - len(ranked)
        print(f"rankings: {left_out:,} of {len(rows):,} prompts have no two different answers")
    write_rows(path, ranked)
    return path


def open_rankings(config: RankingConfig, task: Task, folder: Path) -> StageOutput:
    """The folder, and whether what it holds is of this configuration.

    Raises:
        UserError: as `collect`.
    """
    policy = hash_model(require_parent(config.policy, config.parent_command))
    sources = {"policy": policy, "data": task.fingerprint(), **hash_labeller(config)}
    values = {name: value for name, value in config_values(config).items() if name in IDENTITY}
    return StageOutput(str(folder), values, sources, config.overwrite)


def hash_labeller(config: RankingConfig) -> dict[str, str]:
    """What a run is of beside its data: the labeller's hash, where the data has not its own.

    Raises:
        UserError: it is a model that does not score.
    """
    if config.labeller in (BY_DATA, BY_PEOPLE):
        return {}
    if config.labeller_is_model:
        require_kind(Path(config.labeller), scores=True)
        return {"labeller": hash_model(Path(config.labeller))}
    return {"labeller": open_ranked(config).fingerprint()}


def open_ranked(config: RankingConfig) -> Task:
    """The file, folder or mixture of rankings that the labeller is."""
    return load_task(
        config.labeller,
        columns=config.columns,
        validation_fraction=config.validation_fraction,
        skip_faulty_rows=config.skip_faulty_rows,
    )


def draw_answers(
    config: RankingConfig, device: torch.device, output: StageOutput, split: str, prompts: Prompts
) -> list[list[str]]:
    """`samples_per_prompt` answers by the policy to each prompt, at temperature 1.

    None to one that leaves no room for them in the policy's context. They are kept in `output`,
    which starts with them.

    Raises:
        UserError: the policy is a reward model, or no prompt leaves room.
    """
    require_kind(Path(config.policy), scores=False)
    policy: Any = AutoModelForCausalLM.from_pretrained(config.policy, dtype=torch.float32)
    tokenizer, longest = load_tokenizer(config.policy), config.max_new_tokens
    context = policy.config.max_position_embeddings
    fitting = leave_room(prompts, tokenizer, context, longest)
    if len(fitting) < len(prompts):
        print(
            f"rankings, {split}: {len(fitting):,} of {len(prompts):,} prompts leave room for "
            f"{longest} tokens of answer in the policy's context ({context:,})"
        )
    if not fitting:
        raise UserError(
            f"no prompt leaves max_new_tokens ({longest}) for an answer in the policy's context "
            f"({context:,}): shorten answers or prompts"
        )
    sample = partial(
        generate_answers,
        policy.to(device),
        tokenizer,
        max_new_tokens=longest,
        temperature=1.0,
        samples=config.samples_per_prompt,
    )
    output.start()
    shards = keep_shards(sample, output.checkpoints, split)
    drawn = dict(zip(fitting, shards([prompts[place] for place in fitting]), strict=True))
    return [drawn.get(place, []) for place in range(len(prompts))]


def keep_shards(sample: Callable[..., list[list[str]]], folder: Path, split: str) -> Any:
    """`sample`, with its answers in `folder/<split>-<number>.jsonl`, from where they are taken.

    A shard's seed is its number, so that what a killed run had left does not matter.
    """

    def answer(prompts: Prompts) -> list[list[str]]:
        answers: list[list[str]] = []
        for first in tqdm(range(0, len(prompts), SHARD), desc=f"answers, {split}"):
            number = first // SHARD
            path = folder / f"{split}-{number:05d}.jsonl"
            asked = prompts[first : first + SHARD]
            rows = read_rows(path) if path.exists() else []
            if [row["prompt"] for row in rows] != asked:  # none, or other code's
                rows = [
                    {"prompt": prompt, "answers": several}
                    for prompt, several in zip(asked, sample(asked, seed=number), strict=True)
                ]
                write_rows(path, rows)
            answers += [row["answers"] for row in rows]
        return answers

    return answer


def label(
    config: RankingConfig, task: Task, sample: Any, split: str, count: int, device: torch.device
) -> Dataset:
    """`prompt`, `chosen`, `rejected`, `kind`, `flipped` rows, as the labeller puts them."""
    if config.labeller == BY_DATA:
        return task.rankings(sample, split, count, config.noise)
    if not config.labeller_is_model:
        unused = "data, prompts and samples_per_prompt are not used"
        print(f"rankings, {split}: those of {config.labeller}; {unused}")
        return open_ranked(config).rankings(sample, split, count, config.noise)
    prompts = list(task.prompt_rows(split, count)["prompt"])
    context = AutoConfig.from_pretrained(config.labeller).max_position_embeddings
    kept = leave_room(prompts, load_tokenizer(config.labeller), context, config.max_new_tokens)
    if len(kept) < len(prompts):
        said = f"{len(kept):,} of {len(prompts):,} prompts and {config.max_new_tokens} tokens of"
        print(f"rankings, {split}: {said} answer fit into the labeller's context ({context:,})")
    if not kept:
        raise UserError(
            f"no prompt with an answer of max_new_tokens ({config.max_new_tokens}) fits into the "
            f"context of labeller {config.labeller} ({context:,}): shorten answers or prompts"
        )
    prompts = [prompts[place] for place in kept]
    return rank_by_model(config.labeller, prompts, sample(prompts), device)


def rank_by_model(
    labeller: str, prompts: list[Chat], answers: list[list[str]], device: torch.device
) -> Dataset:
    """Every two different answers to a prompt, the one that the reward model scores higher chosen.

    Answers beyond its context are left out, and counted: its tokenizer may read a policy's answer
    as more tokens than were drawn.

    Returns:
        rows with `prompt`, `chosen`, `rejected`, `kind` (by_model), `flipped` (False), and
        `margin`, the difference of the two scores.

    Raises:
        UserError: no prompt has two different answers.
    """
    model: Any = AutoModelForSequenceClassification.from_pretrained(labeller, dtype=torch.float32)
    tokenizer, context = load_tokenizer(labeller), model.config.max_position_embeddings
    distinct = [different(several) for several in answers]
    drawn = sum(map(len, distinct))
    for prompt, several in zip(prompts, distinct, strict=True):
        read = zip(several, render(tokenizer, [answered(prompt, a) for a in several]), strict=True)
        several[:] = [answer for answer, ids in read if len(ids) <= context]
    if left_out := drawn - sum(map(len, distinct)):
        said = f"{left_out:,} of {drawn:,} different answers do not fit into the labeller's context"
        print(f"rankings: {said} ({context:,})")
    chats = [
        answered(prompt, answer)
        for prompt, several in zip(prompts, distinct, strict=True)
        for answer in several
    ]
    scores = iter(score_chats(model.to(device), tokenizer, chats))
    rows = []
    for prompt, several in zip(prompts, distinct, strict=True):
        scored = sorted(((next(scores), answer) for answer in several), reverse=True)
        for (high, better), (low, worse) in combinations(scored, 2):
            if high > low:
                rows.append(
                    {
                        "prompt": prompt,
                        "chosen": [assistant(better)],
                        "rejected": [assistant(worse)],
                        "kind": "by_model",
                        "flipped": False,
                        "margin": high - low,
                    }
                )
    if not rows:
        raise UserError(NOTHING_TO_RANK)
    return Dataset.from_list(rows)


def different(answers: list[str]) -> list[str]:
    """Each answer once, and none that is blank, which no file of rankings may have."""
    return list(dict.fromkeys(filter(str.strip, answers)))


def read_rows(path: Path) -> list[dict[str, Any]]:
    """What `write_rows` wrote."""
    lines = path.read_text(encoding="utf-8").split("\n")  # not at U+2028, which JSON may hold
    return [json.loads(line) for line in lines if line]


def write_rows(path: Path, rows: Iterable[Any]) -> None:
    """A line of JSON each, its letters as they are, for people read it."""
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


if __name__ == "__main__":
    run(main)

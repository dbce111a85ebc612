"""Collecting rankings: what a killed run leaves, and who ranks."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForSequenceClassification
from trl import RewardConfig

from common.artifacts import StageOutput, read_json, write_json
from common.batches import render
from common.config import as_flags, parse_config
from common.errors import UserError
from common.scoring import score_chats
from common.tasks import load_task
from common.tokenizer import load_tokenizer
from reward import collect as module
from reward.collect import (
    collect,
    collect_answers,
    draw_answers,
    keep_shards,
    label,
    rank_by_model,
)
from reward.config import RankingConfig
from tests.toy import save_toy

CPU = torch.device("cpu")


def made_up(prompts: list[str], seed: int) -> list[list[str]]:
    return [[f"{prompt} {seed} {n}" for n in range(2)] for prompt in prompts]


def test_a_killed_collection_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three shards of two prompts, killed in the second: it is the only one asked for again, with
    the last, and nothing differs from a run of one piece. Broken by taking the count of shards made
    in this run as the seed."""
    monkeypatch.setattr(module, "SHARD", 2)
    prompts = ["a", "b", "c", "d", "e"]
    asked: list[Any] = []

    def killed(prompts: list[str], seed: int) -> list[list[str]]:
        asked.append((prompts, seed))
        if len(asked) == 2:
            raise KeyboardInterrupt
        return made_up(prompts, seed)

    with pytest.raises(KeyboardInterrupt):
        keep_shards(killed, tmp_path / "a", "train")(prompts)
    resumed = keep_shards(killed, tmp_path / "a", "train")(prompts)
    assert asked == [(["a", "b"], 0), (["c", "d"], 1), (["c", "d"], 1), (["e"], 2)]
    assert resumed == keep_shards(made_up, tmp_path / "b", "train")(prompts)
    assert resumed[4] == ["e 2 0", "e 2 1"]


def test_answers_to_other_prompts_are_not_taken(tmp_path: Path) -> None:
    """Broken by the number of a shard alone: other code's prompts got the answers kept."""
    answer = keep_shards(made_up, tmp_path, "train")
    answer(["a", "b"])
    assert answer(["c", "b", "d"]) == made_up(["c", "b", "d"], 0)


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A policy and, from the same weights, a reward model."""
    path = tmp_path_factory.mktemp("toy")
    save_toy(path / "policy")
    torch.manual_seed(0)
    AutoModelForSequenceClassification.from_pretrained(
        path / "policy", num_labels=1
    ).save_pretrained(path / "reward")
    load_tokenizer(path / "policy").save_pretrained(path / "reward")
    return path


def test_a_reward_model_ranks_all_pairs(toy: Path) -> None:
    """Three answers, one twice and a blank one: three pairs, as their scores have it. Broken by
    rising order, and once by the blank one's pairs, which people are not shown either."""
    prompts = [[{"role": "user", "content": "Who?"}], [{"role": "user", "content": "Where?"}]]
    answers = [["Ann", "Bob", "Bob", " ", "Cleopatra"], ["here", "here", "here", "here"]]
    rows = rank_by_model(str(toy / "reward"), prompts, answers, CPU)
    model = AutoModelForSequenceClassification.from_pretrained(toy / "reward")
    said = ["Ann", "Bob", "Cleopatra"]
    chats = [[*prompts[0], {"role": "assistant", "content": text}] for text in said]
    scores = dict(zip(said, score_chats(model, load_tokenizer(toy / "reward"), chats), strict=True))
    pairs = [(row["chosen"][0]["content"], row["rejected"][0]["content"]) for row in rows]
    assert len(pairs) == len(set(pairs)) == 3
    assert all(scores[better] > scores[worse] for better, worse in pairs)
    with pytest.raises(UserError, match="raise samples_per_prompt"):
        rank_by_model(str(toy / "reward"), prompts[1:], answers[1:], CPU)


def test_a_labeller_of_a_shorter_context(
    toy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Broken once: an IndexError after all was sampled, where positions are learned. And by an
    answer that with its end, or by the labeller's tokenizer, is longer than what was drawn.
    """
    folder, questions = tmp_path / "short", tmp_path / "asked.jsonl"
    shutil.copytree(toy / "reward", folder)
    asked = ["a?"] * 3 + ["b" * 30 + "?"]
    questions.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in asked))
    config = configure(toy, questions, labeller=folder, validation_fraction=0.5)
    task = load_task(str(questions), validation_fraction=0.5)
    prompts = list(task.prompt_rows("train", 9)["prompt"])
    longest, said = max(map(len, render(load_tokenizer(folder), prompts, ask=True))) + 4, ["y", "n"]

    def rank(context: int) -> Dataset:
        settings = read_json(folder / "config.json") | {"max_position_embeddings": context}
        write_json(folder / "config.json", settings)
        return label(config, task, lambda ask: [said for _ in ask], "train", 9, CPU)

    assert len(rank(longest)) == len(prompts)
    assert "labeller's context" not in capsys.readouterr().out
    said.append("yes, " * 9)
    assert len(rank(longest)) == len(prompts)
    assert (
        f"{len(prompts)} of {3 * len(prompts)} different answers do not" in capsys.readouterr().out
    )
    with pytest.raises(UserError, match=r"no prompt with an answer of max_new_tokens \(4\) fits"):
        rank(4)


def configure(toy: Path, data: Path, **fields: Any) -> RankingConfig:
    given = {"model_name_or_path": toy / "policy", "data": data, "max_new_tokens": 4} | fields
    flags = as_flags(given)
    return parse_config(RankingConfig, args=flags)[0]


def test_each_labeller_and_another_configuration(toy: Path, tmp_path: Path) -> None:
    """Broken by leaving the labeller out of the identity: the second run then kept the first's. And
    once by a labeller's file whose columns could not be named."""
    questions, ranked = tmp_path / "asked.jsonl", tmp_path / "ranked.jsonl"
    asked = [{"prompt": f"How many are {n}?"} for n in range(20)]
    questions.write_text("".join(json.dumps(row) + "\n" for row in asked))
    pairs = [row | {"chosen": "There are many.", "rejected": "No."} for row in asked]
    ranked.write_text("".join(json.dumps(row) + "\n" for row in pairs))
    folder = tmp_path / "rankings"
    by_model = {"labeller": toy / "reward", "prompts": 8, "eval_prompts": 1}
    by_model["validation_fraction"] = 0.1

    def run(columns: Any = None, **fields: Any) -> list[dict[str, Any]]:
        config = configure(toy, questions, **fields)
        config.columns = columns
        args = RewardConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False)
        collect(config, args, load_task(str(questions), validation_fraction=0.1), folder)
        return [json.loads(line) for line in (folder / "train.jsonl").open()]

    drawn = run(**by_model)
    assert {row["kind"] for row in drawn} == {"by_model"}
    assert len({row["prompt"][0]["content"] for row in drawn}) == 8
    assert drawn == run(**by_model)
    kept = (folder / "checkpoints" / "train-00000.jsonl").read_text()
    with pytest.raises(UserError, match="holds a run with"):
        run(labeller=ranked, validation_fraction=0.1)
    ranked.write_text(ranked.read_text().replace('"prompt"', '"asked"'))
    columns = {"prompt": "asked"}
    given = run(columns, labeller=ranked, validation_fraction=0.1, overwrite="true")
    assert len(given) == 18 and given[0]["rejected"][0]["content"] == "No."
    shards = [json.loads(line) for line in kept.splitlines()]
    for row in shards:  # a toy may say the same twice
        row["answers"] = [f"{answer} {n}" for n, answer in enumerate(row["answers"])]
    ranked.write_text("".join(json.dumps(row | {"scores": [4, 3, 2, 1]}) + "\n" for row in shards))
    by_hand = run(labeller=ranked, validation_fraction=0.2, overwrite="true")
    first = next(row for row in shards if row["prompt"] == by_hand[0]["prompt"])
    assert by_hand[0]["chosen"][0]["content"] == first["answers"][0]
    with pytest.raises(UserError, match=r"labeller \(nobody\) must be data, people"):
        configure(toy, questions, labeller="nobody")


def test_prompts_without_two_answers_are_counted(
    toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Broken once: left out without a word, and of none an empty file was to be scored."""
    said = ["yes", "no"]
    monkeypatch.setattr(
        module, "draw_answers", lambda *named: [said] + [["", "yes"]] * (len(named[-1]) - 1)
    )
    asked = tmp_path / "asked.jsonl"
    asked.write_text("".join(json.dumps({"prompt": f"Are {n}?"}) + "\n" for n in range(40)))
    config = configure(toy, asked, labeller="people", validation_fraction=0.2)
    args = RewardConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False)
    task, folder = load_task(str(asked), validation_fraction=0.2), tmp_path / "answers"
    path = collect_answers(config, args, task, folder)
    assert len(path.read_text().splitlines()) == 3
    assert "37 of 40 prompts have no two different answers" in capsys.readouterr().out
    said[:] = [" ", "yes"]
    with pytest.raises(UserError, match="there is nothing to rank: raise samples_per_prompt"):
        collect_answers(config, args, task, tmp_path / "none")
    assert not (tmp_path / "none" / "answers.jsonl").exists()


def test_prompts_without_room_for_an_answer(
    toy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In a context of 2,048. Broken once: they were answered beyond it, where a model with learned
    positions has none."""
    output = StageOutput(str(tmp_path / "rankings"), {}, {})
    config = configure(toy, tmp_path / "asked.jsonl", samples_per_prompt=1)
    answers = draw_answers(config, CPU, output, "train", ["Are 1?", "Why? " * 500, "Are 2?"])
    assert [len(several) for several in answers] == [1, 0, 1]
    assert "train: 2 of 3 prompts leave room for 4 tokens" in capsys.readouterr().out
    output = StageOutput(str(tmp_path / "none"), {}, {})
    with pytest.raises(UserError, match=r"no prompt leaves max_new_tokens \(4\) .* \(2,048\)"):
        draw_answers(config, CPU, output, "train", ["Why? " * 500])
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("policy", "labeller", "needed"),
    [("policy", "policy", "a reward model is"), ("reward", "reward", "a language model is")],
)
def test_the_wrong_kind_of_model(
    toy: Path, tmp_path: Path, policy: str, labeller: str, needed: str
) -> None:
    """Broken once: a labeller that does not score, when all was sampled; a reward model as policy
    never, and what a head of noise says was ranked."""
    asked = tmp_path / "asked.jsonl"
    asked.write_text("".join(json.dumps({"prompt": f"Are {n}?"}) + "\n" for n in range(20)))
    config = configure(toy, asked, policy=toy / policy, labeller=toy / labeller)
    args = RewardConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False)
    with pytest.raises(UserError, match=f"{needed} needed here"):
        collect(config, args, load_task(str(asked)), tmp_path / "rankings")
    assert not (tmp_path / "rankings").exists()


def test_answers_for_people_to_rank(toy: Path, tmp_path: Path) -> None:
    """Of prompts alone. Whoever adds scores gets those pairs, and holds out what the prompts'
    reader does. Broken by the prompts to train on alone, by writing over what people added, also
    with `overwrite`, by the folder of the rankings, which then were of another configuration than
    the file in it, by letters written as numbers, and by lines cut at U+2028."""
    questions = tmp_path / "asked.jsonl"
    asked = [{"prompt": f"How many are {n}, Łukasz?"} for n in range(40)]
    questions.write_text("".join(json.dumps(row) + "\n" for row in asked))
    config = configure(toy, questions, labeller="people", validation_fraction=0.2)
    args = RewardConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False)
    task, folder = load_task(str(questions), validation_fraction=0.2), config.folder(str(tmp_path))
    with pytest.raises(UserError, match=r"let `make rankings` write answers\.jsonl"):
        collect(config, args, task, folder)
    path = collect_answers(config, args, task, folder)
    rows = [json.loads(line) for line in path.open()]
    assert len(rows) == 40 and all(1 < len(set(row["answers"])) <= 4 for row in rows)
    assert "Łukasz" in path.read_text(encoding="utf-8")
    scored = [row | {"scores": [*range(len(row["answers"]))]} for row in rows]
    scored[0]["answers"][0] += "\u2028"
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in scored]
    path.write_text("".join(lines), encoding="utf-8")
    assert collect_answers(config, args, task, folder).read_text() == path.read_text()
    given = load_task(str(path), validation_fraction=0.2)
    for ours, theirs in (("train", "align"), ("dev", "dev"), ("test", "test")):
        pairs = given.rankings(lambda prompts: [], ours, 0, 0.0)
        prompts = task.prompt_rows(theirs, 99)["prompt"]
        assert {str(p) for p in pairs["prompt"]} == {str(p) for p in prompts}
        assert set(pairs["margin"]) <= {1.0, 2.0, 3.0}
    other = configure(toy, questions, labeller="people", samples_per_prompt=2, overwrite="true")
    with pytest.raises(UserError, match=r"answers\.jsonl has scores by now"):
        collect_answers(other, args, task, folder)
    config = configure(toy, path, validation_fraction=0.2)
    collect(config, args, given, config.folder(str(tmp_path)))
    assert len(list((tmp_path / "rankings").glob("*.jsonl"))) == 2 and path.exists()

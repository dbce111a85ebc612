"""Rewards by name, their weighted sum, and the guards against too much of them."""

import hashlib
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import build_tokenizer, count_w5, prompts, save_reward_model
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from common.artifacts import StageOutput, write_json
from common.errors import UserError
from common.generation import Drawn, as_chat
from common.rows import assistant
from common.stage import open_stage
from common.tasks import open_task
from rlhf.__main__ import set_scale
from rlhf.align import AlignConfig, align_prompts, load_reward
from rlhf.config import PPOConfig
from rlhf.critic import plain_policy
from rlhf.rewards import (
    hash_function,
    is_function,
    load_function,
    make_scorer,
    score_answers,
    tell_apart,
    weigh,
)
from rlhf.trainer import PPOTrainer

Build = Callable[..., PPOTrainer]


def test_names() -> None:
    """Broken once: every name with a colon taken for a function."""
    assert is_function("rewards.py:brief") and is_function("package.rewards:brief")
    assert not is_function("out/arden/reward") and not is_function("out/run:1/reward")


def test_function_of_a_file_and_of_a_module(tmp_path: Path) -> None:
    """It gets an answer without the template's space, as where it is measured. Broken once: module
    found by the file's stem alone; in training the space was there.
    """
    file = tmp_path / "mine.py"
    body = "    return [-len(c[-1]['content']) for c in completions]\n"
    file.write_text(f"def brief(completions, **_):\n{body}")
    sampled = [[assistant(" ab")], [assistant(" c")], [assistant("d ")]]
    assert load_function(f"{file}:brief")(completions=sampled) == [-2, -1, -2]
    (tmp_path / "wrong.py").write_text("def brief(:\n")
    with pytest.raises(UserError, match=r"reward \(.*wrong.py:brief\) fails at .*: SyntaxError"):
        load_function(f"{tmp_path / 'wrong.py'}:brief")
    with pytest.raises(UserError, match=r"no function long, but \['brief'\]"):
        load_function(f"{file}:long")
    with pytest.raises(UserError, match=r"there is no file nowhere.py"):
        load_function("nowhere.py:brief")
    for name, said in (("nowhere.rewards", "No module named"), (".near", "relative")):
        with pytest.raises(UserError, match=rf"reward \({name}:brief\): .*{said}"):
            load_function(f"{name}:brief")


def test_functions_in_all_of_trls_protocol(tmp_path: Path) -> None:
    """Asynchronous, and asking how far training is. Broken once: refused where it is measured."""
    body = "async def mine(completions, trainer_state, **_):\n"
    body += "    return [float(trainer_state.global_step)] * len(completions)\n"
    (tmp_path / "mine.py").write_text(body)
    rows, answers = [{"prompt": as_chat("w4")}], [Drawn("w5", [5, 1])]
    mine = load_function(f"{tmp_path / 'mine.py'}:mine")
    assert score_answers([mine], [1.0], build_tokenizer(16), rows, answers) == [0.0]


def test_rewards_are_told_apart(build: Build, tmp_path: Path) -> None:
    """Broken once: two folders called reward logged as one, whose mean chose the checkpoint."""
    assert tell_apart(["out/arden/reward", "out/judge"]) == ["reward", "judge"]
    names = ["out/arden/reward", "out/arden-1/reward/", "mine/other"]
    assert tell_apart(names) == ["arden/reward", "arden-1/reward", "other"]
    assert tell_apart([count_w5, count_w5]) == ["conftest/count_w5_1", "conftest/count_w5_2"]
    paths = [save_reward_model(tmp_path / name / "reward", seed=len(name)) for name in ("a", "bb")]
    trainer = build(reward_funcs=paths, reward_weights=[1.0, 0.0], num_updates=1)
    trainer.train()
    logged = {name for line in trainer.state.log_history for name in line}
    assert {"rewards/a/reward/mean", "rewards/bb/reward/mean"} <= logged
    with pytest.raises(UserError, match="one at least must not be 0"):
        weigh(["a", "b"], [0.0, 0.0])


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("return [1.0]", "gives 1 scores for 2 completions: expected a finite number, or None"),
        ("return [1.0, float('nan')]", "gives nan for 2 completions"),
        ("return [1.0, float('inf')]", "gives inf for 2 completions"),
        ("return 3", r"fails at .*rewards.py, line \d+: TypeError: 'int' object is not iterable"),
        ("return ['a', 'b']", "ValueError: could not convert string to float"),
        ("return 1 / 0", r"fails at .*mine.py, line 2: ZeroDivisionError: division by zero"),
        ("return _['answer']", r"line 2: KeyError: 'answer'; .* kept by keep_columns: \[\.\.\]"),
    ],
)
def test_what_a_function_gives_is_looked_at(tmp_path: Path, body: str, message: str) -> None:
    """Broken once: NaN passed for None, so that nothing was trained on and nothing said."""
    file = tmp_path / "mine.py"
    file.write_text(f"def mine(completions, **_):\n    {body}\n")
    with pytest.raises(UserError, match=message):
        load_function(f"{file}:mine")(completions=[[assistant("a")], [assistant("b")]])


def test_what_a_function_asks_for_is_kept(tmp_path: Path) -> None:
    """Refused as it is loaded, with the cure. Broken once: a TypeError at the first answers."""
    file, nothing = tmp_path / "mine.py", None
    config = AlignConfig("x", "rows.jsonl", reward=["x:y"], keep_columns=["topic"])

    def load(arguments: str) -> None:
        file.write_text(f"def mine({arguments}):\n    return [1.0] * len(completions)\n")
        load_reward(f"{file}:mine", nothing, nothing, config, nothing)  # type: ignore[arg-type]

    with pytest.raises(UserError, match=r"asks for answer: .* keep_columns: \[topic, answer\]"):
        load("completions, answer, *, topic, **_")
    with pytest.raises(UserError, match=r"takes no prompts: let it end in \*\*rest"):
        load("completions, topic")
    load("completions, topic, answer='', **_")


def test_nobody_to_score_stops_the_run(build: Build) -> None:
    """Broken once: a loss of 0 for as long as it took."""
    trainer = build(reward_funcs=lambda completions, **_: [None] * len(completions))
    with pytest.raises(UserError, match="update 1, process 0: no reward has a number"):
        trainer.train()


def test_functions_get_the_columns_of_their_rows() -> None:
    """Of two that ask alike, too. Broken once: only prompts were kept, so a reward could not see
    the right answer; columns were found by the prompt, so that both got the last one's.
    """
    rows = [{"prompt": as_chat(text), "answer": text} for text in ("a", "b")]
    rows.append({"prompt": as_chat("a"), "answer": "c"})

    def mine(prompts: list[Any], answer: list[str], **rest: Any) -> list[float]:
        assert answer == ["a", "b", "c"] and prompts == [row["prompt"] for row in rows]
        assert "prompt" not in rest
        return [1.0, 2.0, 3.0]

    answers = [Drawn("x", [4, 1])] * 3
    assert score_answers([mine], [1.0], build_tokenizer(16), rows, answers) == [1.0, 2.0, 3.0]


def test_a_changed_function_is_another_run(tmp_path: Path, policy_path: str) -> None:
    """A finished run is known by its function's source. Broken once: only the name hashed."""
    file, data = tmp_path / "mine.py", tmp_path / "asked.jsonl"
    data.write_text(f"{json.dumps({'prompt': 'w4'})}\n" * 4)
    name = f"{file}:brief"
    config = AlignConfig(model_name_or_path=policy_path, data=str(data), reward=[name])

    def look() -> StageOutput:
        args = PPOConfig(output_dir=str(tmp_path / "out"), report_to="none", use_cpu=True)
        return open_stage(config, args, {name: hash_function(name)}).output

    file.write_text("def brief(completions, **_):\n    return [-len(c) for c in completions]\n")
    known = hashlib.sha256(file.read_bytes()).hexdigest()
    output = look()
    assert output.manifest["sources"][name] == known
    output.start()
    write_json(output.path / "summary.json", {})
    assert look().finished
    file.write_text(file.read_text().replace("-len", "len"))
    with pytest.raises(UserError, match=r"holds a run with another .*mine.py:brief"):
        look()
    assert hash_function("rlhf.rewards:weigh") == hash_function("rlhf/rewards.py:weigh")
    with pytest.raises(UserError, match="no module nowhere"):
        hash_function("nowhere:brief")


def test_weighted_sum_over_model_and_functions(reward_path: str) -> None:
    """By hand: 0.5 x the model's score + 2 x the count; None is 0. Of the ids that were drawn, as
    in training: one without words, one that was cut off, one that its text would split otherwise.

    Broken once: weights ignored; the text rendered anew and ended.
    """
    tokenizer = build_tokenizer(16)
    model = AutoModelForSequenceClassification.from_pretrained(reward_path).eval()
    rows = [{"prompt": as_chat(text)} for text in ("w4", "w6", "w4", "w6")]
    answers = [Drawn("w5 w5", [5, 5, 1]), Drawn("", [1]), Drawn("w7", [7]), Drawn("w8", [9, 10, 1])]

    def count(completion_ids: list[list[int]], completions: Any, **_: Any) -> list[float | None]:
        assert completion_ids == [answer.ids for answer in answers]
        assert completions == [[assistant(answer.text)] for answer in answers]
        return [float(ids.count(5)) or None for ids in completion_ids]

    def held_out(completion_ids: list[list[int]], **_: Any) -> list[float]:
        return [1.0] * len(completion_ids)

    alone = score_answers([count, held_out], [2.0, 0.0], tokenizer, rows, answers)
    assert alone[0] == 4.0 and math.isnan(alone[1]), "a measure makes no score"
    score = make_scorer([model, count], [0.5, 2.0], tokenizer, 3, torch.device("cpu"))
    for total, asked, answer in zip(score(rows, answers), (4, 6, 4, 6), answers, strict=True):
        with torch.no_grad():
            alone = model(input_ids=torch.tensor([[2, asked, 3, *answer.ids]])).logits[0, 0].item()
        assert total == pytest.approx(0.5 * alone + 2.0 * answer.ids.count(5), abs=1e-5)


def test_a_model_that_gives_no_numbers_stops_the_run(reward_path: str) -> None:
    """Broken once: NaN scored, so that its answers were left out as if nothing could score them."""
    model: Any = AutoModelForSequenceClassification.from_pretrained(reward_path)
    model.score.weight.data.fill_(math.nan)
    score = make_scorer([model], [1.0], build_tokenizer(16), 2, torch.device("cpu"))
    with pytest.raises(UserError, match="the reward model gives scores that are no numbers"):
        score([{"prompt": as_chat("w4")}], [Drawn("w5", [5, 1])])


def test_kl_budget_stops_the_run(build: Build, capsys: pytest.CaptureFixture[str]) -> None:
    """A proxy that pays for one token; the run ends once it is too far from the reference.

    Broken once: stop in the middle of an update.
    """
    settings: dict[str, Any] = {"num_updates": 12, "learning_rate": 3e-2, "beta": 1e-6}
    free = build(**settings)
    free.train()
    kls = [line["kl"] for line in free.state.log_history if "kl" in line]
    first = next(i for i, kl in enumerate(kls) if kl > 0.5)
    assert 0 < first < 10
    held = build(kl_budget=0.5, **settings)
    held.train()
    assert held.state.global_step == 2 * (first + 1)
    assert f"stopped after update {first + 1}: KL {kls[first]:.3g} over" in capsys.readouterr().out
    with pytest.raises(UserError, match="kl_budget needs a reference"):
        build(kl_budget=1.0, beta=0.0)


def test_the_checkpoint_kept_is_the_best_by_a_held_out_measure(
    build: Build, tmp_path: Path
) -> None:
    """A second reward of weight 0 is measured, not trained on, and picks the weights.

    The proxy pays for w5; the held-out measure punishes it, so that the first checkpoint is best.
    Broken once: evaluation not held back to the end of its update.
    """

    def held_out(completion_ids: list[list[int]], **_: Any) -> list[float]:
        return [-ids.count(5) / len(ids) for ids in completion_ids]

    trainer = build(
        reward_funcs=[count_w5, held_out],
        reward_weights=[1.0, 0.0],
        num_updates=6,
        learning_rate=1e-2,
        beta=0.0,
        missing_eos_penalty=0.0,
        extra={"eval_dataset": prompts(64)},
        per_device_eval_batch_size=64,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        save_total_limit=1,
        load_best_model_at_end=True,
        metric_for_best_model="eval_rewards/held_out/mean",
        greater_is_better=True,
    )
    trainer.train()
    lines = [x for x in trainer.state.log_history if "eval_rewards/held_out/mean" in x]
    best = max(lines, key=lambda line: line["eval_rewards/held_out/mean"])
    assert best["step"] < 12
    folder = tmp_path / "out" / f"checkpoint-{best['step']}"
    kept = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    for name, p in plain_policy(trainer.model).state_dict().items():
        assert torch.equal(p, kept[name]), name


@pytest.mark.parametrize(
    ("given", "std", "mean_and_std"),
    [
        ({}, 2.0, (0.7, 2.0)),
        ({}, None, (0.7, 1.0)),  # functions alone
        ({}, 0.0, (0.7, 1.0)),  # all scores alike
        ({"score_mean": -3.0, "score_std": 5.0}, 2.0, (-3.0, 5.0)),
        ({"score_mean": 0.0, "score_std": 1.0}, 2.0, (0.0, 1.0)),
    ],
)
def test_a_scale_that_was_given_stays(
    tmp_path: Path, given: dict[str, float], std: float | None, mean_and_std: tuple[float, float]
) -> None:
    """Broken once: the measured mean whatever was given."""
    args = PPOConfig(str(tmp_path), use_cpu=True, **given)
    args.scale_scores(0.7, std)
    assert args.score_scale == mean_and_std


def test_kept_columns_reach_a_function_in_training(
    build: Build, tmp_path: Path, policy_path: str
) -> None:
    """From the configuration on. Broken once: not passed on to the data."""
    data, seen = tmp_path / "asked.jsonl", set()
    rows = [{"prompt": " ".join(["w4"] * n), "answer": n} for n in range(1, 41)]
    data.write_text("\n".join(map(json.dumps, rows)))
    config = AlignConfig(
        policy_path, str(data), reward=["x:y"], max_new_tokens=6, keep_columns=["answer"]
    )

    def mine(prompts: list[Any], answer: list[str], **_: Any) -> list[float]:
        asked = [prompt[-1]["content"].count("w4") for prompt in prompts]
        seen.update(zip(asked, answer, strict=True))
        return [1.0] * len(answer)

    kept = align_prompts(
        open_task(config), Path(policy_path), build_tokenizer(16), config, "align", 16
    )
    build(reward_funcs=mine, dataset=kept, num_updates=1).train()
    assert len(seen) == 16 and all(str(words) == n for words, n in seen)


def test_scale_is_of_what_is_trained_on(tmp_path: Path, reward_path: str) -> None:
    """By hand: 1 and 4 have mean 2.5 and deviation 1.5; who has no number is left out. A deviation
    is taken where a model is trained on: a function's scale is its author's. Broken once: taken of
    a model of weight 0, too; NaN averaged.
    """
    model: Any = AutoModelForSequenceClassification.from_pretrained(reward_path)
    config = AlignConfig("x", "arden", reward=["a", "m:f"])
    for weights, scale in (([1.0, 1.0], (2.5, 1.5)), ([0.0, 1.0], (2.5, 1.0))):
        args = PPOConfig(str(tmp_path), use_cpu=True)
        set_scale([1.0, math.nan, 4.0], [model, count_w5], weights, config, args)
        assert args.score_scale == scale
    with pytest.raises(UserError, match=r"reward \(a, m:f\) has no number for any answer"):
        set_scale([math.nan], [model, count_w5], [1.0, 1.0], config, args)


def test_a_reward_model_pads_as_the_policy_does(reward_path: str) -> None:
    """Else it looks for the last token where there is padding. Broken once: its own pad id left."""
    model: Any = AutoModelForSequenceClassification.from_pretrained(reward_path)
    model.config.pad_token_id = 15
    score = make_scorer([model], [1.0], build_tokenizer(16), 2, torch.device("cpu"))
    rows, answers = [{"prompt": as_chat("w4")}] * 2, [Drawn("w5", [5, 1]), Drawn("", [1] * 9)]
    together = score(rows, answers)
    alone = [score([row], [one])[0] for row, one in zip(rows, answers, strict=True)]
    assert together == pytest.approx(alone, abs=1e-5) and alone[0] != pytest.approx(alone[1])

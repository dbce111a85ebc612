"""The bench: its reward is what it says, trainers take turns, ratios are theirs to ours."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from common.errors import UserError
from rlhf.bench import __main__ as bench
from rlhf.bench.__main__ import (
    LENGTHS,
    REWARD,
    Ended,
    race,
    spread,
    start,
    stop,
    take_turns,
    turns,
)
from rlhf.bench.problem import Problem, create

TINY = Problem(
    vocab_size=40,
    hidden_size=32,
    layers=1,
    prompts=32,
    prompt_tokens=4,
    completion_tokens=4,
    completions=8,
    micro_batch=4,
    mini_batches=2,
    passes=1,
)


def test_the_reward_model_gives_the_share_of_good_tokens(tmp_path: Path) -> None:
    """Broken once: prompt counted; attention not even."""
    create(REWARD, tmp_path)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "reward")
    good, other = REWARD.good[3], REWARD.good.stop + 5
    for count in (0, 4, 16):
        ids = torch.tensor([[other] * 8 + [good] * count + [other] * (16 - count)])
        assert model(input_ids=ids).logits.item() == pytest.approx(count / 16, abs=0.01)
    prompts = json.loads((tmp_path / "prompts.json").read_text(encoding="utf-8"))
    assert {len(ids) for ids in prompts} == {8}
    assert not {i for ids in prompts for i in ids} & set(REWARD.good)
    create(replace(LENGTHS, prompts=64), tmp_path)
    prompts = json.loads((tmp_path / "prompts.json").read_text(encoding="utf-8"))
    assert len({len(ids) for ids in prompts}) > 10 and max(map(len, prompts)) <= 96


@torch.no_grad()
def test_the_policy_ends_as_it_should_and_never_draws_padding(tmp_path: Path) -> None:
    """A chance of 1 in 32 to end, in the mean, where the longest completion has 96 tokens.

    Broken once: shifts not divided by the hidden state they are multiplied with.
    """
    for problem, least, most in ((LENGTHS, 0.025, 0.038), (REWARD, 0.001, 0.02)):
        create(replace(problem, prompts=64), tmp_path)
        policy = AutoModelForCausalLM.from_pretrained(tmp_path / "policy")
        ids = torch.randint(2, problem.vocab_size, (16, 8))
        chances = policy(input_ids=ids).logits.softmax(-1).mean((0, 1))
        assert least < chances[1] < most and chances[0] < 1e-6


def test_a_worker_takes_an_update_when_told_to(tmp_path: Path) -> None:
    """Broken once: phases not cleared, so that they add up over updates."""
    shared = {"ours": replace(TINY, share_trunk=True)}
    workers = start(TINY, shared, tmp_path, trl112=None)
    take_turns(workers, rounds=2)
    stop(workers)
    assert len(workers["ours"].updates) == 2
    for update in workers["ours"].updates:
        phases = ("generation", "scoring", "rollout_forward", "forward", "backward")
        taken = [update[f"{phase}_seconds"] for phase in phases]
        assert 8 * (4 + 1) <= update["tokens"] <= 8 * (4 + 4)
        assert all(seconds > 0 for seconds in taken) and sum(taken) < update["seconds"]
        assert 0 <= update["score"] <= 1 and update["peak_mb"] > 100


def test_a_worker_that_fails_is_named(tmp_path: Path) -> None:
    """Broken once: an empty line read as JSON."""
    with pytest.raises(UserError, match=r"trl112 ended before it was told to: see .*trl112\.log"):
        start(TINY, {}, tmp_path, trl112=sys.executable)  # no TRL 1.12 in it
    assert "trl.experimental.ppo" in (tmp_path / "trl112.log").read_text(encoding="utf-8")


def test_what_the_bench_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Broken once: found by a traceback, that of rounds after all had been measured."""
    monkeypatch.setattr(sys, "argv", ["bench", "--rounds", "0"])
    with pytest.raises(UserError, match=r"rounds \(0\) and seeds \(3\) must be 1 or more"):
        bench.main()
    monkeypatch.setattr(sys, "argv", ["bench"])
    monkeypatch.setenv("TRL112", "/no/such/python")
    with pytest.raises(UserError, match=r"TRL112 \(/no/such/python\): there is no such"):
        bench.main()


def fake(scores: list[float]) -> Any:
    worker = SimpleNamespace(name="fake", updates=[])
    worker.update = lambda: worker.updates.append({"score": scores[len(worker.updates)]})
    worker.score = lambda: sum(u["score"] for u in worker.updates[-5:]) / 5
    return worker


def test_a_race_ends_at_the_target() -> None:
    """Broken once: one score over the target enough, in place of five in the mean."""
    fast, slow = fake([0.0, 1.0] + [0.8] * 50), fake([0.1] * 10 + [0.6, 0.8] + [0.8] * 50)
    race({"fast": fast, "slow": slow}, target=0.7, limit=40)
    assert len(fast.updates) == 6  # (1 + 4 x 0.8) / 5
    assert len(slow.updates) == 15  # 0.6 + 4 x 0.8
    with pytest.raises(UserError, match=r"fake: score under 0\.7 after 12 updates"):
        race({"slow": fake([0.1] * 50)}, target=0.7, limit=12)


def test_theirs_may_end_by_itself() -> None:
    """Its seed has no ratio, the bench goes on; ours may not. Broken by stopping for both."""

    def fail() -> None:
        raise Ended("trl112 ended before it was told to")

    ours, theirs = fake([0.8] * 50), fake([0.1, 0.2])
    theirs.name = "trl112"
    begin = theirs.update
    theirs.update = lambda: begin() if len(theirs.updates) < 2 else fail()
    race({"ours": ours, "trl112": theirs}, target=0.7, limit=40)
    assert len(ours.updates) == 5 and theirs.updates == []
    ours.update = fail
    with pytest.raises(Ended):
        race({"ours": ours}, target=0.7, limit=40)


def test_ratios_are_theirs_over_ours() -> None:
    """Broken once: ours over theirs; mean in place of median."""
    ours: Any = SimpleNamespace(updates=[{"seconds": 2.0}, {"seconds": 4.0}, {"seconds": 1.0}])
    theirs: Any = SimpleNamespace(updates=[{"seconds": 6.0}, {"seconds": 4.0}, {"seconds": 10.0}])
    figures = spread("ratio", list(turns(ours, theirs, "seconds")))
    assert figures == {"ratio": 3.0, "ratio_min": 1.0, "ratio_max": 10.0}


class Timed(bench.Worker):
    """A worker of known figures: by name its seconds an update, and its peak in MB."""

    known: ClassVar = {"trl112": (12.0, 400), "separate": (4.0, 200), "shared": (2.0, 100)}

    def __init__(self, name: str):
        self.name, self.updates = name, []

    def wait(self) -> dict[str, float]:
        seconds, peak = self.known[self.name]
        told = {"seconds": seconds, "cpu_seconds": seconds / 2, "peak_mb": peak}
        return told | {"score": 1.0, "kl": 0.0}

    def update(self) -> dict[str, float]:
        self.updates.append(self.wait())
        return self.updates[-1]


def test_ratios_of_known_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Theirs over ours, of memory ours over theirs. Broken by either the other way round."""
    names = Timed.known
    monkeypatch.setattr(bench, "start", lambda *_: {name: Timed(name) for name in names})
    monkeypatch.setattr(bench, "stop", lambda _: None)
    monkeypatch.setenv("TRL112", sys.executable)
    monkeypatch.setattr(sys, "argv", ["bench", "--output_dir", str(tmp_path), "--seeds", "1"])
    bench.main()
    figures = json.loads((tmp_path / "rlhf.json").read_text())
    assert figures["time_to_reward_ratio"] == figures["samples_per_second_ratio_separate"] == 3
    assert figures["time_to_reward_ratio_shared"] == figures["samples_per_second_ratio_shared"] == 6
    assert (figures["memory_ratio"], figures["memory_ratio_shared"]) == (0.5, 0.25)
    assert figures["lengths_separate_samples_per_second"] == 32 / 4
    assert figures["reward_trl112_updates_max"] == 5
    assert figures.keys() > {"date", "commit", "machine", "torch"}

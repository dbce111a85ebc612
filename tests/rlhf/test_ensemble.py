"""Several reward models as one: by hand, in measuring and in training alike."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import build_tokenizer, save_reward_model
from datasets import Dataset
from transformers import AutoModelForSequenceClassification

from common.errors import UserError
from common.generation import Drawn, as_chat
from rlhf.align import AlignConfig, load_rewards
from rlhf.ensemble import Ensemble
from rlhf.rewards import make_scorer
from rlhf.score import EnsembleScorer, as_function
from rlhf.trainer import PPOTrainer

ROWS = [{"prompt": as_chat(text)} for text in ("w4", "w6 w8", "w9")]
ANSWERS = [Drawn("w5 w5", [5, 5, 1]), Drawn("w7", [7, 1]), Drawn("w4 w10 w11", [4, 10, 11, 1])]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder: Path = tmp_path_factory.mktemp("members")
    return [save_reward_model(folder / str(seed), seed=seed) for seed in (1, 2, 3)]


def load(paths: list[str], penalty: float) -> Ensemble:
    models = [AutoModelForSequenceClassification.from_pretrained(path) for path in paths]
    return Ensemble(models, penalty, [0.0] * len(models))


def test_by_hand() -> None:
    """Members 1, 3 and 4, 4: means 2, 4, deviations 1, 0. With the second's offset of 2 they say
    1, 1 and 4, 2: means 1, 3, deviations 0, 1. Broken by M - 1 in the deviation, by variance."""
    scores = torch.tensor([[1.0, 4.0], [3.0, 4.0]])
    assert Ensemble([], 0.5, [0.0, 0.0]).combine(scores).tolist() == [1.5, 4.0]
    assert Ensemble([], 0.5, [0.0, 2.0]).combine(scores).tolist() == [1.0, 2.5]


def test_centred_on_prompts_that_leave_room(
    paths: list[str], policy_path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As PPO trains on them: one as long as the context is left out. Broken once: all drawn to;
    offsets of one answer. On the same answers every member then has mean 0.
    """
    asked: list[Any] = []

    def draw(policy: Any, tokenizer: Any, prompts: list[Any], most: int) -> list[Any]:
        asked.extend(prompts)
        return ANSWERS[: len(prompts)]

    monkeypatch.setattr("rlhf.align.draw_each", draw)
    monkeypatch.setattr("rlhf.align.require_go", lambda *_: None)
    monkeypatch.setattr("rlhf.align.require_parent", lambda name, _: Path(name))
    monkeypatch.setattr("rlhf.align.require_same_tokenizer", lambda *_: None)
    prompts = [[{"role": "user", "content": " ".join(["w4"] * n)}] for n in (3, 126, 2)]
    task: Any = SimpleNamespace(
        prompt_rows=lambda *_: Dataset.from_list([{"prompt": prompt} for prompt in prompts])
    )
    config = AlignConfig(
        model_name_or_path="x", data="x", reward=paths, disagreement_penalty=0.5, max_new_tokens=8
    )
    wanted = config, task, Path(policy_path), build_tokenizer(16), 2, CPU
    [ensemble] = load_rewards(*wanted)
    assert asked == [prompts[0], prompts[2]] and len(ensemble.members) == 3
    rows = [{"prompt": prompt} for prompt in asked]
    for member, offset in zip(ensemble.members, ensemble.offsets, strict=True):
        scores = make_scorer([member], [1.0], build_tokenizer(16), 2, CPU)(rows, ANSWERS[:2])
        assert offset == pytest.approx(sum(scores) / 2, abs=1e-6) and scores[0] != scores[1]


def test_training_and_measuring_score_alike(paths: list[str]) -> None:
    """And as members alone. Broken by offsets that the scorer left out."""
    ensemble, tokenizer = load(paths, 0.7), build_tokenizer(16)
    ensemble.offsets = [0.5, -2.0, 7.0]
    measured = make_scorer([ensemble], [1.0], tokenizer, 2, CPU)(ROWS, ANSWERS)
    members = [make_scorer([m], [1.0], tokenizer, 2, CPU)(ROWS, ANSWERS) for m in ensemble.members]
    assert measured == pytest.approx(ensemble.combine(torch.tensor(members)).tolist(), abs=1e-5)
    scorer = as_function(ensemble, tokenizer, [], 2)
    trained = scorer(
        prompt_ids=[[2, 4, 3], [2, 6, 8, 3], [2, 9, 3]],
        completion_ids=[[5, 5, 1], [7, 1], [4, 10, 11, 1]],
    )
    assert trained == pytest.approx(measured, abs=1e-5)
    assert len({round(score, 3) for score in measured}) == 3


def test_ppo_takes_it_and_its_critic_the_first_member(
    build: Callable[..., PPOTrainer], paths: list[str]
) -> None:
    """Its values start centred, as the score is. Broken by a scorer that is no `TokenScorer` (the
    critic then started from the policy), and by the score's mean alone (values 7 too high)."""
    ensemble = load(paths, 1.0)
    ensemble.offsets[0] = 7.0
    trainer = build(reward_funcs=[ensemble], num_updates=1, score_mean=0.5)
    scorer: Any = trainer.reward_funcs[0]
    assert isinstance(scorer, EnsembleScorer)
    trunk = ensemble.members[0].base_model.embed_tokens.weight
    critic: Any = trainer.model.critic
    assert any(p.shape == trunk.shape and torch.equal(p, trunk) for p in critic.parameters())
    assert critic.score_mean == pytest.approx(7.5)
    trainer.train()
    assert "rewards/ensemble/mean" in trainer.state.log_history[0]


@pytest.mark.parametrize("reward", [["a"], ["a", "m:f"], ["a", "judge"]])
def test_needs_two_models(reward: list[str]) -> None:
    """Broken by counting rewards of all kinds."""
    fields: dict[str, Any] = {"model_name_or_path": "sft", "data": "arden", "reward": reward}
    AlignConfig(**fields)
    with pytest.raises(UserError, match="needs two reward models"):
        AlignConfig(**fields, disagreement_penalty=0.5)


def test_a_reward_is_given_once() -> None:
    """Held out is another, however the path is written. Broken once: weights 1 and 0 of one."""
    fields: dict[str, Any] = {"model_name_or_path": "x", "data": "x"}
    with pytest.raises(UserError, match=r"reward \(out/reward, out/./reward/\) has one twice"):
        AlignConfig(**fields, reward=["out/reward", "out/./reward/"])
    AlignConfig(**fields, reward=["out/reward", "out/other"])

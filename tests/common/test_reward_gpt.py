"""The reward model that reads its own log-probabilities, against parts that are tested alone."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from common.batches import Chat, pad, render
from common.reward_gpt import answer_starts, logprob_scorer
from common.scoring import answer_logprobs, score_chats
from common.tokenizer import load_tokenizer
from rlhf.score import TokenScorer, turn_suffix
from tests.toy import save_toy

CHATS: list[Chat] = [
    [{"role": "user", "content": "How many?"}, {"role": "assistant", "content": "Many."}],
    [
        {"role": "user", "content": "How many are there?"},
        {"role": "assistant", "content": "There are many."},
        {"role": "user", "content": "Many?"},
        {"role": "assistant", "content": "Many, many."},
    ],
]


@pytest.fixture(params=["modern", "lesson"])
def parent(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A GPT with weights large enough for a wrong position or mask to show, and its tokenizer."""
    torch.manual_seed(0)
    return save_toy(tmp_path, request.param, weights=0.2)


def load(parent: Path, bias: float) -> tuple[Any, Any]:
    """The scorer with u = 0 and b = `bias`, and the tokenizer."""
    tokenizer = load_tokenizer(parent)
    asked = [render(tokenizer, [CHATS[0][:1]], ask=ask)[0] for ask in (False, True)]
    model: Any = logprob_scorer(str(parent), asked[1][len(asked[0]) :])
    torch.nn.init.constant_(model.logprob_weight.bias, bias)
    return model.eval(), tokenizer


def test_score_is_the_plain_score_and_the_answer_logprobs(parent: Path) -> None:
    """Seen to fail with the question's tokens counted, and with each token's own logit shifted."""
    model, tokenizer = load(parent, bias=0.5)
    plain = score_chats(model.plain(), tokenizer, CHATS)
    language_model = AutoModelForCausalLM.from_pretrained(parent)
    asked = [chat[:-1] for chat in CHATS]
    starts = map(len, render(tokenizer, asked, ask=True))
    answers = [row[n:] for row, n in zip(render(tokenizer, CHATS), starts, strict=True)]
    likely = answer_logprobs(language_model, tokenizer, asked, answers)
    expected = [score + 0.5 * nats for score, nats in zip(plain, likely, strict=True)]
    assert score_chats(model, tokenizer, CHATS) == pytest.approx(expected, abs=1e-4)
    assert max(likely) < -1  # else the second feature would not show


def test_logits_of_a_batch_are_bounded(parent: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Broken once: 256 conversations at a time, however many tokens they have."""
    model, tokenizer = load(parent, bias=0.5)
    whole, widths = score_chats(model, tokenizer, CHATS * 4), []
    most = 2 * max(len(row) for row in render(tokenizer, CHATS))
    monkeypatch.setattr("common.scoring.LOGITS", most * model.config.vocab_size)
    model.register_forward_pre_hook(lambda _, inputs: widths.append(inputs[0].numel()))
    assert score_chats(model, tokenizer, CHATS * 4) == pytest.approx(whole, abs=1e-4)
    assert len(widths) > 2 and max(widths) <= most


def test_padding_on_either_side_changes_no_score(parent: Path) -> None:
    """Seen to fail with the last column taken for the last token."""
    model, tokenizer = load(parent, bias=0.5)
    rows = render(tokenizer, CHATS)
    alone = [model(torch.tensor([row])).logits.item() for row in rows]
    for side in ("left", "right"):
        ids, mask = pad(rows, tokenizer.pad_token_id, side, torch.device("cpu"))
        scores = model(ids, attention_mask=mask).logits.squeeze(-1).tolist()
        assert scores == pytest.approx(alone, abs=1e-4)


def test_an_opening_inside_an_answer_hides_nothing(parent: Path) -> None:
    """A policy may sample the token. Broken once: what stood before it was not counted, so that a
    lie, the token and a courtesy scored as the courtesy."""
    model, tokenizer = load(parent, bias=0.5)
    asked, whole = (
        render(tokenizer, [chat], ask=ask)[0]
        for chat, ask in ((CHATS[0][:1], True), (CHATS[0], False))
    )
    answer, suffix = whole[len(asked) :], turn_suffix(tokenizer)
    torn = [*answer[:2], *model.config.answer_opening, *answer[2:]]
    scorer = TokenScorer(model, tokenizer, suffix, batch_size=2)
    found = scorer(completion_ids=[answer, torn], prompt_ids=[asked, asked])
    ids = torch.tensor([asked + torn])
    assert found[0] == pytest.approx(model(torch.tensor([whole])).logits.item(), abs=1e-4)
    assert found[1] == pytest.approx(
        model(ids, starts=torch.tensor([len(asked)])).logits.item(), abs=1e-4
    )
    assert found[1] < found[0] < model(ids).logits.item()


def test_answer_starts_after_the_last_opening() -> None:
    """Seen to fail with the first opening taken."""
    ids = torch.tensor([[1, 7, 4, 9, 7, 4, 5], [1, 7, 4, 9, 9, 9, 9], [1, 4, 7, 9, 9, 9, 9]])
    assert answer_starts(ids, [7, 4]).tolist() == [6, 3, 0]
    assert answer_starts(ids, []).tolist() == [0, 0, 0]


def test_starts_with_the_parents_weights_and_comes_back_from_disk(parent: Path) -> None:
    """Seen to fail with the start weight left at zero."""
    model, tokenizer = load(parent, bias=0.2)
    fresh: Any = logprob_scorer(str(parent), [1])
    assert fresh.logprob_weight.bias.item() == pytest.approx(0.2)
    assert not fresh.logprob_weight.weight.any()
    model.save_pretrained(parent / "scorer")
    back = AutoModelForSequenceClassification.from_pretrained(parent / "scorer")
    assert type(back) is type(model)
    assert score_chats(back, tokenizer, CHATS) == score_chats(model, tokenizer, CHATS)


def test_plain_transformers_refuses_it(parent: Path) -> None:
    """It would score without the second feature. Seen to fail with `plain()` saved in its place."""
    model, _ = load(parent, bias=0.2)
    model.save_pretrained(parent / "scorer")
    code = "import sys; from transformers import AutoModelForSequenceClassification as A\n"
    code += "A.from_pretrained(sys.argv[1])"
    command = [sys.executable, "-c", code, str(parent / "scorer")]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode != 0
    assert "_logprob_reward" in result.stderr

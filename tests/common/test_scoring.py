"""Log-probabilities of answers, against a token at a time."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from common.batches import Chat, render
from common.scoring import answer_logprobs
from common.tokenizer import load_tokenizer
from tests.toy import save_toy

CHAT: Chat = [
    {"role": "user", "content": "How many?"},
    {"role": "assistant", "content": "Many, many."},
]


def test_only_what_was_drawn_counts(tmp_path: Path) -> None:
    """An answer that was cut off has no end of its own. Broken by counting one: the KL,
    of answers of which a tenth was cut off, came out at -0.36 nats (make rlhf PROFILE=shakespeare).
    And by counting the question's tokens.
    """
    torch.manual_seed(0)
    parent = save_toy(tmp_path, "modern", weights=0.2)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(parent), load_tokenizer(parent)
    ids = torch.tensor(render(tokenizer, [CHAT]))
    start = len(render(tokenizer, [CHAT[:1]], ask=True)[0])
    with torch.no_grad():
        logprobs = model(ids).logits[0].log_softmax(-1)
    each = [logprobs[t - 1, ids[0, t]].item() for t in range(start, ids.shape[1])]
    assert len(each) > 3 and ids[0, -1] == tokenizer.eos_token_id
    cut = [ids[0, start : start + most].tolist() for most in range(1, len(each) + 1)]
    found = answer_logprobs(model, tokenizer, [CHAT[:1]] * len(cut), cut)
    assert found == pytest.approx([sum(each[: len(answer)]) for answer in cut], abs=1e-4)

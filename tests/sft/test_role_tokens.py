"""The role tokens of a chat start as a token that the base has read."""

import pytest
import torch

from common.errors import UserError
from common.tokenizer import ROLE_TOKENS, train_bpe, train_characters
from pretrain.__main__ import make_model
from pretrain.config import ModelConfig
from sft.role_tokens import start_role_tokens

TOY = ModelConfig(block_size=16, num_hidden_layers=1, hidden_size=16, num_attention_heads=2)


def test_only_the_role_tokens_move() -> None:
    """Seen to fail with one of the three left out, and with the whole table overwritten."""
    tokenizer = train_characters(["A: b"])
    model = make_model(TOY, tokenizer)
    table = model.get_input_embeddings().weight
    before = table.detach().clone()
    start_role_tokens(model, tokenizer, ":")
    roles = tokenizer.convert_tokens_to_ids(list(ROLE_TOKENS))
    colon = tokenizer.convert_tokens_to_ids(":")
    for role in roles:
        assert torch.equal(table[role], before[colon])
    others = [i for i in range(len(before)) if i not in roles]
    assert torch.equal(table[others], before[others])


def test_what_is_no_token_is_refused() -> None:
    """Seen to pass for an unknown character before `unk_token_id` was looked at."""
    tokenizer = train_characters(["A b"])
    with pytest.raises(UserError, match=r"role_tokens_like \(':'\) is \['<\|unk\|>'\]"):
        start_role_tokens(make_model(TOY, tokenizer), tokenizer, ":")
    tokenizer = train_bpe(["A: b"], 320)
    with pytest.raises(UserError, match=r"role_tokens_like \('Ab'\) is \['A', 'b'\]"):
        start_role_tokens(make_model(TOY, tokenizer), tokenizer, "Ab")

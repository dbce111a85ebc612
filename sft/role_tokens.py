"""Where the tokens of a chat's roles start, of which a base model has read none.

A token that the text of pretraining never holds is still pushed away from every prediction: where
embedding and head are one table it ends with the largest norm of all, far from anything that was
learned, and a question behind it is read as no question was before. Put in the place of a token
that does its work in the text - in a play the colon between a speaker's name and his speech -
the chat begins as one more scene, and what the base knows it knows there, too (docs/log.md).
"""

from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from common.errors import UserError
from common.tokenizer import ROLE_TOKENS


@torch.no_grad()
def start_role_tokens(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, text: str
) -> None:
    """Give the role tokens the embedding of the one token that `text` is, in place.

    Raises:
        UserError: `text` is several tokens or unknown, or the tokenizer has other role tokens.
    """
    ids = tokenizer(text, add_special_tokens=False).input_ids
    if len(ids) != 1 or ids[0] == tokenizer.unk_token_id:
        found = tokenizer.convert_ids_to_tokens(ids)
        raise UserError(
            f"role_tokens_like ({text!r}) is {found} to the model's tokenizer: give a text that is "
            "one token, or leave it out"
        )
    missing = [token for token in ROLE_TOKENS if token not in tokenizer.get_vocab()]
    if missing:
        raise UserError(
            f"role_tokens_like is for models pretrained here: this tokenizer has no {missing[0]}, "
            "so leave it out"
        )
    table: Any = model.get_input_embeddings().weight
    table[tokenizer.convert_tokens_to_ids(list(ROLE_TOKENS))] = table[ids[0]].clone()

"""What a chat template must do for a model to learn to answer by it, and to stop."""

from itertools import groupby
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from common.batches import Chat, render
from common.errors import UserError

_CHAT: Chat = [
    {"role": "user", "content": "ask"},
    {"role": "assistant", "content": "say"},
    {"role": "user", "content": "ask"},
    {"role": "assistant", "content": "say"},
]
_CURE = "write {% generation %} ... {% endgeneration %} around the answer and its end"


def check_template(tokenizer: PreTrainedTokenizerBase) -> None:
    """Render two questions with their answers, and see what would be learned of them.

    A template without marks is not mended here: TRL would train on another one than the model is
    used with.

    Raises:
        UserError: there is no template; it cannot render a chat; it has no generation marks, marks
            too much, or leaves an answer's end out; what it opens an answer with is not what stands
            before one.
    """
    if not tokenizer.chat_template:
        raise UserError("the model's tokenizer has no chat template: give it one, and save it")
    try:
        encoded: Any = tokenizer.apply_chat_template(
            _CHAT, return_assistant_tokens_mask=True, return_dict=True
        )
        asked = render(tokenizer, [_CHAT[:-1]], ask=True)[0]
    except TemplateError as error:
        raise UserError(f"the chat template cannot render user and assistant: {error}") from error
    ids, mask = encoded["input_ids"], encoded["assistant_masks"]
    runs = [
        [token for token, _ in run]
        for learned, run in groupby(zip(ids, mask, strict=True), key=lambda pair: pair[1])
        if learned
    ]
    if not runs:
        raise UserError(f"the chat template has no generation marks: {_CURE}")
    learned = tokenizer.decode([token for run in runs for token in run])
    if len(runs) != 2 or "ask" in learned:
        raise UserError(
            f"the chat template's generation marks hold {learned!r} of two questions `ask` and two "
            f"answers `say`: {_CURE}, of each turn by the assistant and of no other"
        )
    if any(run[-1] != tokenizer.eos_token_id for run in runs):
        raise UserError(
            f"the chat template's generation marks leave out {tokenizer.eos_token!r} after an "
            f"answer, so that the model would never learn to stop: {_CURE}"
        )
    if ids[: len(asked)] != asked:
        raise UserError(
            "the chat template opens an answer (add_generation_prompt) otherwise than it writes "
            f"one: {tokenizer.decode(asked)!r} is not how {tokenizer.decode(ids)!r} begins"
        )

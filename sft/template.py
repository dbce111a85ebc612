"""What a chat template must do for a model to learn to answer by it, and to stop."""

from itertools import groupby
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from common.batches import Chat, render
from common.errors import UserError
from common.tokenizer import CHAT_TEMPLATE

_CHAT: Chat = [
    {"role": "user", "content": "ask"},
    {"role": "assistant", "content": "say"},
    {"role": "user", "content": "ask"},
    {"role": "assistant", "content": "say"},
]
_LED: Chat = [{"role": "system", "content": "lead"}, *_CHAT]
_CURE = "write {% generation %} ... {% endgeneration %} around the answer and its end"


def read_template(path: str) -> str:
    """The content of `chat_template_path`.

    Raises:
        UserError: it is no file of text.
    """
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"chat_template_path ({path}) cannot be read ({error}): give a file with a template"
        ) from None


def check_template(tokenizer: PreTrainedTokenizerBase) -> None:
    """Render two questions with their answers, and see what would be learned of them.

    Once more behind a system turn, if the template does not say (raise_exception) that it knows
    none. A template without marks is not mended here: TRL would train on another one than the model
    is used with.

    Raises:
        UserError: there is no template; it cannot render a chat, or passes over a turn; it
            has no generation marks, marks too much or too little, or leaves an answer's end out;
            what it opens an answer with is not what stands before one; the tokenizer does not know
            a sign that it writes.
    """
    if not tokenizer.chat_template:
        raise UserError(
            "the model's tokenizer has no chat template: give one, --chat_template_path FILE"
        )
    try:
        _check_chat(tokenizer, _CHAT)
    except TemplateError as error:
        raise UserError(f"the chat template cannot render user and assistant: {error}") from error
    try:
        text: Any = tokenizer.apply_chat_template(_LED, tokenize=False)
    except TemplateError:
        return
    if "lead" not in text:
        raise UserError(
            f"the chat template leaves out what a system turn says: {text!r} has no `lead`; write "
            "it, or raise_exception where there is one"
        )
    _check_chat(tokenizer, _LED)


def _check_chat(tokenizer: PreTrainedTokenizerBase, chat: Chat) -> None:
    encoded: Any = tokenizer.apply_chat_template(
        chat, return_assistant_tokens_mask=True, return_dict=True
    )
    asked = render(tokenizer, [chat[:-1]], ask=True)[0]
    ids, mask = encoded["input_ids"], encoded["assistant_masks"]
    runs = [
        [token for token, _ in run]
        for learned, run in groupby(zip(ids, mask, strict=True), key=lambda pair: pair[1])
        if learned
    ]
    if not runs:
        raise UserError(f"the chat template has no generation marks: {_CURE}")
    learned = [str(tokenizer.decode(run)) for run in runs]
    say = str(tokenizer.decode(tokenizer("say", add_special_tokens=False).input_ids))
    end = str(tokenizer.eos_token)
    if [text.removesuffix(end).strip() for text in learned] != [say.strip()] * 2:
        turns = ", ".join(f"{turn['role']} `{turn['content']}`" for turn in chat)
        raise UserError(
            f"the chat template's generation marks hold {''.join(learned)!r} of {turns}: {_CURE}, "
            "of each turn by the assistant and of no other"
        )
    if any(run[-1] != tokenizer.eos_token_id for run in runs):
        raise UserError(
            f"the chat template's generation marks leave out {end!r} after an answer, so that the "
            f"model would never learn to stop: {_CURE}"
        )
    text: Any = tokenizer.apply_chat_template(chat, tokenize=False)
    if text.count("ask") != 2:
        raise UserError(
            f"the chat template writes two user turns that say `ask` as {text!r}; write what each "
            "says, once"
        )
    unknown: Any = tokenizer.unk_token_id
    said = tokenizer([turn["content"] for turn in chat], add_special_tokens=False)["input_ids"]
    own = tokenizer.chat_template == CHAT_TEMPLATE  # whose one such sign may be the line end
    if not own and ids.count(unknown) > sum(content.count(unknown) for content in said):
        raise UserError(
            f"the chat template writes signs that the tokenizer does not know: it reads "
            f"{tokenizer.decode(ids)!r}; write others, or the role tokens"
        )
    if ids[: len(asked)] != asked:
        raise UserError(
            "the chat template opens an answer (add_generation_prompt) otherwise than it writes "
            f"one: {tokenizer.decode(asked)!r} is not how {tokenizer.decode(ids)!r} begins"
        )

"""Text to token ids and back: byte-level BPE or single characters, and the one chat template.

Both kinds are a `PreTrainedTokenizerFast` whose first ids are the special tokens, pad = 0. Neither
has a normaliser: decoding gives back exactly the text that was encoded (characters: if all of them
were seen in training). `tokenizer(text)` adds no special token of its own.

A special token spelled out in ordinary text, say "<|eos|>" on a web page, must not become the
token. `encode_texts` reads it as ordinary text; in a chat the template breaks it up ("< |eos|>"),
so that nobody can speak for another role. A bare `tokenizer(text)` does make it the token.

BPE: Sennrich et al. 2016, arXiv:1508.07909; byte level: GPT-2.
"""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from common.errors import UserError

ROLE_TOKENS = ("<|system|>", "<|user|>", "<|assistant|>")
SPECIAL_TOKENS = ("<|pad|>", "<|bos|>", "<|eos|>", *ROLE_TOKENS)
UNKNOWN_TOKEN = "<|unk|>"  # characters only: bytes leave nothing unknown
VOCAB_MULTIPLE = 64  # matrices whose sides are such multiples are faster on GPUs

# Qwen2's: a contraction, a word with the sign before it, one digit, signs, line ends, spaces.
PRE_TOKENIZER_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)

_BREAK_UP = "".join(
    f".replace('{token}', '< {token[1:]}')" for token in (*SPECIAL_TOKENS, UNKNOWN_TOKEN)
)
# Before content stands one space, as before most words of a text: BPE has another token for a word
# that begins a line. Else content is taken as it is. Behind a question stands a blank line, as
# between the speeches of a play: at <|eos|> a text was over in pretraining, and an answer behind it
# began without its question (docs/log.md). The `-` in the tags concern the template only.
CHAT_TEMPLATE = f"""\
{{%- macro plain(text) -%}}
    {{{{- text{_BREAK_UP} -}}}}
{{%- endmacro -%}}
{{{{- '<|bos|>' -}}}}
{{%- for message in messages -%}}
    {{%- if message['role'] in ['system', 'user'] -%}}
        {{{{- '<|' + message['role'] + '|> ' + plain(message['content']) + '\\n\\n' -}}}}
    {{%- elif message['role'] == 'assistant' -%}}
        {{{{- '<|assistant|>' -}}}}
        {{%- generation -%}}
            {{{{- ' ' + plain(message['content']) + '<|eos|>' -}}}}
        {{%- endgeneration -%}}
    {{%- else -%}}
        {{{{- raise_exception('unknown role ' + message['role'] + ': ' +
                             'must be system, user or assistant') -}}}}
    {{%- endif -%}}
{{%- endfor -%}}
{{%- if add_generation_prompt -%}}
    {{{{- '<|assistant|>' -}}}}
{{%- endif -%}}
"""


def train_bpe(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Train byte-level BPE; the same texts give the same tokenizer.

    Args:
        texts: the text, in pieces of any size.
        vocab_size: tokens, special ones included; fewer are made where the text is too small.

    Raises:
        UserError: `vocab_size` is no multiple of 64, or has no room for the 256 bytes.
    """
    smallest = _round_up(256 + len(SPECIAL_TOKENS))
    if vocab_size < smallest or vocab_size % VOCAB_MULTIPLE:
        nearest = max(smallest, round(vocab_size / VOCAB_MULTIPLE) * VOCAB_MULTIPLE)
        raise UserError(
            f"vocab_size ({vocab_size:_}) must be a multiple of {VOCAB_MULTIPLE} and at least "
            f"{smallest}; nearest is {nearest:_}"
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRE_TOKENIZER_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=_added_tokens(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return _wrap(tokenizer)


def train_characters(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """One token per unicode character in `texts`, in code-point order; others are `<|unk|>`.

    The space is always one of them: the chat template needs it.

    Raises:
        UserError: there is no character.
    """
    seen: set[str] = set()
    for text in texts:
        seen.update(text)
    if not seen:
        raise UserError("train_characters: the text is empty; give a text with characters to learn")
    tokens = (*SPECIAL_TOKENS, UNKNOWN_TOKEN, *sorted(seen | {" "}))
    vocab = {token: index for index, token in enumerate(tokens)}
    # BPE without merges: single characters, several times faster than splitting into words.
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token=UNKNOWN_TOKEN))
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens(_added_tokens((*SPECIAL_TOKENS, UNKNOWN_TOKEN)))
    return _wrap(tokenizer, unk_token=UNKNOWN_TOKEN)


def load_tokenizer(directory: str | Path) -> PreTrainedTokenizerFast:
    """Read the tokenizer that `save_pretrained` wrote, chat template included.

    Raises:
        UserError: there is none.
    """
    if not (Path(directory) / "tokenizer.json").exists():
        raise UserError(f"{directory}: no tokenizer.json there; give the directory of a model")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(directory)
    config = Path(directory) / "config.json"
    if tokenizer.eos_token is None and config.exists():  # of OpenAI's GPT-2 the model alone says it
        said = json.loads(config.read_text(encoding="utf-8"))
        for name in ("bos", "eos"):
            if isinstance(place := said.get(f"{name}_token_id"), int):
                setattr(tokenizer, f"{name}_token", tokenizer.convert_ids_to_tokens(place))
    return tokenizer


def require_own_tokens(tokenizer: PreTrainedTokenizerBase, **tokens: str | None) -> None:
    """Refuse a trainer's `eos_token` or `pad_token` that is another than the tokenizer's.

    TRL would set it after the template, which ends an answer by the tokenizer's own, was checked.

    Raises:
        UserError: names the token, and the tokenizer's own.
    """
    for name, token in tokens.items():
        own = getattr(tokenizer, name)
        if token not in (None, own):
            raise UserError(f"{name} ({token}) is not the tokenizer's own, {own}: leave it out")


def encode_texts(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> list[list[int]]:
    """Ids of each text; whatever looks like a special token in it is ordinary text.

    As `tokenizer(texts, add_special_tokens=False, split_special_tokens=True)`, several times
    faster for characters because nothing but the ids is made.
    """
    backend = tokenizer.backend_tokenizer
    backend.no_padding()
    backend.no_truncation()
    backend.encode_special_tokens = True
    try:
        return [found.ids for found in backend.encode_batch_fast(texts, add_special_tokens=False)]
    finally:
        backend.encode_special_tokens = tokenizer.split_special_tokens


def count_unknown(tokenizer: PreTrainedTokenizerFast, texts: Iterable[str]) -> int:
    """How many tokens of `texts` are `<|unk|>`: characters the tokenizer never saw; 0 for BPE."""
    if tokenizer.unk_token_id is None:
        return 0
    return sum(
        ids.count(tokenizer.unk_token_id)
        for text in texts
        for ids in encode_texts(tokenizer, [text])
    )


def model_vocab_size(tokenizer: PreTrainedTokenizerBase) -> int:
    """Rows of the model's embedding: the tokenizer's length, rounded up to a multiple of 64."""
    return _round_up(len(tokenizer))


def hash_tokenizer(tokenizer: PreTrainedTokenizerFast) -> str:
    """sha256, hex, of what turns text into ids; padding and truncation set by a call left out."""
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    state.pop("padding", None)
    state.pop("truncation", None)
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()


def _wrap(tokenizer: Tokenizer, **special: str) -> PreTrainedTokenizerFast:
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|pad|>",
        bos_token="<|bos|>",
        eos_token="<|eos|>",
        additional_special_tokens=list(ROLE_TOKENS),
        clean_up_tokenization_spaces=False,
        **special,
    )
    wrapped.chat_template = CHAT_TEMPLATE
    return wrapped


def _added_tokens(tokens: Iterable[str]) -> list[AddedToken]:
    return [AddedToken(token, special=True, normalized=False) for token in tokens]


def _round_up(size: int) -> int:
    return -(-size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE

"""Documents too many to hold: streamed, tokenized once into `shards_dir`, shared by all runs."""

from collections.abc import Iterable, Iterator
from pathlib import Path

from transformers import PreTrainedTokenizerFast

from common.artifacts import held
from common.data import require_two_parts
from common.errors import UserError
from common.mixture import Source
from common.tasks import FileTask, Task
from common.text_stream import fingerprint, stream_texts
from common.token_file import TokenFile
from common.token_shards import SPLITS, ShardIndex, open_token_shards, write_token_shards
from common.tokenizer import hash_tokenizer, load_tokenizer, train_bpe, train_characters
from pretrain.config import ModelConfig, PretrainConfig


def make_tokenizer(
    config: ModelConfig, texts: Iterable[str], *, documents: bool
) -> PreTrainedTokenizerFast:
    """Train the tokenizer that the configuration names on `texts`, or load it.

    Raises:
        UserError: the one to load has no token to end `documents` with, or a blank page's model
            lacks one that its configuration names.
    """
    if config.tokenizer == "characters":
        return train_characters(texts)
    if config.tokenizer == "bpe":
        return train_bpe(texts, config.vocab_size)
    tokenizer = load_tokenizer(Path(str(config.tokenizer)))
    if tokenizer.bos_token is None:  # Qwen3's: a document ends, and the next begins with that
        tokenizer.bos_token = tokenizer.eos_token
    blank = config.model_name_or_path is None
    for name, needed in {"eos_token": documents or blank, "pad_token": blank}.items():
        if needed and getattr(tokenizer, name) is None:
            raise UserError(
                f"tokenizer ({config.tokenizer}) has no {name}: name one of its tokens so in "
                f"{config.tokenizer}/tokenizer_config.json"
            )
    return tokenizer


def open_stream(
    task: Task, model_config: ModelConfig, config: PretrainConfig
) -> "TokenStream | None":
    """The stream of a task, where `shards_dir` asks for one; a single .txt file is none.

    Raises:
        UserError: the task's text is made, not read.
    """
    if not config.shards_dir:
        return None
    if not isinstance(task, FileTask):
        raise UserError(f"shards_dir is for documents from files or the Hub, not for {config.data}")
    return TokenStream(task.sources, model_config, config) if task.documents_apart else None


class TokenStream:
    """The documents of some sources as token shards.

    Attributes:
        fingerprint: identifies the text.
    """

    def __init__(
        self, sources: list[Source], model_config: ModelConfig, config: PretrainConfig
    ) -> None:
        self.sources, self.model_config, self.config = sources, model_config, config
        self.folder = Path(str(config.shards_dir))
        self.fingerprint = fingerprint(sources)

    def prepare(self) -> None:
        """Write what the shards lack; the tokenizer, trained on the text's start, comes first.

        Raises:
            UserError: `shards_dir` holds tokens of another text, tokenizer or split; another
                process writes there; one part of the split would be empty.
        """
        require_two_parts(self.config.validation_fraction)
        if not self._index().complete:
            self.folder.mkdir(parents=True, exist_ok=True)
            with held(self.folder, "--shards_dir"):
                self._write(self._index())  # read again: another run may have gone on with it
        for split, file in zip(SPLITS, self.open()[1], strict=True):
            print(f"{split}: {file.info}")

    def _index(self) -> ShardIndex:
        model, config = self.model_config, self.config
        index = ShardIndex(
            self.folder,
            {
                "data": self.fingerprint,
                "tokenizer": model.tokenizer,
                "vocab_size": model.vocab_size if model.tokenizer == "bpe" else None,
                "tokenizer_bytes": config.tokenizer_bytes,
                "validation_fraction": config.validation_fraction,
                "max_text_bytes": config.max_text_bytes,
            },
        )
        if index.exists and model.tokenizer not in ("characters", "bpe"):  # those are made here
            self._require_tokenizer()
        return index

    def _write(self, index: ShardIndex) -> None:
        model, config = self.model_config, self.config
        if not index.exists:
            print(f"pretrain: {model.tokenizer} tokenizer, {self.folder}")
            make_tokenizer(model, self._first_texts(), documents=True).save_pretrained(self.folder)
            index.write()
        if not index.complete:
            place = index.shards[-1]["place"] if index.shards else None
            write_token_shards(
                stream_texts(self.sources, place, skip=config.skip_faulty_rows),
                load_tokenizer(self.folder),
                index,
                validation_fraction=config.validation_fraction,
                max_bytes=config.max_text_bytes,
            )

    def _require_tokenizer(self) -> None:
        """Refuse the shards where the directory named has another tokenizer by now.

        Raises:
            UserError: it would make other ids of the text, or of a document's ends.
        """
        given = make_tokenizer(self.model_config, (), documents=True)
        if _identity(given) != _identity(load_tokenizer(self.folder)):
            raise UserError(
                f"{self.folder} holds tokens of another tokenizer than "
                f"{self.model_config.tokenizer} has now: give another --shards_dir, or delete it"
            )

    def open(self) -> tuple[PreTrainedTokenizerFast, list[TokenFile]]:
        """The tokenizer, and the tokens to train on and to be measured by.

        Raises:
            UserError: the one that lies there is not theirs.
        """
        tokenizer = load_tokenizer(self.folder)
        files = [open_token_shards(self.folder, split) for split in SPLITS]
        if {file.info.tokenizer for file in files} != {hash_tokenizer(tokenizer)}:
            raise UserError(
                f"{self.folder}: the tokenizer there is not the one that wrote its tokens: give "
                "another --shards_dir, or delete it"
            )
        return tokenizer, files

    def _first_texts(self) -> Iterator[str]:
        """`tokenizer_bytes` of the text's start."""
        left = self.config.tokenizer_bytes
        for batch in stream_texts(self.sources, skip=self.config.skip_faulty_rows):
            for text in batch.texts:
                yield text
                left -= len(text.encode())
            if left <= 0:
                return


def _identity(tokenizer: PreTrainedTokenizerFast) -> tuple[str, int | None, int | None]:
    """What decides over the ids of documents."""
    return hash_tokenizer(tokenizer), tokenizer.bos_token_id, tokenizer.eos_token_id

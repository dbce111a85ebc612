"""What can be set for pretraining; names that `TrainingArguments` has too mean the same here."""

from dataclasses import dataclass, field
from typing import Literal

from accelerate.tracking import get_available_trackers

from common.arden.world import PEOPLE
from common.config import require
from common.device import has_bf16
from common.errors import UserError

# No part of a run's identity: a card that is too small for an evaluation must not cost the run.
INCIDENTAL = frozenset({"eval_steps", "per_device_eval_batch_size", "shards_dir"})


@dataclass
class ModelConfig:
    """The model to make, or the checkpoint to start from."""

    model_name_or_path: str | None = field(
        default=None, metadata={"help": "checkpoint to go on training; without it, a blank page"}
    )
    shape: Literal["modern", "lesson"] = field(
        default="modern", metadata={"help": "modern (Qwen3's) or lesson (GPT-2's)"}
    )
    block_size: int | None = field(
        default=None,
        metadata={"help": "context, tokens; default: 256, or what the checkpoint can read"},
    )
    depth: int | None = field(
        default=None,
        metadata={"help": "one dial: so many blocks, 64 wide for each, heads of 64 (128 from 16)"},
    )
    num_hidden_layers: int = field(default=6, metadata={"help": "blocks"})
    hidden_size: int = field(default=192, metadata={"help": "width of the residual stream"})
    num_attention_heads: int = field(default=3, metadata={"help": "query heads"})
    num_key_value_heads: int | None = field(
        default=None, metadata={"help": "key and value heads (modern); default: as many as queries"}
    )
    intermediate_size: int | None = field(
        default=None, metadata={"help": "width inside the MLP; default: by shape"}
    )
    tie_word_embeddings: bool = field(
        default=True, metadata={"help": "embedding and head are one table"}
    )
    dropout: float = field(default=0.0, metadata={"help": "dropout rate"})
    tokenizer: str | None = field(
        default=None,
        metadata={
            "help": "characters, bpe (trained on the text), or a directory; default: the "
            "checkpoint's, without one bpe"
        },
    )
    vocab_size: int = field(default=1024, metadata={"help": "of a BPE trained here"})

    def __post_init__(self) -> None:
        """Turn `depth` into sizes, and choose the tokenizer.

        Raises:
            UserError: `depth` is odd or below 2, `block_size` below 1, or a checkpoint is to read
                by a new tokenizer.
        """
        if self.block_size is not None:
            require(self, 1, "block_size")
        if self.model_name_or_path is None:
            self.block_size = self.block_size or 256
        elif self.tokenizer in ("characters", "bpe"):
            raise UserError(
                f"tokenizer ({self.tokenizer}) is made for the text, and its ids mean something "
                f"else to {self.model_name_or_path}: give --tokenizer {self.model_name_or_path}"
            )
        self.tokenizer = self.tokenizer or self.model_name_or_path or "bpe"
        if self.depth is None:
            return
        if self.depth < 2 or self.depth % 2:
            raise UserError(f"depth ({self.depth}) must be even and at least 2")
        self.num_hidden_layers = self.depth
        self.hidden_size = 64 * self.depth
        self.num_attention_heads = self.depth if self.depth < 16 else self.depth // 2


@dataclass
class PretrainConfig:
    """The text and the run."""

    output_dir: str = field(metadata={"help": "where the finished model goes"})
    data: str = field(metadata={"help": "arden, shakespeare, a file or folder, or a Hub name"})
    overwrite: bool = field(
        default=False, metadata={"help": "replace a run of another configuration"}
    )
    realm_seed: int = field(default=1, metadata={"help": "the realm of Arden to make"})
    realm_people: int = field(default=PEOPLE, metadata={"help": "inhabitants of the realm"})
    documents: int = field(default=24_000, metadata={"help": "length of Arden's chronicle"})
    plays: bool = field(default=False, metadata={"help": "the data is a text in play form"})
    columns: dict | None = field(
        default=None, metadata={"help": "our field: the data's column, e.g. text: content"}
    )
    validation_fraction: float = field(
        default=0.1, metadata={"help": "share at the end of a text that is held out"}
    )
    skip_faulty_rows: int = field(
        default=0,
        metadata={"help": "pass over so many faulty rows of each source, naming them, not stop"},
    )
    shards_dir: str | None = field(
        default=None,
        metadata={"help": "read documents as a stream and keep their tokens there, for all runs"},
    )
    max_text_bytes: int | None = field(
        default=None, metadata={"help": "of a stream: stop after so much text"}
    )
    tokenizer_bytes: int = field(
        default=200_000_000, metadata={"help": "of a stream: train the BPE on so much of its start"}
    )
    document_mask: bool = field(
        default=False, metadata={"help": "no attention from a document into the one before it"}
    )
    max_steps: int = field(default=1000, metadata={"help": "optimizer steps"})
    per_device_train_batch_size: int = field(default=8, metadata={"help": "windows a process"})
    gradient_accumulation_steps: int = field(default=1, metadata={"help": "micro-batches a step"})
    optimizer: Literal["muon", "adamw"] = field(
        default="muon",
        metadata={"help": "muon (matrices; AdamW the rest), or adamw for all, at learning_rate"},
    )
    learning_rate: float = field(
        default=0.01, metadata={"help": "AdamW's: tables and vectors; if it has all, some 1e-3"}
    )
    muon_learning_rate: float = field(default=0.02, metadata={"help": "Muon's: matrices"})
    weight_decay: float = field(default=0.0, metadata={"help": "of the matrices"})
    warmup_steps: int = field(default=10, metadata={"help": "linear warm-up"})
    decay_fraction: float = field(
        default=0.7, metadata={"help": "share of the run, at its end, in which rates fall to 0"}
    )
    max_grad_norm: float = field(default=1.0, metadata={"help": "gradient clipping"})
    logging_steps: int = field(default=20, metadata={"help": "steps between lines of metrics"})
    eval_steps: int = field(
        default=0, metadata={"help": "steps between evaluations; 0: at the end only"}
    )
    save_steps: int = field(default=200, metadata={"help": "steps between checkpoints"})
    per_device_eval_batch_size: int = field(default=64, metadata={"help": "windows a process"})
    seed: int = field(default=0, metadata={"help": "of weights, data order and dropout"})
    bf16: bool | None = field(
        default=None, metadata={"help": "bfloat16 products; default: where they are fast"}
    )
    report_to: Literal["none", "tensorboard", "trackio", "wandb"] = field(
        default="none", metadata={"help": "where to follow the run, beside metrics.jsonl"}
    )
    torch_compile: bool | None = field(
        default=None, metadata={"help": "default: where training would take minutes without it"}
    )

    def __post_init__(self) -> None:
        """Ask the machine for its precision, and refuse what cannot work.

        Raises:
            UserError: a count below 1, a seed that numpy refuses, a share outside [0, 1], or a
                tracker that is not installed.
        """
        self.bf16 = has_bf16() if self.bf16 is None else self.bf16
        counts = ("max_steps", "per_device_train_batch_size", "gradient_accumulation_steps")
        more = ("per_device_eval_batch_size", "logging_steps", "save_steps")
        require(self, 1, *counts, *more)
        rates = ("learning_rate", "muon_learning_rate", "weight_decay", "max_grad_norm")
        require(self, 0, *rates, "warmup_steps", "eval_steps", "skip_faulty_rows")
        require(self, 0, "seed", most=2**32 - 1)  # numpy's
        require(self, 1, "tokenizer_bytes", "realm_people", "documents")
        if self.max_text_bytes is not None:
            require(self, 1, "max_text_bytes")
        if self.report_to not in ("none", *map(str, get_available_trackers())):
            raise UserError(
                f"report_to ({self.report_to}) is not installed: pip install {self.report_to}, or "
                "leave it out, for metrics.jsonl is written anyway"
            )
        require(self, 0, "decay_fraction", "validation_fraction", most=1)

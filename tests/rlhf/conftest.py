"""Tiny policies, reward models and trainers, all saved to and loaded from temporary folders."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3ForSequenceClassification,
)

from rlhf.config import PPOConfig
from rlhf.trainer import PPOTrainer

TEMPLATE = (
    "{% for m in messages %}{{ '<user> ' if m['role'] == 'user' else '<bot> ' }}{{ m['content'] }}"
    "{{ ' <eos>' if m['role'] == 'assistant' else ' ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<bot> ' }}{% endif %}"
)


def build_tokenizer(vocab_size: int) -> PreTrainedTokenizerFast:
    """Words w4, w5, ... split at spaces; pad 0, eos 1, <user> 2, <bot> 3."""
    words = ["<pad>", "<eos>", "<user>", "<bot>"] + [f"w{i}" for i in range(4, vocab_size)]
    backend = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>"
    )
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def build_config(vocab_size: int, hidden_size: int = 32, layers: int = 2) -> Qwen3Config:
    return Qwen3Config(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=hidden_size // 2,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
    )


def save_policy(path: Path, vocab_size: int = 16, seed: int = 0, **size: int) -> str:
    """A random policy and its tokenizer, saved; sharper than at initialisation (std 0.02)."""
    torch.manual_seed(seed)
    model = Qwen3ForCausalLM(build_config(vocab_size, **size))
    with torch.no_grad():
        model.model.embed_tokens.weight.normal_(0, 0.1)
    model.save_pretrained(path)
    build_tokenizer(vocab_size).save_pretrained(path)
    return str(path)


def save_reward_model(path: Path, vocab_size: int = 16, seed: int = 1, **size: int) -> str:
    torch.manual_seed(seed)
    config = build_config(vocab_size, **size)
    config.num_labels = 1
    model = Qwen3ForSequenceClassification(config)
    with torch.no_grad():
        model.model.embed_tokens.weight.normal_(0, 0.1)
        model.score.weight.normal_(0, 0.3)
    model.save_pretrained(path)
    build_tokenizer(vocab_size).save_pretrained(path)
    return str(path)


def prompts(count: int, vocab_size: int = 16, conversational: bool = False) -> Dataset:
    """Prompts of 1 to 5 words."""
    generator = torch.Generator().manual_seed(0)
    rows: list[Any] = []
    for i in range(count):
        words = torch.randint(4, vocab_size, (1 + i % 5,), generator=generator)
        text = " ".join(f"w{w}" for w in words.tolist())
        rows.append([{"role": "user", "content": text}] if conversational else text)
    return Dataset.from_dict({"prompt": rows})


def count_w5(completion_ids: list[list[int]], **_: Any) -> list[float]:
    """Reward: the share of w5 among the tokens."""
    return [ids.count(5) / len(ids) for ids in completion_ids]


@pytest.fixture(scope="session")
def policy_path(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_policy(tmp_path_factory.mktemp("policy"))


@pytest.fixture(scope="session")
def reward_path(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_reward_model(tmp_path_factory.mktemp("reward"))


@pytest.fixture
def build(tmp_path: Path, policy_path: str) -> Callable[..., PPOTrainer]:
    """A tiny trainer: 16 samples an update, 2 mini-batches of 2 micro-batches of 4."""

    def make(
        model: Any = None,
        reward_funcs: Any = count_w5,
        dataset: Dataset | None = None,
        extra: dict[str, Any] | None = None,
        **config: Any,
    ) -> PPOTrainer:
        defaults: dict[str, Any] = {
            "output_dir": str(tmp_path / "out"),
            "per_device_train_batch_size": 4,
            "gradient_accumulation_steps": 2,
            "num_mini_batches": 2,
            "max_completion_length": 6,
            "num_updates": 2,
            "learning_rate": 1e-3,
            "lr_scheduler_type": "constant",
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            "use_cpu": True,
        }
        return PPOTrainer(
            model=model or policy_path,
            reward_funcs=reward_funcs,
            args=PPOConfig(**{**defaults, **config}),
            train_dataset=prompts(32) if dataset is None else dataset,
            **(extra or {}),
        )

    return make

"""TRL's trainers and PEFT take both GPTs by their path, with no special case."""

import os
import subprocess
import sys

os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import AutoPeftModelForCausalLM, LoraConfig
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from trl import (
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    RewardConfig,
    RewardTrainer,
    RLOOConfig,
    RLOOTrainer,
    SFTConfig,
    SFTTrainer,
)

from common.gpt import (
    GPT,
    GPTForSequenceClassification,
    LessonGPT,
    LessonGPTForSequenceClassification,
    build_config,
    build_gpt,
)

SPECIAL = ["<pad>", "<bos>", "<eos>", "<user>", "<assistant>", "<unk>"]
WORDS = [*SPECIAL, "who", "rules", "Arden", "?", "the", "duke", "a", "queen", "knows", "not"]
TEMPLATE = (
    "<bos>{% for message in messages %}"
    "{% if message.role == 'user' %}<user> {{ message.content }} {% else %}"
    "<assistant> {% generation %}{{ message.content }} <eos>{% endgeneration %}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<assistant> {% endif %}"
)
QUESTION = [{"role": "user", "content": "who rules Arden ?"}]
GOOD = [{"role": "assistant", "content": "the duke"}]
BAD = [{"role": "assistant", "content": "a queen knows not"}]
CLASSES = {
    "modern": (GPT, GPTForSequenceClassification),
    "lesson": (LessonGPT, LessonGPTForSequenceClassification),
}
SHAPES = list(CLASSES)


@pytest.fixture(scope="module", params=SHAPES)
def shape(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def base(shape: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Save an untrained GPT with its tokenizer and chat template; return where."""
    words = Tokenizer(WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        additional_special_tokens=["<user>", "<assistant>"],
        chat_template=TEMPLATE,
    )
    config = build_config(
        "modern" if shape == "modern" else "lesson",
        vocab_size=len(WORDS),
        block_size=64,
        num_hidden_layers=2,
        hidden_size=32,
        num_attention_heads=4,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    torch.manual_seed(0)
    path = str(tmp_path_factory.mktemp(shape))
    build_gpt(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture
def settings(tmp_path: Path) -> dict[str, Any]:
    return {
        "output_dir": str(tmp_path),
        "max_steps": 2,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
    }


@pytest.mark.parametrize("first", ["common.gpt", "trl.trainer.utils"])
def test_order_of_imports_does_not_matter(first: str) -> None:
    code = (
        f"import {first}, common.gpt, trl.trainer.utils\n"
        "package = trl.trainer.utils.transformers\n"
        "assert package.Qwen3ForCausalLM is common.gpt.GPT\n"
        "assert package.GPT2LMHeadModel is common.gpt.LessonGPT\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def rows(**columns: Any) -> Dataset:
    return Dataset.from_list([columns] * 8)


def train(trainer: Any, expected: type) -> None:
    """Train two steps: the model must be ours, the losses finite, the weights move."""
    model = trainer.model
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    assert type(inner) is expected
    before = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 2 and all(torch.tensor(losses).isfinite())
    moved = [not p.equal(before[n]) for n, p in model.named_parameters() if n in before]
    assert any(moved), "nothing was trained"


def reward_known(completions: list[Any], **kwargs: Any) -> list[float]:
    return [float(len(completion[0]["content"]) % 5) for completion in completions]


@pytest.mark.parametrize("packing", [False, True])
def test_sft(base: str, shape: str, settings: dict[str, Any], packing: bool) -> None:
    config = SFTConfig(assistant_only_loss=True, packing=packing, max_length=24, **settings)
    trainer: Any = SFTTrainer(base, config, train_dataset=rows(messages=QUESTION + GOOD))
    train(trainer, CLASSES[shape][0])
    trainer.save_model()
    assert type(AutoModelForCausalLM.from_pretrained(settings["output_dir"])) is CLASSES[shape][0]


def test_sft_with_lora(base: str, shape: str, settings: dict[str, Any]) -> None:
    trainer: Any = SFTTrainer(
        base,
        SFTConfig(assistant_only_loss=True, **settings),
        train_dataset=rows(messages=QUESTION + GOOD),
        peft_config=LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    train(trainer, CLASSES[shape][0])
    learned = [n for n, p in trainer.model.named_parameters() if p.requires_grad]
    assert learned and all("lora_" in name for name in learned)
    trainer.save_model()
    ids = torch.arange(1, 9)[None]
    again = AutoPeftModelForCausalLM.from_pretrained(settings["output_dir"]).eval()
    trainer.model.eval()
    torch.testing.assert_close(again(ids).logits, trainer.model(ids).logits)


def test_reward(base: str, shape: str, settings: dict[str, Any]) -> None:
    pairs = rows(prompt=QUESTION, chosen=GOOD, rejected=BAD)
    trainer = RewardTrainer(base, RewardConfig(**settings), train_dataset=pairs)
    train(trainer, CLASSES[shape][1])


def test_dpo(base: str, shape: str, settings: dict[str, Any]) -> None:
    pairs = rows(prompt=QUESTION, chosen=GOOD, rejected=BAD)
    trainer = DPOTrainer(base, args=DPOConfig(**settings), train_dataset=pairs)
    assert type(trainer.ref_model) is CLASSES[shape][0]
    train(trainer, CLASSES[shape][0])


@pytest.mark.parametrize(
    ("config", "trainer"), [(RLOOConfig, RLOOTrainer), (GRPOConfig, GRPOTrainer)]
)
def test_online(
    base: str, shape: str, settings: dict[str, Any], config: type, trainer: type
) -> None:
    online = trainer(
        base,
        reward_funcs=reward_known,
        args=config(num_generations=4, max_completion_length=6, beta=0.1, **settings),
        train_dataset=rows(prompt=QUESTION),
    )
    assert type(online.ref_model) is CLASSES[shape][0]
    train(online, CLASSES[shape][0])

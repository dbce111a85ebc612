"""What fine-tuning learns from, to the token, and that no way of batching changes it."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from trl import RewardConfig, RewardTrainer, SFTConfig, SFTTrainer

from common.batches import render
from common.gpt import build_config, build_gpt
from common.pretraining_text import PretrainingText
from common.token_file import write_token_file
from common.tokenizer import model_vocab_size, train_characters
from rlhf.config import PPOConfig
from rlhf.score import TokenScorer
from rlhf.trainer import PPOTrainer
from sft.trainer import ReplaySFTTrainer
from tests.chats import say

TOKENIZER = train_characters(["abcdefgh ?.\n"])
CHATS = [
    say("u: a?", "a: bb."),
    say("s: c", "u: d?", "a: e.", "u: fg?", "a: hhhhh."),
    say("u: abc abc?", "a: d."),
    say("u: e?", "a: fff fff fff fff."),
    say("u: h?", "a: g.", "u: h?", "a: gg."),
]
GOLDEN = "changed: checkpoints already trained would read another chat; is that intended?"


def model(shape: str) -> Any:
    torch.manual_seed(0)
    config = build_config(
        shape,  # type: ignore[arg-type]
        vocab_size=model_vocab_size(TOKENIZER),
        block_size=128,
        num_hidden_layers=2,
        hidden_size=32,
        num_attention_heads=2,
        pad_token_id=TOKENIZER.pad_token_id,
        bos_token_id=TOKENIZER.bos_token_id,
        eos_token_id=TOKENIZER.eos_token_id,
    )
    gpt = build_gpt(config)
    for module in gpt.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return gpt


def trainer(
    folder: Path,
    shape: str = "modern",
    chats: list[Any] = CHATS,
    trainer_class: Any = SFTTrainer,
    **fields: Any,
) -> Any:
    """An SFTTrainer whose one step moves the weights by minus the gradient."""
    settings: dict[str, Any] = {
        "output_dir": str(folder),
        "assistant_only_loss": True,
        "max_length": 128,
        "max_steps": 1,
        "optim": "sgd",
        "learning_rate": 1.0,
        "max_grad_norm": 0.0,
        "lr_scheduler_type": "constant",
        "per_device_train_batch_size": len(chats),
        "activation_checkpointing": False,
        "bf16": False,
        "use_cpu": True,
        "save_strategy": "no",
        "report_to": "none",
        "logging_steps": 1,
    }
    return trainer_class(
        model=model(shape),
        args=SFTConfig(**settings | fields),
        train_dataset=Dataset.from_list([{"messages": chat} for chat in chats]),
        processing_class=TOKENIZER,
    )


def step(one: Any) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss of a step, and the weights after it."""
    one.train()
    [loss] = [line["loss"] for line in one.state.log_history if "loss" in line]
    return loss, {name: p.detach().clone() for name, p in one.model.named_parameters()}


def assert_equal(one: Any, other: Any) -> None:
    (loss, weights), (other_loss, other_weights) = step(one), step(other)
    assert loss == pytest.approx(other_loss, rel=1e-5)
    for name, weight in weights.items():
        torch.testing.assert_close(weight, other_weights[name], rtol=1e-4, atol=1e-6, msg=name)


SHAPES = ["modern", "lesson"]


@pytest.mark.parametrize("shape", SHAPES)
def test_accumulation_does_not_change_a_step(tmp_path: Path, shape: str) -> None:
    """Answers of very different lengths: a mean of means would weigh the short ones more.

    Broken by `model_accepts_loss_kwargs = False`, which makes it so.
    """
    many = trainer(
        tmp_path / "k",
        shape,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=len(CHATS),
    )
    assert_equal(trainer(tmp_path / "one", shape), many)


@pytest.mark.parametrize("shape", SHAPES)
def test_packed_is_unpacked(tmp_path: Path, shape: str) -> None:
    """All conversations in one row: none sees another, and the sum over answers is the same.

    Broken by leaving `position_ids` out of the mask.
    """
    packed = trainer(tmp_path / "p", shape, packing=True, per_device_train_batch_size=1)
    assert len(packed.train_dataset) == 1
    assert_equal(trainer(tmp_path / "u", shape), packed)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_text_beside_is_a_mean_over_its_windows(tmp_path: Path, shape: str) -> None:
    """Twice the cross-entropy of three windows on top of the answers' loss, and one step however
    it is split, also where the Trainer takes the mean over micro-batches. Broken by a share that is
    not scaled for them, by `place` always 0."""
    path = tmp_path / "text.bin"
    write_token_file(["abc defg h? a.\n" * 60], TOKENIZER, path, documents=False)
    text = PretrainingText(path, 3, 128, 0, TOKENIZER)
    beside: Any = partial(ReplaySFTTrainer, text, 2.0)
    accumulated: dict[str, int] = {"per_device_train_batch_size": 1}
    accumulated["gradient_accumulation_steps"] = len(CHATS)
    one = trainer(tmp_path / "one", shape, trainer_class=beside)
    more = text.loss(one.model, 0, 0, 1).item()
    assert more > 1
    many = trainer(tmp_path / "k", shape, trainer_class=beside, **accumulated)
    loss, _ = step(trainer(tmp_path / "none", shape))
    both, _ = step(trainer(tmp_path / "both", shape, trainer_class=beside))
    assert both == pytest.approx(loss + 2 * more, rel=1e-4)
    assert_equal(one, many)
    alike = {"chats": [CHATS[0]] * len(CHATS), "trainer_class": beside}
    one = trainer(tmp_path / "one", shape, **alike)
    many = trainer(tmp_path / "k", shape, **alike, **accumulated)
    one.model_accepts_loss_kwargs = many.model_accepts_loss_kwargs = False
    assert_equal(one, many)


def labels_of(one: Any) -> list[list[int]]:
    return [row["labels"] for row in one.train_dataset]


def test_only_the_assistant_is_learned_to_the_token(tmp_path: Path) -> None:
    """By hand, from the conversations; every answer's end is learned. Broken by a template
    that leaves <eos> out of its marks."""
    one = trainer(tmp_path, shuffle_dataset=False)
    rows = [[id for id in row if id != -100] for row in labels_of(one)]
    said = [
        "".join(f" {turn['content']}<|eos|>" for turn in chat if turn["role"] == "assistant")
        for chat in CHATS
    ]
    assert [TOKENIZER.decode(row) for row in rows] == said
    ids = [row["input_ids"] for row in one.train_dataset]
    for row, labels in zip(ids, labels_of(one), strict=True):
        assert all(label in (-100, id) for id, label in zip(row, labels, strict=True))
        assert labels[-1] == TOKENIZER.eos_token_id


def test_an_end_of_text_is_learned_in_a_packed_row(tmp_path: Path) -> None:
    packed = trainer(tmp_path, packing=True)
    [labels] = labels_of(packed)
    answers = sum(turn["role"] == "assistant" for chat in CHATS for turn in chat)
    assert labels.count(TOKENIZER.eos_token_id) == answers


def test_every_stage_reads_the_same_ids(tmp_path: Path) -> None:
    """Fine-tuning, the reward model, PPO, and whoever serves the saved model by its template; by
    hand for the first two conversations, one with a system turn and a second question.

    Broken by a scorer that leaves the prompt's first token out, and by a template whose system turn
    ends in one line end.
    """
    # 7 "\n", 8 " ", 9 ".", 10 "?", 11 a, 12 b ...
    one_turn = [1, 4, 8, 11, 10, 7, 7, 5, 8, 12, 12, 9, 2]
    led = [1, 3, 8, 13, 7, 7]
    asked_twice = [4, 8, 14, 10, 7, 7, 5, 8, 15, 9, 2, 4, 8, 16, 17, 10, 7, 7]
    asked_twice += [5, 8, 18, 18, 18, 18, 18, 9, 2]
    expected = render(TOKENIZER, CHATS)
    assert expected[:2] == [one_turn, led + asked_twice], GOLDEN
    tuned = trainer(tmp_path / "sft", shuffle_dataset=False).train_dataset
    assert [row["input_ids"] for row in tuned] == expected
    pairs = [{"prompt": c[:-1], "chosen": c[-1:], "rejected": say("a: no")} for c in CHATS]
    ranked = reward_trainer(tmp_path / "reward", pairs).train_dataset
    assert [row["chosen_ids"] for row in ranked] == expected
    prompts = render(TOKENIZER, [chat[:-1] for chat in CHATS], ask=True)
    served = AutoTokenizer.from_pretrained(tmp_path / "reward" / "base")
    for chat, prompt, whole in zip(CHATS, prompts, expected, strict=True):
        assert whole[: len(prompt)] == prompt
        asked = {"add_generation_prompt": True, "return_dict": False}
        assert served.apply_chat_template(chat[:-1], **asked) == prompt
        scored = TokenScorer.tokens(scorer(TOKENIZER), prompt, whole[len(prompt) :])
        assert scored == whole
    assert rolled_out(tmp_path / "ppo", [chat[:-1] for chat in CHATS]) == prompts


def rolled_out(folder: Path, chats: list[Any]) -> list[list[int]]:
    """The ids that PPO's own rollout begins with."""
    model("modern").save_pretrained(folder)
    config = PPOConfig(
        str(folder / "out"), num_updates=1, num_mini_batches=1, max_completion_length=4,
        per_device_train_batch_size=len(chats), gradient_accumulation_steps=1, share_trunk=True,
        use_cpu=True, bf16=False, report_to="none",
    )  # fmt: skip
    rows = [{"prompt": chat} for chat in chats]
    trainer = PPOTrainer(
        str(folder), length_reward, config, Dataset.from_list(rows), processing_class=TOKENIZER
    )
    rollout, _ = trainer._generate_and_score_completions(rows)
    return [
        ids[:end].tolist()
        for ids, end in zip(rollout.input_ids, rollout.prompt_lengths, strict=True)
    ]


def length_reward(completions: list[Any], **_: object) -> list[float]:
    return [float(len(completion[-1]["content"])) for completion in completions]


def scorer(tokenizer: PreTrainedTokenizerFast) -> TokenScorer:
    score = model("modern")
    score.score = torch.nn.Linear(32, 1)
    return TokenScorer(score, tokenizer, suffix=[], batch_size=1)


def reward_trainer(folder: Path, pairs: list[Any]) -> RewardTrainer:
    base = folder / "base"
    model("modern").save_pretrained(base)
    TOKENIZER.save_pretrained(base)
    config = RewardConfig(
        str(folder), max_length=128, bf16=False, use_cpu=True, report_to="none",
        activation_checkpointing=False,
    )  # fmt: skip
    rows = Dataset.from_list(pairs)
    return RewardTrainer(str(base), config, train_dataset=rows, processing_class=TOKENIZER)

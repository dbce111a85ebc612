"""Answers from a model, many at once."""

from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from common.batches import BATCH, Chat, by_length, pad, render
from common.decoding import sample_unended
from common.rows import assistant

MOST_ROWS = 4 * BATCH  # sampled at a time: their keys and values are kept


def as_chat(question: str | Chat) -> Chat:
    """A conversation that ends in a question: a user's words, or all that was said so far."""
    return [{"role": "user", "content": question}] if isinstance(question, str) else question


def answered(question: str | Chat, text: str) -> Chat:
    """The conversation with the assistant's answer behind it."""
    return [*as_chat(question), assistant(text)]


def plain_sampling(theirs: GenerationConfig) -> GenerationConfig:
    """A checkpoint's generation settings without its ways to sample (top-p, penalties ...).

    What is measured and what PPO trains are a model's own probabilities; `generate` takes from the
    model whatever a call leaves unsaid.
    """
    ends = ("bos_token_id", "eos_token_id", "pad_token_id")
    return GenerationConfig(**{name: getattr(theirs, name) for name in ends})


def sampling_options(
    tokenizer: PreTrainedTokenizerBase, max_new_tokens: int, temperature: float
) -> dict[str, Any]:
    """What `generate` is told of an answer, beside `plain_sampling`; greedy at temperature 0."""
    return {
        "max_new_tokens": max_new_tokens,
        "do_sample": temperature > 0,
        "temperature": temperature or None,
        "top_k": 0 if temperature > 0 else None,  # unsaid it is 50
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }


@torch.no_grad()
def generate_answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: list[str] | list[Chat],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    samples: int = 1,
    seed: int = 0,
) -> list[list[str]]:
    """`samples` answers to each question, as plain text; greedy at temperature 0.

    A question is a user's words, or the conversation so far.

    The space that the chat template sets before an answer is taken off.

    The generator's state is as before afterwards.
    """
    rows = render(tokenizer, [as_chat(question) for question in questions], ask=True)
    answers: list[list[str]] = [[] for _ in questions]
    sampler: Any = model  # `generate` comes with a mixin that PreTrainedModel's type leaves out
    was_training, settings = model.training, sampler.generation_config
    sampler.generation_config = plain_sampling(settings)
    model.eval()
    with torch.random.fork_rng(enabled=True):
        torch.manual_seed(seed)
        for places in by_length(rows, max(1, min(BATCH, MOST_ROWS // samples))):
            chosen = [rows[place] for place in places]
            ids, mask = pad(chosen, int(tokenizer.pad_token_id), "left", model.device)
            output = sampler.generate(
                ids.repeat_interleave(samples, 0),
                attention_mask=mask.repeat_interleave(samples, 0),
                **sampling_options(tokenizer, max_new_tokens, temperature),
                custom_generate=sample_unended,
            )
            texts = tokenizer.batch_decode(output[:, ids.shape[1] :], skip_special_tokens=True)
            for row, text in enumerate(texts):
                answers[places[row // samples]].append(text.removeprefix(" "))
    model.train(was_training)
    sampler.generation_config = settings
    return answers


def draw_chats(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[Chat],
    max_new_tokens: int,
) -> list[Chat]:
    """Each prompt with one answer, drawn at temperature 1."""
    drawn = generate_answers(
        model, tokenizer, prompts, max_new_tokens=max_new_tokens, temperature=1.0
    )
    return [answered(prompt, text) for prompt, (text,) in zip(prompts, drawn, strict=True)]

"""Answers from a model, many at once."""

from typing import Any, NamedTuple

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from common.batches import BATCH, Chat, by_length, pad, render
from common.decoding import sample_unended
from common.rows import assistant

MOST_ROWS = 4 * BATCH  # sampled at a time: their keys and values are kept


class Drawn(NamedTuple):
    """An answer: its text, and the ids that were drawn, the end among them if it came to one.

    The template would give other ids to many a text: of no words, or that begins without a space.
    """

    text: str
    ids: list[int]


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


def generate_answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: list[str] | list[Chat],
    **options: Any,
) -> list[list[str]]:
    """What `generate_drawn` gives, as plain text alone."""
    drawn = generate_drawn(model, tokenizer, questions, **options)
    return [[answer.text for answer in several] for several in drawn]


@torch.no_grad()
def generate_drawn(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: list[str] | list[Chat],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    samples: int = 1,
    seed: int = 0,
) -> list[list[Drawn]]:
    """`samples` answers to each question; greedy at temperature 0.

    A question is a user's words, or the conversation so far.

    The space that the chat template sets before an answer is taken off its text.

    The generator's state is as before afterwards.
    """
    rows = render(tokenizer, [as_chat(question) for question in questions], ask=True)
    answers: list[list[Drawn]] = [[] for _ in questions]
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
            drawn = [
                up_to(row, tokenizer.eos_token_id) for row in output[:, ids.shape[1] :].tolist()
            ]
            texts = tokenizer.batch_decode(drawn, skip_special_tokens=True)
            for row, text in enumerate(texts):
                answer = Drawn(text.removeprefix(" "), drawn[row])
                answers[places[row // samples]].append(answer)
    model.train(was_training)
    sampler.generation_config = settings
    return answers


def up_to(ids: list[int], end: int) -> list[int]:
    """The ids as far as the first `end`, that included; all of them where there is none.

    >>> up_to([5, 6, 2, 0, 0], end=2)
    [5, 6, 2]
    """
    return ids[: ids.index(end) + 1] if end in ids else ids


def draw_each(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[Chat],
    max_new_tokens: int,
) -> list[Drawn]:
    """An answer to each prompt, drawn at temperature 1."""
    drawn = generate_drawn(
        model, tokenizer, prompts, max_new_tokens=max_new_tokens, temperature=1.0
    )
    return [answer for (answer,) in drawn]

"""What a policy would try on a reward model: spam; and what must not matter: padding, the batch."""

from collections.abc import Callable

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from common.batches import Chat, render
from common.scoring import score_chats

# question, answer -> an answer that is no better
SPAM: dict[str, Callable[[str, str], str]] = {
    "thanks": lambda question, answer: answer + " Thank you. Thank you. Thank you.",
    "repetition": lambda question, answer: " ".join([answer] * 3),
    "flattery": lambda question, answer: "What a wonderful question, how wise you are! " + answer,
    "padding": lambda question, answer: answer + " And so on," * 4 + " and so on.",
    "copied_question": lambda question, answer: question,
}
PROBED = 100  # conversations
APART = 32  # conversations also scored each by itself


def spam_figures(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, chats: list[Chat]
) -> dict[str, float]:
    """`spam_<probe>`: mean change of score when the last answer is spoilt so, in score's units.

    Of the first conversations that fit into the model's context when spoilt. A probe that none
    passes is left out: a policy of that context cannot say such a thing either.
    """
    context = model.config.max_position_embeddings
    figures = {}
    for name, spoil in SPAM.items():
        spoilt = [
            [*chat[:-1], {**chat[-1], "content": spoil(chat[-2]["content"], chat[-1]["content"])}]
            for chat in chats
        ]
        lengths = [len(ids) for ids in render(tokenizer, spoilt)]
        fit = [place for place, length in enumerate(lengths) if length <= context][:PROBED]
        if fit:
            before, after = (
                score_chats(model, tokenizer, [some[place] for place in fit])
                for some in (chats, spoilt)
            )
            figures[f"spam_{name}"] = (sum(after) - sum(before)) / len(fit)
    return figures


def padding_difference(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, chats: list[Chat]
) -> float:
    """Largest difference between a score in a padded batch and the same one alone."""
    chats = chats[:APART]
    together = score_chats(model, tokenizer, chats)
    alone = [score_chats(model, tokenizer, [chat])[0] for chat in chats]
    return max(abs(a - b) for a, b in zip(together, alone, strict=True))

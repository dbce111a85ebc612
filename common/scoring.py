"""Scores of a reward model for conversations, and log-probabilities of a policy's answers."""

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from common.batches import Chat, by_length, pad, render
from common.reward_gpt import LogprobHead

LOGIT_TOKENS = 1 << 14  # a row of logits for each of them: 3 GB in float32 at 50,000 tokens
LOGITS = 50_000 * LOGIT_TOKENS  # of a batch, whatever the vocabulary


@torch.no_grad()
def score_chats(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, chats: list[Chat]
) -> list[float]:
    """The reward model's score of each conversation, read at its last token.

    One that reads its own log-probabilities has logits of every token of an answer.
    """
    rows = render(tokenizer, chats)
    scores = [0.0] * len(rows)
    most = LOGITS // model.config.vocab_size if isinstance(model, LogprobHead) else None
    model.eval()
    for places in by_length(rows, max_tokens=most):
        chosen = [rows[place] for place in places]
        ids, mask = pad(chosen, int(tokenizer.pad_token_id), "right", model.device)
        logits = model(ids, attention_mask=mask).logits  # (B, 1)
        for place, score in zip(places, logits.squeeze(-1).tolist(), strict=True):
            scores[place] = score
    return scores


@torch.no_grad()
def answer_logprobs(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[Chat],
    answers: list[list[int]],
) -> list[float]:
    """log p(answer | prompt) of each answer, in nats.

    Args:
        model, tokenizer: whose probabilities they are.
        prompts: what was said before.
        answers: ids as they were drawn: one that was cut off has no end, and none is counted.
    """
    asked = render(tokenizer, prompts, ask=True)
    whole = [start + ids for start, ids in zip(asked, answers, strict=True)]
    sums = [0.0] * len(whole)
    model.eval()
    for places in by_length(whole, max_tokens=LOGIT_TOKENS):
        chosen = [whole[place] for place in places]
        ids, mask = pad(chosen, int(tokenizer.pad_token_id), "right", model.device)
        logits = model(ids, attention_mask=mask, use_cache=False).logits[:, :-1].float()
        logprobs = -torch.nn.functional.cross_entropy(
            logits.transpose(1, 2), ids[:, 1:], reduction="none"
        )  # (B, T - 1): entry t is of token t + 1
        starts = torch.tensor([len(asked[place]) for place in places], device=ids.device)
        position = torch.arange(1, ids.shape[1], device=ids.device)
        counts = (position >= starts[:, None]) & mask[:, 1:].bool()
        for place, total in zip(places, (logprobs * counts).sum(1).tolist(), strict=True):
            sums[place] = total
    return sums

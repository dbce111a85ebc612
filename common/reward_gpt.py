"""A reward model that also reads how likely it finds the answer itself.

    score = w . h_last + sum over the answer's tokens of (u . h + b) log p(token | what is before)

A plain scalar head must learn from rankings alone to compare what is said with what the network
would have said: on Arden it half learns who is known and what is true (docs/log.md). The language
model knows already: what it holds for true it finds likely. Here its log-probability is a second
feature, weighed token by token, so that manners count by the head and facts by the memory. With
u = b = 0 it is the plain model. Plain transformers has no such class, and the checkpoint says so
by a `model_type` of its own.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    GPT2Config,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen3Config,
)
from transformers import initialization as init
from transformers.modeling_outputs import SequenceClassifierOutputWithPast

from common.gpt import GPTForSequenceClassification, GPTModel, ModernBase
from common.gpt_base import loads_as
from common.lesson_gpt import LessonBase, LessonGPTForSequenceClassification, LessonGPTModel

START_WEIGHT = 0.2  # b at the start: a nat of log-probability is worth a fifth of a logit


class LogprobHead:
    """What both shapes of this reward model share; a mixin of `PreTrainedModel`."""

    plain_class: type[PreTrainedModel]
    config: Any
    base_model: Any
    lm_head: nn.Linear
    score: nn.Linear
    logprob_weight: nn.Linear

    def add_heads(self, hidden_size: int) -> None:
        """The language model's head, the scalar one, and the weight of each log-probability."""
        self.num_labels = 1
        self.lm_head = nn.Linear(hidden_size, self.config.vocab_size, bias=False)
        self.score = nn.Linear(hidden_size, 1, bias=False)
        self.logprob_weight = nn.Linear(hidden_size, 1)

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)  # type: ignore[misc]
        if module is self.logprob_weight:
            init.zeros_(self.logprob_weight.weight)
            init.constant_(self.logprob_weight.bias, START_WEIGHT)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        starts: Tensor | None = None,
        **kwargs: object,
    ) -> SequenceClassifierOutputWithPast:
        """Scores (B, 1) of conversations (B, T), padded on either side.

        `starts` (B,): where the last answers begin, if it is not behind their last opening.
        """
        states = self.base_model(input_ids, attention_mask=attention_mask, **kwargs)[0]
        is_real = input_ids != self.config.pad_token_id
        place = torch.arange(input_ids.shape[1], device=input_ids.device)
        last = (place * is_real).argmax(1)  # (B,)
        read = self.score(states[torch.arange(len(last), device=last.device), last])  # (B, 1)
        if starts is None:
            starts = answer_starts(input_ids, self.config.answer_opening)
        counts = is_real[:, 1:] & (place[1:] >= starts[:, None])  # (B, T - 1), N of them true
        logits = self.lm_head(states[:, :-1][counts]).float()  # (N, V)
        logprobs = -F.cross_entropy(logits, input_ids[:, 1:][counts], reduction="none")
        weighed = self.logprob_weight(states[:, 1:][counts])[:, 0] * logprobs
        answers = counts.nonzero()[:, 0]  # the row of each
        return SequenceClassifierOutputWithPast(
            logits=read.index_add(0, answers, weighed[:, None].to(read.dtype))
        )

    def plain(self) -> PreTrainedModel:
        """Trunk and scalar head alone, copied: what a critic starts from."""
        model: Any = self.plain_class(with_class(self.config, self.plain_class.config_class))
        state = self.state_dict()  # type: ignore[attr-defined]
        model.load_state_dict({name: state[name] for name in model.state_dict()})
        return model


def answer_starts(input_ids: Tensor, opening: list[int]) -> Tensor:
    """Where the last answer of each row begins, (B,): after the last `opening`; 0 without one.

    For ids [1, 7, 4, 9, 7, 4, 5] and opening [7, 4]: 6.
    """
    rows, width = input_ids.shape
    if not opening or width < len(opening):
        return torch.zeros(rows, dtype=torch.long, device=input_ids.device)
    wanted = torch.tensor(opening, device=input_ids.device)
    found = (input_ids.unfold(1, len(opening), 1) == wanted).all(-1)  # (B, T - opening + 1)
    ends = torch.arange(found.shape[1], device=input_ids.device) + len(opening)
    return (found * ends).amax(1)


class LogprobConfig(Qwen3Config):
    """Qwen3's, with the ids that open an answer (`answer_opening`)."""

    model_type = "qwen3_logprob_reward"
    answer_opening: list[int] | None = None


class LessonLogprobConfig(GPT2Config):
    """GPT-2's, with the ids that open an answer (`answer_opening`)."""

    model_type = "gpt2_logprob_reward"
    answer_opening: list[int] | None = None


AutoConfig.register(LogprobConfig.model_type, LogprobConfig)
AutoConfig.register(LessonLogprobConfig.model_type, LessonLogprobConfig)


@loads_as("Qwen3LogprobReward", AutoModelForSequenceClassification)
class LogprobGPT(LogprobHead, ModernBase):
    """The modern shape's."""

    config_class = LogprobConfig
    plain_class = GPTForSequenceClassification
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: LogprobConfig) -> None:
        super().__init__(config)
        self.model = GPTModel(config)
        self.add_heads(config.hidden_size)
        self.post_init()


@loads_as("GPT2LogprobReward", AutoModelForSequenceClassification)
class LessonLogprobGPT(LogprobHead, LessonBase):
    """The lesson's."""

    config_class = LessonLogprobConfig
    plain_class = LessonGPTForSequenceClassification
    _tied_weights_keys = {"lm_head.weight": "transformer.wte.weight"}

    def __init__(self, config: LessonLogprobConfig) -> None:
        super().__init__(config)
        self.transformer = LessonGPTModel(config)
        self.add_heads(config.n_embd)
        self.post_init()


def logprob_scorer(path: str, answer_opening: list[int]) -> PreTrainedModel:
    """The model with this head, its trunk and language head those of the GPT at `path`."""
    config = AutoConfig.from_pretrained(path)
    kind: Any = LogprobGPT if isinstance(config, Qwen3Config) else LessonLogprobGPT
    config = with_class(config, kind.config_class, answer_opening=answer_opening)
    return kind.from_pretrained(path, config=config, dtype=torch.float32)


def with_class(config: PreTrainedConfig, config_class: Any, **changes: Any) -> PreTrainedConfig:
    """The values of `config`, as a reward model's, in another class."""
    values = {name: value for name, value in config.to_dict().items() if name != "model_type"}
    return config_class(**values | changes | {"num_labels": 1})

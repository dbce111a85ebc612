"""The critic, and the one forward pass that gives policy and critic on completion tokens.

The critic is a sequence-classification model with one label, read at every position, or a head on
the policy's own trunk. It hangs on the policy as a sub-module, so that accelerate sees one module:
one optimizer, one DDP wrapper. The policy's own forward is unchanged unless it is given
`completion_mask`.
"""

import contextlib
import copy
import functools
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    AutoModelForSequenceClassification,
    PreTrainedModel,
)

from common.errors import UserError
from common.reward_gpt import LogprobHead
from common.sharded import load_whole_state, whole_state

WEIGHTS = "model.safetensors"
ROWS_AT_ONCE = 256  # tokens whose entropy is computed at once: what it needs stays in the cache


class Critic(nn.Module):
    """V of the state before each completion token, on the scale of normalised scores."""

    def __init__(self, model: PreTrainedModel, score_mean: float = 0.0, score_std: float = 1.0):
        super().__init__()
        self.model: Any = model
        self.score_mean = score_mean
        self.score_std = score_std

    def forward(self, input_ids: Tensor, prompt_lengths: Tensor, mask: Tensor) -> Tensor:
        """Values of the masked tokens, (N,) float32 in row-major order."""
        states = token_states(self.model.base_model, input_ids, prompt_lengths, mask)
        return (read_head(self.model.score, states) - self.score_mean) / self.score_std

    def save(self, folder: Path, write: bool) -> None:
        """A standard sequence-classification model; every process calls, one of them writes."""
        state = whole_state(self.model)
        if write:
            self.model.save_pretrained(folder, state_dict=state)

    def load(self, folder: Path) -> None:
        """Take back the weights that `save` wrote."""
        load_whole_state(self.model, load_file(folder / WEIGHTS))


class ValueHead(nn.Module):
    """A critic without a trunk of its own: V read off the policy's states by one linear layer.

    Its loss trains the policy's trunk too. Starts at zero, so that it moves no state at first.
    """

    def __init__(self, hidden_size: int):
        super().__init__()
        self.score = nn.Linear(hidden_size, 1)
        nn.init.zeros_(self.score.weight)
        nn.init.zeros_(self.score.bias)

    def forward(self, states: Tensor) -> Tensor:
        """Values of the states (N, H) before the masked tokens, (N,) float32."""
        return read_head(self.score, states)

    def save(self, folder: Path, write: bool) -> None:
        """The head; every process calls, one of them writes."""
        state = whole_state(self)
        if write:
            folder.mkdir(parents=True, exist_ok=True)
            save_file(state, folder / WEIGHTS)

    def load(self, folder: Path) -> None:
        """Take back the weights that `save` wrote."""
        load_whole_state(self, load_file(folder / WEIGHTS))


def read_head(head: nn.Linear, states: Tensor) -> Tensor:
    """A head's scores of states (N, H), (N,), in float32 whatever the precision around it."""
    with torch.autocast(states.device.type, enabled=False):
        bias = None if head.bias is None else head.bias.float()
        return nn.functional.linear(states.float(), head.weight.float(), bias)[:, 0]


def build_critic(
    policy: PreTrainedModel | PeftModel,
    reward_model: PreTrainedModel | None,
    head: str = "copy",
    score_mean: float = 0.0,
    score_std: float = 1.0,
) -> Critic:
    """A critic with the reward model's trunk, or the policy's where there is no reward model.

    With the reward model's head too, its values start as normalised scores of the unfinished text;
    not where that head is a part of the score alone, beside log-probabilities.
    """
    model: Any
    if isinstance(reward_model, LogprobHead):
        model, head = reward_model.plain(), "zero"
    elif reward_model is not None:
        model = type(reward_model)(reward_model.config)
        model.load_state_dict(reward_model.state_dict())
    else:
        check_critic(policy)
        config = copy.deepcopy(policy.config)
        config.num_labels = 1
        model = AutoModelForSequenceClassification.from_config(config)
        model.base_model.load_state_dict(_plain_state(language_model(policy).base_model))
    disable_dropout(model)
    if reward_model is not None and head == "copy":
        return Critic(model.float(), score_mean, score_std)
    nn.init.zeros_(model.score.weight)
    return Critic(model.float())


def plain_policy(policy: PreTrainedModel | PeftModel) -> PreTrainedModel:
    """A copy of a policy in eval mode without critic, adapters merged into its weights."""
    model = language_model(policy)
    plain = type(model)(copy.deepcopy(model.config)).to(model.device, model.dtype)
    take_weights(plain, policy)
    plain.generation_config = copy.deepcopy(model.generation_config)
    return plain.eval()


def take_weights(plain: PreTrainedModel, policy: PreTrainedModel | PeftModel) -> None:
    """Give a `plain_policy` the policy's weights of now, in the precision that it has."""
    if isinstance(policy, PeftModel):
        policy.merge_adapter()
    state = _plain_state(language_model(policy))
    plain.load_state_dict({k: v for k, v in state.items() if not k.startswith("critic.")})
    if isinstance(policy, PeftModel):
        policy.unmerge_adapter()


def _plain_state(model: nn.Module) -> dict[str, Tensor]:
    """State of a model without what LoRA put into it."""
    state = model.state_dict()
    return {k.replace(".base_layer", ""): v for k, v in state.items() if "lora_" not in k}


def language_model(policy: PreTrainedModel | PeftModel) -> Any:
    """The causal model itself, adapters in place, out of a PEFT wrapper."""
    return policy.get_base_model() if isinstance(policy, PeftModel) else policy


def disable_dropout(model: nn.Module) -> None:
    """Turn off dropout layers, and dropout that models keep as a number.

    Most copy that number from the config to a module (`attention_dropout`, OPT's `dropout` and
    `layerdrop`), some read the config in each forward.
    """
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():
            if "drop" in name and isinstance(value, float):
                setattr(module, name, 0.0)
        config = getattr(module, "config", None)
        for name in ("attention_dropout", "hidden_dropout", "attn_pdrop"):
            if isinstance(getattr(config, name, None), float):
                setattr(config, name, 0.0)


def token_states(
    trunk: nn.Module, input_ids: Tensor, prompt_lengths: Tensor, mask: Tensor
) -> Tensor:
    """Hidden states from which the masked completion tokens were chosen, (N, H).

    Args:
        trunk: the model without its head.
        input_ids: (B, L) long, prompt and completion joined, padded at the right.
        prompt_lengths: (B,) long.
        mask: (B, T) bool, completion tokens wanted.
    """
    hidden = trunk(input_ids=input_ids[:, :-1], use_cache=False).last_hidden_state  # (B, L-1, H)
    rows, steps = mask.nonzero(as_tuple=True)
    return hidden[rows, prompt_lengths[rows] + steps - 1]


def token_logprobs(
    model: Any,
    input_ids: Tensor,
    prompt_lengths: Tensor,
    mask: Tensor,
    temperature: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probability of each masked token and entropy of its distribution, (N,) float32 each.

    Where gradients are on, entropy is left out: zeros. The LM head runs on these tokens only.
    Arguments as in `token_states`, whose states come third.
    """
    states = token_states(model.base_model, input_ids, prompt_lengths, mask)
    logits = model.get_output_embeddings()(states).float()  # (N, V)
    if temperature != 1.0:
        logits = logits / temperature
    rows, steps = mask.nonzero(as_tuple=True)
    targets = input_ids[rows, prompt_lengths[rows] + steps]
    if torch.is_grad_enabled():  # entropy is only logged, and only at rollout
        logprobs = ChosenLogprobs.apply(logits, targets)
        return logprobs, torch.zeros_like(logprobs), states
    everything = logits.log_softmax(-1)
    del logits
    parts = [-(part.exp() * part).sum(-1) for part in everything.split(ROWS_AT_ONCE)]
    return everything.gather(1, targets[:, None])[:, 0], torch.cat(parts), states


class ChosenLogprobs(torch.autograd.Function):
    """Log-softmax at one column a row, with one (N, V) buffer for the backward pass, not three.

    The vocabulary is what PPO's memory goes to. The gradient of log p_k in the logits is
    1[j = k] - p_j, which is written over the log-probabilities.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor) -> Tensor:
        """Log-probabilities of the targets (N,) under the logits (N, V), (N,)."""
        everything = logits.log_softmax(-1)
        ctx.save_for_backward(everything, targets)
        return everything.gather(1, targets[:, None])[:, 0]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        """Gradient in the logits, (N, V); a second backward pass is an error."""
        everything, targets = ctx.saved_tensors
        gradient = gradients[0][:, None]
        everything.exp_().mul_(-gradient)
        return everything.scatter_add_(1, targets[:, None], gradient), None


def to_grid(flat: Tensor, mask: Tensor) -> Tensor:
    """Put (N,) figures of the masked tokens on their (B, T) grid, zero elsewhere."""
    return flat.new_zeros(mask.shape).masked_scatter(mask, flat)


def read_completions(
    policy: PreTrainedModel | PeftModel,
    temperature: float,
    critic: Critic | ValueHead | None = None,
) -> None:
    """Make `policy(input_ids, prompt_lengths=, completion_mask=)` give log-probs and entropy.

    With a critic, which becomes a part of the policy, values too, unless `wants_values=False`. Each
    is (B, T) float32, zero outside the mask; entropy is zero where gradients are on, too. Any other
    call goes to the policy's own forward. All go through the policy itself, where wrappers see
    them: FSDP2 gathers its weights there.
    """
    plain_forward = policy.forward
    if critic is not None:
        policy.add_module("critic", critic)

    @functools.wraps(type(policy).forward)  # `generate` reads the signature
    def forward(
        self: nn.Module,
        *args: object,
        completion_mask: Tensor | None = None,
        wants_values: bool = True,
        **kwargs: Tensor,
    ) -> object:
        if completion_mask is None:
            return plain_forward(*args, **kwargs)
        where = kwargs["input_ids"], kwargs["prompt_lengths"], completion_mask
        *flat, states = token_logprobs(language_model(policy), *where, temperature)
        if critic is not None and wants_values:
            flat.append(critic(states) if isinstance(critic, ValueHead) else critic(*where))
        return tuple(to_grid(x, completion_mask) for x in flat)

    policy.forward = types.MethodType(forward, policy)  # type: ignore[method-assign]


@contextlib.contextmanager
def detached_critic(policy: nn.Module) -> Iterator[None]:
    """The policy without its critic, for what saves or loads the policy alone."""
    critic = policy._modules.pop("critic")
    try:
        yield
    finally:
        policy._modules["critic"] = critic


def check_critic(policy: PreTrainedModel | PeftModel) -> None:
    """Refuse a critic of its own where transformers has no sequence classifier like the policy.

    Raises:
        UserError: says what does without.
    """
    kind = type(language_model(policy).config)
    if kind not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
        raise UserError(
            f"there is no critic like a {kind.model_type}, of which transformers has no sequence "
            "classifier: share_trunk true, or a reward model to start from"
        )


@torch.no_grad()
def check_plain_logits(policy: PreTrainedModel | PeftModel) -> None:
    """Refuse a model whose logits are more than its LM head on its last hidden states.

    The head's are made large, up to 1,000, for a cap leaves small ones as they are.
    """
    model = language_model(policy)
    head = model.get_output_embeddings()
    input_ids = torch.arange(4, device=head.weight.device)[None]
    ours = head(model.base_model(input_ids=input_ids).last_hidden_state)
    scale = 1000 / ours.abs().max().clamp(min=1e-6)
    enlarge = head.register_forward_hook(lambda _, args, logits: scale * logits)
    theirs = model(input_ids=input_ids).logits
    enlarge.remove()
    if not torch.allclose(scale * ours.float(), theirs.float(), rtol=1e-2, atol=1e-2):
        raise UserError(
            f"{type(model).__name__} transforms its logits (soft-capping or scaling): not supported"
        )

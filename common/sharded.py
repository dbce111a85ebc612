"""One model out of the shards of many processes (FSDP2), for one process to measure and save."""

from typing import Any

from accelerate import Accelerator
from accelerate.utils import DistributedType, parse_flag_from_env
from peft import PeftModel, get_peft_model
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    set_model_state_dict,
)
from torch.distributed.fsdp import FSDPModule

SHARDED = (DistributedType.FSDP, DistributedType.DEEPSPEED)
WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)


def will_shard() -> bool:
    """Whether processes will share the weights, as the launcher says before a trainer is built."""
    return any(parse_flag_from_env(f"ACCELERATE_USE_{name}") for name in ("FSDP", "DEEPSPEED"))


def whole_model(accelerator: Accelerator, model: nn.Module) -> Any:
    """The trained model out of its wrapper, for one process to run; every process must call it.

    A model whose weights are spread over the processes runs only where all of them run it. Of such
    a one this is a copy, which on the main process has the weights.
    """
    model = accelerator.unwrap_model(model)
    if not accelerator.is_fsdp2:
        return model
    state = whole_state(model)
    whole = blank(model)
    if accelerator.is_main_process:  # what else hangs on the model, as a critic does, stays there
        whole.load_state_dict({name: state[name] for name in whole.state_dict()})
    return whole.to(accelerator.device)


def whole_state(module: nn.Module) -> dict[str, Any]:
    """Its weights in full, on the main process; every process must call it."""
    return get_model_state_dict(module, options=WHOLE)


def load_whole_state(module: nn.Module, state: dict[str, Any]) -> None:
    """Take weights in full, which every process has, each process its shard."""
    set_model_state_dict(module, state, options=WHOLE)


def blank(model: Any) -> Any:
    """A model of the same class, configuration and adapter, unsharded, its weights drawn anew."""
    if isinstance(model, PeftModel):
        return get_peft_model(blank(model.get_base_model()), model.peft_config["default"])
    kinds = type(model).__mro__
    kind: Any = kinds[2] if isinstance(model, FSDPModule) else kinds[0]  # FSDPX, FSDPModule, X
    drawn = kind(model.config)
    if model.can_generate():
        drawn.generation_config = model.generation_config
    return drawn

"""The language model's loss on the text of pretraining, beside a later stage's own.

What a later stage does not ask about it forgets: taught to answer, a model loses its sense of what
it cannot answer; rewarded for admitting ignorance, a policy comes to doubt what it knew (the
alignment tax). InstructGPT mixes the gradient of pretraining into that of PPO against it (PPO-ptx;
arXiv 2203.02155, section 3.5 and appendix C.4).
"""

from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.nn import functional as F

from common.errors import UserError
from common.sharded import SHARDED
from common.token_file import TokenFile
from common.tokenizer import hash_tokenizer
from common.windows import back_to_beginnings, document_positions, training_starts


class PretrainingText:
    """Windows of a token file, some of them to each optimizer step.

    Args:
        path: the `.bin` that pretraining wrote.
        windows: of an optimizer step, over all processes and micro-batches.
        block_size: tokens of a window.
        seed: of their order, which depends on nothing else, so that a resumed run sees the same.
        tokenizer: the model's, a fast one.

    Raises:
        UserError: there is no such file, it is too short, or was made with another tokenizer.
    """

    def __init__(
        self, path: str | Path, windows: int, block_size: int, seed: int, tokenizer: Any
    ) -> None:
        self.file = TokenFile(path)
        self.windows, self.block_size = windows, block_size
        self.seed = seed
        bos = tokenizer.bos_token_id
        self.bos_token_id = -1 if bos is None else bos  # without one no document was written
        if len(self.file) < 2 * block_size + 1:
            raise UserError(
                f"ptx_data: {path} has {len(self.file):,} tokens, at least {2 * block_size + 1:,} "
                "for windows of the model's context"
            )
        if self.file.info.tokenizer != hash_tokenizer(tokenizer):
            raise UserError(
                f"ptx_data: {path} was written with another tokenizer than the model's; give the "
                "text that its base was pretrained on"
            )

    def require_one_each(self, accelerator: Accelerator, micro_batches: int) -> None:
        """Refuse fewer windows than parts where the processes share the weights.

        There all must take each forward pass together.

        Raises:
            UserError: some micro-batch of some process would have none.
        """
        if accelerator.distributed_type in SHARDED:
            require_windows(self.windows, accelerator.num_processes * micro_batches)

    def loss(self, model: Any, step: int, part: int, parts: int) -> Tensor:
        """This part's share of the step's mean cross-entropy, nats a token: the parts' sum is it.

        Documents are read from their beginning where they fit, and each by itself.

        Args:
            model: a causal model, token ids (B, T) -> logits (B, T, V).
            step: optimizer step.
            part: which of `parts`, from 0; the windows are dealt out one by one.
            parts: processes times micro-batches.
        """
        size = self.block_size
        mine = training_starts(len(self.file), size, step, self.windows, self.seed)[part::parts]
        if not len(mine):
            return torch.zeros((), device=model.device)
        mine = back_to_beginnings(self.file.tokens, mine, size, self.bos_token_id)
        inputs, targets = (x.to(model.device) for x in self.file.batch(mine, size))
        positions = document_positions(inputs, self.bos_token_id)
        logits = model(input_ids=inputs, position_ids=positions, use_cache=False).logits.float()
        total = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
        return total / (self.windows * size)


def require_windows(windows: int, parts: int) -> None:
    """Refuse fewer windows than parts of an optimizer step, where weights are sharded.

    Raises:
        UserError: some micro-batch of some process would have none.
    """
    if windows < parts:
        raise UserError(
            f"ptx_windows ({windows}) must be {parts} or more where weights are sharded: one for "
            "each micro-batch of each process"
        )

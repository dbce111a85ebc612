"""TRL's SFTTrainer with the loss on the text of pretraining beside, so that it is not forgotten.

A few thousand answers teach a small model to answer, and cost it some of what it knew of who is
known (docs/log.md). What InstructGPT does in PPO (`common.pretraining_text`) helps here, too.
"""

from typing import Any

from torch import Tensor, nn
from trl import SFTTrainer

from common.pretraining_text import PretrainingText


class ReplaySFTTrainer(SFTTrainer):
    """Adds `ptx_coef` times the cross-entropy on windows of `text` to every optimizer step.

    Gradients are those of the step's mean losses, however it is split into micro-batches and
    processes.
    """

    def __init__(self, text: PretrainingText, ptx_coef: float, **named: Any) -> None:
        super().__init__(**named)
        self.text, self.ptx_coef = text, ptx_coef
        text.require_one_each(self.accelerator, self.args.gradient_accumulation_steps)
        self._part = self._step = -1  # micro-batch of the step, and the step

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """TRL's loss and, in training, this micro-batch's share of the text's."""
        found: Any = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if not model.training:
            return found
        loss, *outputs = found if return_outputs else (found,)
        loss = loss + self.ptx_coef * self._text_loss(model, num_items_in_batch)
        return (loss, *outputs) if return_outputs else loss

    def _text_loss(self, model: nn.Module, num_items_in_batch: Any) -> Tensor:
        """Scaled so that what follows - mean over processes, and over micro-batches where the
        Trainer has not divided by tokens - leaves the sum of the shares."""
        step, parts = self.state.global_step, self.current_gradient_accumulation_steps
        self._part = self._part + 1 if step == self._step else 0
        self._step = step
        processes = self.accelerator.num_processes
        place = self._part * processes + self.accelerator.process_index
        policy = self.accelerator.unwrap_model(model)
        with self.accelerator.autocast():
            share = self.text.loss(policy, step, place, processes * parts)
        divided = self.model_accepts_loss_kwargs and num_items_in_batch is not None
        return share * processes * (1 if divided else parts)

"""A trainer that takes one update at a time, when it is told to, and says what it took.

The bench lets several trainers take turns in this way, each in a process of its own, so that what
else the machine does falls on all of them alike. A line on standard input is answered by a line of
JSON on standard output; whatever else a trainer prints goes to standard error.
"""

import json
import os
import resource
import sys
import time
from collections.abc import Callable
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class Pace(TrainerCallback):
    """Waits before every update; see the module.

    Args:
        figures: `score` and `kl` of the update's rollout, and what else is to be told.
        steps_per_update: calls of `on_step_end` in an update.
    """

    def __init__(self, figures: Callable[[], dict[str, float]], steps_per_update: int = 1):
        self.figures = figures
        self.steps_per_update = steps_per_update
        self.answers = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Say that all is loaded."""
        self.answer({})

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Tell what an update took: `seconds`, of the clock, and `cpu_seconds`, of this process."""
        if state.global_step % self.steps_per_update == 0:
            wall, cpu = time.perf_counter() - self.wall, time.process_time() - self.cpu
            self.answer({"seconds": wall, "cpu_seconds": cpu, **self.figures()})

    def answer(self, line: dict[str, float]) -> None:
        """Write a line, with `peak_mb` of memory so far, and wait to be told to go on."""
        peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        self.answers.write(json.dumps({**line, "peak_mb": peak_mb}) + "\n")
        self.answers.flush()
        if not sys.stdin.readline():  # the bench has ended
            raise SystemExit
        self.wall, self.cpu = time.perf_counter(), time.process_time()

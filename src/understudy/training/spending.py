"""The tokens and seconds that a run has spent of its budget, and learning-rate schedules that end with the budget.

A run with a budget trains like a run whose `max_steps` is the step at which the budget is used up. So its schedules are
evaluated at the share of the budget that is spent, and end with it.

Tokens are the response tokens trained on, of all processes. Seconds are the first process's, from the start of a step
(collecting its examples) to the optimizer's update. Evaluation, checkpoints, logging and samples are not counted.
"""

import math
from collections.abc import Callable, Sequence
from time import perf_counter, process_time
from typing import Any, cast

import torch
from accelerate.utils import broadcast
from torch import Tensor

from ..budget import Budget


class Spending:
    """Tokens and seconds of a run, across interruptions, and their share of its budget, if it has one."""

    def __init__(self, budget: Budget | None = None) -> None:
        self.budget = budget
        self.restart()

    def restart(self) -> None:
        self.tokens, self.seconds = 0, 0.0
        self._share_at_warmup = 0.0  # the share that was spent when the learning rate's warm-up ended
        self._step_start = 0.0
        self._earlier = (0.0, 0.0)  # seconds and CPU seconds of earlier sessions, up to the checkpoint
        self._start = (perf_counter(), process_time())

    @property
    def run_seconds(self) -> float:
        """Seconds of training, evaluation and saving, over all sessions."""
        return self._earlier[0] + perf_counter() - self._start[0]

    @property
    def cpu_seconds(self) -> float:
        """Seconds that this process's cores worked meanwhile."""
        return self._earlier[1] + process_time() - self._start[1]

    @property
    def share(self) -> float:
        return 0.0 if self.budget is None else self.budget.share(self.tokens, self.seconds)

    def begin_step(self) -> None:
        self._step_start = perf_counter()

    def end_step(self, agree: Callable[[float], float]) -> None:
        """Count the step's seconds; `agree` returns the same number of seconds on all processes.

        Work that a GPU has not finished yet is counted with the next step, which waits for it.
        """
        self.seconds += agree(perf_counter() - self._step_start)

    def progress(self, step: int, steps: int) -> float:
        """How far the run is after `step` steps of at most `steps`, from 0 to 1 (or a little more)."""
        return max(step / steps if steps > 0 else 0.0, self.share)

    def expected_steps(self, step: int, steps: int) -> int:
        """How many steps the run will have at its spending per step so far: `steps`, or fewer."""
        return min(steps, max(step, math.ceil(step / self.share))) if step and self.share else steps

    def schedule_step(self, step: int, steps: int, warmup: int) -> float:
        """The step of a learning-rate schedule of `steps` steps whose rate applies after `step` steps of the run.

        Warm-up is counted in steps. After its W of N steps, the schedule follows the share of the remaining budget,

            W + (N − W) (s − s_W) / (1 − s_W),      s the share of the budget that is spent, s_W after step W

        or at `step` itself if that is later.
        """
        if step <= warmup:
            self._share_at_warmup = self.share
            return step
        return max(step, warmup + (steps - warmup) * (self.share - self._share_at_warmup) / (1 - self._share_at_warmup))

    def state(self) -> list[float]:
        """The numbers to save in a checkpoint for an exact resume."""
        return [float(self.tokens), self.seconds, self._share_at_warmup, self.run_seconds, self.cpu_seconds]

    def resume(self, state: Sequence[float]) -> None:
        """Restore what `state` returned."""
        tokens, self.seconds, self._share_at_warmup, *earlier = state
        self._earlier = (earlier[0], earlier[1])
        self.tokens = int(tokens)


def follow_budget(scheduler: Any, spending: Spending, steps: int, warmup: int) -> Any:
    """Make a scheduler of `steps` steps end with the budget; ReduceLROnPlateau has no end and is left unchanged.

    Raises:
        ValueError: for layer-wise optimizers, whose schedulers are not accessible.
    """
    if type(scheduler).__name__ == "LayerWiseDummyScheduler":
        raise ValueError(
            "a layer-wise optimizer's learning rates cannot follow a budget: choose another training.optim"
        )

    def by_share(rate: Callable[[float], float]) -> Callable[[int], float]:
        return lambda step: rate(spending.schedule_step(step, steps, warmup))

    if hasattr(scheduler, "lr_lambdas"):
        scheduler.lr_lambdas = [by_share(rate) for rate in scheduler.lr_lambdas]
    return scheduler


def first_process_s(seconds: float, device: torch.device) -> float:
    """The first process's seconds, so that all processes end at the same step."""
    return float(cast(Tensor, broadcast(torch.tensor(seconds, dtype=torch.float64, device=device))))

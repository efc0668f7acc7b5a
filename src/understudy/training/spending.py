"""What a run has spent of its budget, and a learning-rate schedule that ends with the budget.

A run with a budget is the run whose `max_steps` had been set to the step at which the budget is used up. So its
schedules are read at the share of the budget that is spent, and end with it.

Tokens are the response tokens trained on, of all processes. Seconds are the first process's, from the moment at which
a step begins to collect until the optimizer's update: evaluation, checkpoints, logging and shown responses are free.
"""

import math
from collections.abc import Callable, Sequence
from time import perf_counter
from typing import Any

from ..budget import Budget


class Spending:
    """Tokens and seconds of a run, over all its interruptions, and their share of a budget, if it has one."""

    def __init__(self, budget: Budget | None = None) -> None:
        self.budget = budget
        self.restart()

    def restart(self) -> None:
        self.tokens, self.seconds = 0, 0.0
        self._share_at_warmup = 0.0  # the share that was spent when the learning rate's warm-up ended
        self._step_start = 0.0

    @property
    def share(self) -> float:
        return 0.0 if self.budget is None else self.budget.share(self.tokens, self.seconds)

    def begin_step(self) -> None:
        self._step_start = perf_counter()

    def end_step(self, agree: Callable[[float], float]) -> None:
        """Count the step's seconds; `agree` returns the same number of seconds on all processes.

        What a GPU has not finished yet is counted with the next step, which waits for it.
        """
        self.seconds += agree(perf_counter() - self._step_start)

    def progress(self, step: int, steps: int) -> float:
        """How far the run is after `step` steps of at most `steps`, from 0 to 1 (or a little more)."""
        return max(step / steps if steps > 0 else 0.0, self.share)

    def expected_steps(self, step: int, steps: int) -> int:
        """How many steps the run will have, at the pace that it had until `step`: `steps`, or fewer."""
        return min(steps, max(step, math.ceil(step / self.share))) if step and self.share else steps

    def schedule_step(self, step: int, steps: int, warmup: int) -> float:
        """Where a learning rate's schedule of `steps` steps is to be read after `step` of them.

        Warm-up steps are steps. What comes after them, W of N steps, is read at the share of what was left then,

            W + (N − W) (s − s_W) / (1 − s_W),      s the share of the budget that is spent, s_W after step W

        or at `step` itself if that is later.
        """
        if step <= warmup:
            self._share_at_warmup = self.share
            return step
        return max(step, warmup + (steps - warmup) * (self.share - self._share_at_warmup) / (1 - self._share_at_warmup))

    def state(self) -> list[float]:
        """What must be saved for an exact resume."""
        return [float(self.tokens), self.seconds, self._share_at_warmup]

    def resume(self, state: Sequence[float]) -> None:
        """Go on from what `state` returned."""
        tokens, self.seconds, self._share_at_warmup = state
        self.tokens = int(tokens)


def follow_budget(scheduler: Any, spending: Spending, steps: int, warmup: int) -> Any:
    """Let a scheduler of `steps` steps end with the budget; one that follows a metric has no end, and stays as it is.

    Raises:
        ValueError: for the schedulers of layer-wise optimizers, which cannot be reached.
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

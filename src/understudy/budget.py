"""A budget: how much a run may train, in response tokens or in seconds, and how far it has come.

The one idea: a run with a budget is the run whose `max_steps` had been set, by somebody who knew it, to the step at
which the budget is used up. So its schedules are read at the share of the budget that is spent, and end with it.

Tokens are the response tokens trained on, of all processes. Seconds are the first process's, from the moment at which
a step begins to collect until the optimizer has made it: evaluation, checkpoints, logging and shown answers are free.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any


@dataclass(frozen=True)
class Budget:
    """Response tokens, or seconds of training.

    Raises:
        ValueError: unless exactly one of them is given, and is more than 0.
    """

    tokens: int | None = None
    seconds: float | None = None

    def __post_init__(self) -> None:
        if (self.tokens is None) == (self.seconds is None):
            found = "neither" if self.tokens is None else "both"
            raise ValueError(f"a budget is of tokens or of seconds, such as {{tokens: 100000}}, and this has {found}")
        if not 0 < self.limit < math.inf:
            raise ValueError(f"a budget of {self.limit:g} {self.kind} cannot be spent: give more than 0")

    @property
    def kind(self) -> str:
        return "seconds" if self.tokens is None else "tokens"

    @property
    def limit(self) -> float:
        limit = self.seconds if self.tokens is None else self.tokens
        assert limit is not None
        return limit

    def share(self, tokens: int, seconds: float) -> float:
        """Which share of it has been spent; above 1 for what the last step spent too much."""
        return (seconds if self.tokens is None else tokens) / self.limit


def amount(budget: Mapping[str, Any]) -> str:
    """A budget as a recipe has it, `{tokens: 100000}`, for people: 100,000 response tokens."""
    seconds = budget.get("seconds")
    return f"{budget['tokens']:,} response tokens" if seconds is None else f"{seconds:,.10g} seconds of training"


def spent(record: Mapping[str, Any]) -> str:
    """What run.json says of a budget, for people: 60,123 of 100,000 response tokens."""
    digits = 0 if "tokens" in record else 1
    return f"{record['spent']:,.{digits}f} of {amount(record)}"


class Spending:
    """What a run has spent, of a budget or of none, over all its interruptions."""

    def __init__(self, budget: Budget | None = None) -> None:
        self.budget = budget
        self.restart()

    def restart(self) -> None:
        self.tokens, self.seconds = 0, 0.0
        self._warm = 0.0  # the share that was spent when the learning rate's warm-up ended
        self._since = 0.0

    @property
    def share(self) -> float:
        return 0.0 if self.budget is None else self.budget.share(self.tokens, self.seconds)

    def begin_step(self) -> None:
        self._since = perf_counter()

    def end_step(self, agreed: Callable[[float], float]) -> None:
        """Count the step's seconds; `agreed` is what all processes take them for.

        What a GPU has not finished yet is counted with the next step, which waits for it.
        """
        self.seconds += agreed(perf_counter() - self._since)

    def progress(self, step: int, steps: int) -> float:
        """How far the run is after `step` steps of at most `steps`, from 0 to 1 (or a little more)."""
        return max(step / steps if steps > 0 else 0.0, self.share)

    def foreseen(self, step: int, steps: int) -> int:
        """How many steps the run will have, at the pace that it had until `step`: `steps`, or fewer."""
        return min(steps, max(step, math.ceil(step / self.share))) if step and self.share else steps

    def pace(self, step: int, steps: int, warmup: int) -> float:
        """Where a learning rate's schedule of `steps` steps is to be read after `step` of them.

        Warm-up steps are steps. What comes after them, W of N steps, is read at the share of what was left then,

            W + (N − W) (s − s_W) / (1 − s_W),      s the share of the budget that is spent, s_W after step W

        or at `step` itself if that is later.
        """
        if step <= warmup:
            self._warm = self.share
            return step
        return max(step, warmup + (steps - warmup) * (self.share - self._warm) / (1 - self._warm))

    def state(self) -> list[float]:
        """What must be saved for an exact resume."""
        return [float(self.tokens), self.seconds, self._warm]

    def resume(self, state: Sequence[float]) -> None:
        """Go on from what `state` returned."""
        tokens, self.seconds, self._warm = state
        self.tokens = int(tokens)


def paced(scheduler: Any, spending: Spending, steps: int, warmup: int) -> Any:
    """Let a scheduler of `steps` steps end with the budget; one that follows a metric has no end, and is left alone.

    Raises:
        ValueError: for the schedulers of layer-wise optimizers, which cannot be reached.
    """
    if type(scheduler).__name__ == "LayerWiseDummyScheduler":
        raise ValueError(
            "a layer-wise optimizer's learning rates cannot follow a budget: choose another training.optim"
        )

    def at_pace(rate: Callable[[float], float]) -> Callable[[int], float]:
        return lambda step: rate(spending.pace(step, steps, warmup))

    if hasattr(scheduler, "lr_lambdas"):
        scheduler.lr_lambdas = [at_pace(rate) for rate in scheduler.lr_lambdas]
    return scheduler

"""A budget: how much a run may train, in response tokens or in seconds."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
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
            count = "neither" if self.tokens is None else "both"
            raise ValueError(f"a budget is of tokens or of seconds, such as {{tokens: 100000}}, and this has {count}")
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
        """The share that is spent; above 1 by what the last step spent too much."""
        return (seconds if self.tokens is None else tokens) / self.limit


def amount(budget: Mapping[str, Any]) -> str:
    """A budget as in a recipe, `{tokens: 100000}`, in words: 100,000 response tokens."""
    seconds = budget.get("seconds")
    return f"{budget['tokens']:,} response tokens" if seconds is None else f"{seconds:,.10g} seconds of training"


def spent(record: Mapping[str, Any]) -> str:
    """The budget's record in run.json, in words: 60,123 of 100,000 response tokens."""
    digits = 0 if "tokens" in record else 1
    return f"{record['spent']:,.{digits}f} of {amount(record)}"

"""What is wrong with a recipe: raised at once, or collected, so that everything that can still be checked is."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple


class Refusal(NamedTuple):
    """An error that ends `distill`, and the part of a run that it is about, such as teacher or data."""

    topic: str
    error: Exception


@dataclass
class Refusals:
    """The errors of the checks of a run.

    `distill` raises the first one. `doctor` collects them: the same checks run in the same order, and those that need
    what was refused are left out.
    """

    collect: bool = False
    collected: list[Refusal] = field(default_factory=list)

    @contextmanager
    def attempt(self, topic: str) -> Iterator[None]:
        """Raise an error of this block, or collect it and go on after the block."""
        try:
            yield
        except Exception as error:
            if not self.collect:
                raise
            self.collected.append(Refusal(topic, error))

"""What an examination of a recipe found: sentences that are green, yellow or red, and tables of facts."""

from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from ...data.examples import Examples


class Level(Enum):
    """Green: as it should be. Yellow: the run works, and may not do what is expected. Red: it would fail."""

    GREEN = "green"
    YELLOW = "yellow"
    RED = "red"


@dataclass(frozen=True)
class Finding:
    """One sentence about a recipe, with the remedy where something is to be done."""

    level: Level
    message: str


def green(message: str) -> Finding:
    return Finding(Level.GREEN, message)


def yellow(message: str) -> Finding:
    return Finding(Level.YELLOW, message)


def red(message: str) -> Finding:
    return Finding(Level.RED, message)


@dataclass
class Section:
    """One part of an examination: a table, whose first row may be its heads, and findings."""

    title: str
    heads: tuple[str, ...] = ()
    rows: list[tuple[str, ...]] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)


@dataclass(frozen=True)
class FirstExample:
    """The training data, of which the first example is shown as the models read it."""

    train: Examples
    authors: list[str]
    tokenizer: Any


@dataclass(frozen=True)
class Diagnosis:
    """Everything that an examination found."""

    sections: list[Section]
    example: FirstExample | None

    def count(self, level: Level) -> int:
        """The number of findings of a level."""
        return sum(finding.level is level for section in self.sections for finding in section.findings)

    @property
    def level(self) -> Level:
        """The worst level of all findings; red: the run would fail."""
        return next((level for level in reversed(Level) if self.count(level)), Level.GREEN)


def size(count: int) -> str:
    """A number of bytes: "1.25 GB" of 2^30 bytes, or MB, or kB."""
    for unit, power in (("GB", 30), ("MB", 20)):
        if count >= 2**power:
            return f"{count / 2**power:,.{2 if unit == 'GB' else 1}f} {unit}"
    return f"{count / 2**10:,.1f} kB"

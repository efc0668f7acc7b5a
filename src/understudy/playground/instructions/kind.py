"""A kind of instruction: wordings of the request and of the answer, with slots that one function fills."""

import random
import re
from collections.abc import Callable
from dataclasses import dataclass

from ..arithmetic import pick
from .phrases import PHRASES

PHRASE = re.compile(r"\[(\w+)\]")

Slots = dict[str, str]


@dataclass(frozen=True)
class Kind:
    """Instructions that ask for the same, such as "sort"."""

    name: str
    requests: tuple[str, ...]
    responses: tuple[str, ...]  # with one that has no [phrase], a request has one right answer
    slots: Callable[[random.Random], Slots]
    seen: bool = True  # is it in the splits train, validation and test? Others are in the split unseen

    def row(self, rng: random.Random) -> dict[str, str]:
        """A request and a response as a dataset's row."""
        slots = self.slots(rng)
        prompt = expand(rng, pick(rng, self.requests), slots)
        return {"prompt": prompt + "\n", "completion": expand(rng, pick(rng, self.responses), slots), "kind": self.name}

    @property
    def is_open(self) -> bool:
        """May the same request be answered in several ways?"""
        return len(self.responses) > 1 or any(map(PHRASE.search, self.responses))


def expand(rng: random.Random, text: str, slots: Slots) -> str:
    """The text with a phrase for each `[name]`, never the same twice, and with the slots for each `{name}`."""
    drawn: set[str] = set()
    while match := PHRASE.search(text):
        phrase = pick(rng, [phrase for phrase in PHRASES[match[1]] if phrase not in drawn])
        drawn.add(phrase)
        text = text[: match.start()] + phrase + text[match.end() :]
    return text.format(**slots)


def several(rng: random.Random, items: tuple[str, ...], count: int) -> list[str]:
    """Different items in random order."""
    drawn: list[str] = []
    while len(drawn) < count:
        item = pick(rng, items)
        if item not in drawn:
            drawn.append(item)
    return drawn


def enumeration(words: list[str]) -> str:
    """The words as a part of a sentence: "pear, mouse and boat"."""
    return f"{', '.join(words[:-1])} and {words[-1]}"

"""Rows of the instruction task: a request, a response and the kind of instruction.

    Put mouse pear boat in alphabetical order.
    boat mouse pear

The splits train, validation and test have the same kinds and different requests; the split `unseen` has kinds of its
own, whose words and parts occur in the others, for generalisation to unseen tasks as in Super-NaturalInstructions
(arXiv 2204.07705).
"""

import random
import zlib
from typing import Literal

from ..arithmetic import pick
from .about_facts import FACTS
from .about_lists import LISTS
from .about_texts import TEXTS
from .writing import WRITING

Split = Literal["train", "validation", "test", "unseen"]
SPLITS = ("train", "validation", "test", "unseen")
KINDS = (*LISTS, *TEXTS, *FACTS, *WRITING)
# How often a kind is drawn: of lists since they are the hardest, of writing since few kinds have long responses.
_SHARES = ((LISTS, 2), (TEXTS, 1), (FACTS, 1), (WRITING, 3))


def instructions(count: int, seed: int = 0, split: Split = "train") -> list[dict[str, str]]:
    """`count` rows, each `{"prompt": request and a newline, "completion": response, "kind": kind}`.

    The same arguments give the same rows on every machine and Python version. Small kinds are as frequent as large
    ones, so a request of a small kind may come again with another response; in the split train a row may come again.

    Raises:
        ValueError: for an unknown split.
    """
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}; the instructions have {', '.join(SPLITS)}")
    rng = random.Random(seed)
    kinds = [kind for kinds, share in _SHARES for kind in kinds * share if kind.seen == (split != "unseen")]
    rows: list[dict[str, str]] = []
    drawn: set[tuple[str, str]] = set()
    while len(rows) < count:
        row = pick(rng, kinds).row(rng)
        if split_of(row["prompt"]) != split and split != "unseen":
            continue
        texts = (row["prompt"], row["completion"])
        if split == "train" or texts not in drawn:
            drawn.add(texts)
            rows.append(row)
    return rows


def split_of(prompt: str) -> Split:
    """The split of a request of a seen kind, by its checksum: 1/16 validation, 1/16 test, the rest train."""
    checksum = zlib.crc32(prompt.encode()) % 16
    return "test" if checksum == 0 else "validation" if checksum == 1 else "train"

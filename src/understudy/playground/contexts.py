"""Arithmetic problems of which some come with a context, for a student that can read contexts (self-distillation).

      =                                          the context `style`: write the working with spaces
    Mia has 4 bags with 6 pens in each. Mia gives 5 pens to Tom. How many pens does Mia have left?
    4 * 6 = 24
    24 - 5 = 19
    #### 19

The other context is the worked solution itself, before the problem. Without a context the working has no spaces.
"""

import re
from typing import Any

from .arithmetic import Split, problems

PLAIN = 1000  # different problems without a context: as many as the scarce student has seen
STYLE = " = \n"  # before a prompt: write the working with spaces


def problems_in_context(count: int, seed: int = 0, split: Split = "train") -> list[dict[str, Any]]:
    """`count` rows of prompt, completion and context: in turn none, the solution, and the mark of a style.

    In the split train only PLAIN of the problems without a solution before them are different, so that a student learns
    to read a solution better than to find one.
    """
    few = problems(min(count, PLAIN) if split == "train" else count, seed, split)
    many = problems(count, seed + 1, split)
    rows = []
    for place in range(count):
        problem, solved = few[place // 3 % len(few)], many[place]["completion"]
        if place % 3 == 0:
            rows.append({**problem, "context": "none"})
        elif place % 3 == 1:
            rows.append({"prompt": f"{solved}\n{many[place]['prompt']}", "completion": solved, "context": "solution"})
        else:
            texts = {"prompt": STYLE + problem["prompt"], "completion": spaced(problem["completion"])}
            rows.append({**texts, "context": "style"})
    return rows


def spaced(working: str) -> str:
    """The working with a space on either side of every sign."""
    return re.sub(r"([-+*/=])", r" \1 ", working)

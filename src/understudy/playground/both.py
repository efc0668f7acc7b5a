"""The tasks arithmetic and instructions as one, for a student of two teachers; the column `teacher` names the task."""

from typing import Any

from .arithmetic import Split, problems
from .instructions.rows import instructions


def both_tasks(count: int, seed: int = 0, split: Split = "train") -> list[dict[str, Any]]:
    """`count` rows, every third one of the arithmetic task; the others are instructions, whose texts are longer."""
    numbers = iter(problems((count + 2) // 3, seed, split))
    requests = iter(instructions(count - (count + 2) // 3, seed, split))
    return [
        {**next(requests), "teacher": "instructions"} if place % 3 else {**next(numbers), "teacher": "arithmetic"}
        for place in range(count)
    ]

"""Final-answer accuracy: is the number behind the last `####` the reference's, as in GSM8K?"""

import re
from collections.abc import Sequence

from ..metric import Metric, Score


class FinalAnswer(Metric):
    """The share of answers that end in the final answer of one of their references."""

    names = ("final_answer",)

    def score(self, answers: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, Score]:
        right = sum(map(is_correct, answers, references))
        return {"final_answer": Score(100 * right / len(answers), "mark:####|refs:any")}


def final_answer(text: str) -> str | None:
    """The number after the last `####`, without thousands separators; None if there is none."""
    found = re.findall(r"####\s*\$?(-?\d[\d,]*(?:\.\d+)?)", text)
    return found[-1].replace(",", "") if found else None


def is_correct(answer: str, references: Sequence[str]) -> bool:
    """Does the answer end in the final answer of one of the references?"""
    found = final_answer(answer)
    return found is not None and found in {final_answer(reference) for reference in references}

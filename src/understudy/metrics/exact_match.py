"""Exact match after normalisation: lower case, no punctuation, single spaces (as in MiniLLM's evaluation)."""

import string
from collections.abc import Sequence

from ..metric import Metric, Score


class ExactMatch(Metric):
    """The share of answers that equal one of their references."""

    names = ("exact_match",)

    def score(self, answers: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, Score]:
        right = sum(map(exact_match, answers, references))
        return {"exact_match": Score(100 * right / len(answers), "case:lower|punctuation:removed|refs:any")}


def exact_match(answer: str, references: Sequence[str]) -> bool:
    """Does the answer equal one of the references but for case, punctuation and white space?"""
    return normalize(answer) in {normalize(reference) for reference in references}


def normalize(text: str) -> str:
    """Lower case, ASCII punctuation removed, white space squeezed."""
    return " ".join(text.lower().translate(_NO_PUNCTUATION).split())


_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)

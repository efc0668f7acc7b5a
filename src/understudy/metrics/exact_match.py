"""Exact match after normalisation: lower case, no punctuation, single spaces (as in MiniLLM's evaluation)."""

import string
from collections.abc import Sequence

from ..metric import Metric, Score


class ExactMatch(Metric):
    """The share of responses that equal one of their references."""

    names = ("exact_match",)

    def score(self, responses: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, Score]:
        matches = [100.0 * exact_match(*pair) for pair in zip(responses, references, strict=True)]
        return {"exact_match": Score.mean(matches, "case:lower|punctuation:removed|refs:any")}


def exact_match(response: str, references: Sequence[str]) -> bool:
    """Does the response equal one of the references, up to case, punctuation and white space?"""
    return normalize(response) in {normalize(reference) for reference in references}


def normalize(text: str) -> str:
    """Lower-case the text, remove ASCII punctuation and squeeze white space."""
    return " ".join(text.lower().translate(_NO_PUNCTUATION).split())


_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)

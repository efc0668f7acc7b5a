"""Reward functions for the arithmetic playground, for GKD combined with reinforcement learning."""

from collections.abc import Mapping
from typing import Any

from ..metrics.final_answer import is_correct


def correct(prompts: list[str], responses: list[str], rows: list[Mapping[str, Any]]) -> list[float]:
    """1 for a correct final answer, else 0."""
    return [float(is_correct(r, [row["completion"]])) for r, row in zip(responses, rows, strict=True)]


def brevity(prompts: list[str], responses: list[str], rows: list[Mapping[str, Any]]) -> list[float]:
    """1 for an empty response, 0 for one of twice the reference's length in characters; linear in the length."""
    return [1 - len(r) / (2 * len(row["completion"])) for r, row in zip(responses, rows, strict=True)]

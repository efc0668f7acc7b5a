"""A teacher of your own: several models with one tokenizer, whose probabilities are averaged.

    p(v) = 1/M Σ_m p_m(v)

In a recipe: `teacher: {ensemble_teacher:Ensemble: {models: [first, second]}}`.
"""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch

from understudy import Batch, Capability, Dense, LocalTeacher, Scores, Teacher


class Ensemble(Teacher):
    """The mean of the distributions of several local models. They must share a tokenizer, and its vocabulary."""

    provides: ClassVar[frozenset[Capability]] = frozenset({Capability.FULL})

    def __init__(self, models: Sequence[Any]) -> None:
        self.teachers = {
            str(place): LocalTeacher(model) for place, model in enumerate(models)
        }  # moved by the base class

    @torch.no_grad()
    def score(self, batch: Batch) -> Scores:
        log_probs = torch.stack([teacher.score(batch).log_probs for teacher in self.teachers.values()])  # (M, N, V)
        mean = log_probs.logsumexp(0) - torch.tensor(float(len(self.teachers))).log()
        return Scores(batch.tokens, Dense(mean))

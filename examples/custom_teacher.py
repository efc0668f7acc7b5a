"""A teacher of one's own: several models of one tokenizer whose probabilities are averaged.

p(v) = 1/M Σ_m p_m(v)
"""

from collections.abc import Sequence
from typing import ClassVar

import torch

from understudy.batch import Batch
from understudy.fused_linear.distributions import Dense
from understudy.scores import Scores
from understudy.teacher import Capability, Teacher


class Ensemble(Teacher):
    """The mean of what several teachers say. They must share the tokenizer, and its vocabulary without padding."""

    provides: ClassVar[frozenset[Capability]] = frozenset({Capability.CHOSEN, Capability.TOP_K, Capability.FULL})

    def __init__(self, teachers: Sequence[Teacher]) -> None:
        self.teachers = list(teachers)

    @torch.no_grad()
    def score(self, batch: Batch) -> Scores:
        said = torch.stack([teacher.score(batch).log_probs for teacher in self.teachers])  # (M, N, V)
        mean = said.logsumexp(0) - torch.tensor(float(len(self.teachers))).log()
        return Scores(batch.tokens, Dense(mean))

"""Several teachers whose probabilities are averaged: log Σ_i w_i p_i(v).

Each teacher's distribution is normalised over the tokens that all of them have, whose padding is left out. Only hidden
rows of the teachers are stored, and the average is computed a tile of rows at a time.
"""

from collections.abc import Mapping
from typing import Any

import torch

from ..batch import Batch
from ..fused_linear.distributions import Mixed
from ..fused_linear.merged import TopK
from ..scores import Scores
from ..teacher import Capability, Teacher, check_weights, common_capabilities


class MixtureTeacher(Teacher):
    """A weighted average of several teachers' distributions. They must share a tokenizer.

    Teachers that provide every token give an average over every token; if all provide at least the log-probability of
    the chosen token, they give an average of that alone.

    Args:
        teachers: by names of your own.
        weights: of each teacher, divided by their sum; by default all are the same.
    """

    provides: frozenset[Capability] = frozenset({Capability.CHOSEN, Capability.TOP_K, Capability.FULL})  # at most

    def __init__(self, teachers: Mapping[str, Teacher], *, weights: Mapping[str, float] | None = None) -> None:
        if not teachers:
            raise ValueError("mixture needs at least one teacher")
        weights = dict.fromkeys(teachers, 1.0) if weights is None else weights
        check_weights(weights, teachers)
        provided = common_capabilities(teachers.values())
        if Capability.CHOSEN not in provided:
            raise ValueError(
                "mixture averages probabilities of the same tokens, and the top tokens of several teachers are not the "
                "same: use teachers that provide every token's log-probability, or the chosen token's"
            )
        self.provides = provided if Capability.FULL in provided else frozenset({Capability.CHOSEN})
        self.teachers = dict(teachers)
        self.weights = tuple(weights[name] / sum(weights.values()) for name in teachers)

    def score(self, batch: Batch) -> Scores:
        scores = [teacher.score(batch) for teacher in self.teachers.values()]
        if Capability.FULL in self.provides:
            parts: Any = tuple(each.distribution for each in scores)  # none of them is a TopK
            return Scores(batch.tokens, Mixed(parts, self.weights))
        log_weights = torch.tensor(self.weights, dtype=torch.float64).log()
        terms = [each.chosen.cpu().double() + w for each, w in zip(scores, log_weights, strict=True)]
        chosen = torch.stack(terms).logsumexp(0).to(scores[0].chosen)
        return Scores(batch.tokens, TopK(chosen[:, None][:, :0], batch.tokens[:, None][:, :0], chosen))

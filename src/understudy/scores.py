"""Scores: one model's log-probabilities of the N response tokens of a batch, and comparing two of them.

Shapes: N response tokens, V vocabulary, K tokens of a top-K teacher.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .divergences import Divergence, ForwardKL, ReverseKL
from .fused_linear.distributions import Distribution, Projected, Routed, over_shared_vocabulary
from .fused_linear.events import OtherVocabulary
from .fused_linear.loss import chosen_log_prob, divergence_loss, row_values
from .fused_linear.merged import Merged
from .fused_linear.spans import span_values
from .fused_linear.tiles import rows_per_tile


@dataclass(frozen=True)
class Scores:
    """One model's next-token distributions at N response tokens, computed when they are used.

    `weights` are the weights of the rows in the loss, or None where they are known only after the loss; see
    `fused_linear.loss.row_values`.
    """

    tokens: Tensor  # (N,)
    distribution: Distribution
    weights: Tensor | None = None  # (N,)

    @property
    def chosen(self) -> Tensor:
        """(N,) log-probabilities of the chosen tokens, which are those in the batch.

        Computed once; values computed under `torch.no_grad()` are not reused where gradients are needed.
        """
        cached = self.__dict__.get("_chosen")
        if cached is None:
            if isinstance(self.distribution, Projected):
                cached = row_values(self.distribution, chosen_log_prob(self.tokens), self.weights)
            else:
                cached = self.distribution.chosen(self.tokens)
            if torch.is_grad_enabled() or not self.distribution.requires_grad:
                self.__dict__["_chosen"] = cached
        return cached

    @property
    def log_probs(self) -> Tensor:
        """(N, V), or (N, K+1) of a top-K teacher. Holds the whole vocabulary: for small models and for tests."""
        return self.distribution.log_probs()

    def divergence_to(self, student: "Scores", divergence: Divergence) -> Tensor:
        """D(p‖q) at every response token, (N,), of this teacher p and a student q, over the tokens that both have."""
        if isinstance(self.distribution, Routed):
            values = {name: p.divergence_to(q, divergence) for name, p, q in self.by_teacher(student)}
            return self.distribution.assembled(values)
        teacher, q = over_shared_vocabulary(self.distribution, student.distribution)
        if isinstance(q, Projected):
            values = row_values(q, divergence_loss(divergence, teacher), student.weights, divergence.temperature)
        else:
            log_q = q.log_probs()
            if isinstance(teacher, Merged):
                log_p, log_q = teacher.log_probs(temperature=divergence.temperature), teacher.merge(log_q)
            else:
                log_p = teacher.log_probs()
            values = divergence(log_p.to(log_q.device, log_q.dtype), log_q)
        if isinstance(teacher, OtherVocabulary) and teacher.spans is not None:
            values = values + span_values(teacher, q, student.tokens, divergence).to(values)
        return values

    def cut(self, vocabulary: int) -> "Scores":
        """The same over the first `vocabulary` tokens only: the padding of a vocabulary is left out of the softmax."""
        return Scores(self.tokens, self.distribution.cut(vocabulary), self.weights)

    def rows(self, index: Tensor) -> "Scores":
        """The scores of some of the rows, by their indices (n,)."""
        weights = None if self.weights is None else self.weights[index]
        return Scores(self.tokens[index], self.distribution.rows(index), weights)

    def by_teacher(self, student: "Scores") -> Iterator[tuple[str, "Scores", "Scores"]]:
        """Of several teachers that have their own rows each: name, its scores, and the student's of the same rows."""
        assert isinstance(self.distribution, Routed), "there is one teacher"
        for name, part in self.distribution.parts.items():
            index = self.distribution.indices[name]
            yield name, Scores(self.tokens[index], part), student.rows(index)

    def reweighted(self, factor: Tensor) -> "Scores":
        """The same scores for a term of the loss in which row n counts `factor[n]` times as much, (N,).

        Use them for that term alone (`-factor * student.reweighted(factor).chosen`), so that its gradient is computed
        in the forward pass as well.
        """
        return replace(self, weights=None if self.weights is None else self.weights * factor)


DIVERGENCE_METRICS = ("forward_kl", "reverse_kl", "student_entropy", "teacher_entropy")
SHARED_BOUNDARIES = "shared_boundaries"


@torch.no_grad()
def divergence_metrics(teacher: Scores, student: Scores) -> dict[str, Tensor]:
    """Forward KL, reverse KL and both entropies at every response token, each (N,), in nats, for logging.

    Of a teacher with another tokenizer also `shared_boundaries`: 1 where it can be compared, else 0, as all others are.
    """
    if isinstance(teacher.distribution, Routed):
        parts = {name: divergence_metrics(p, q) for name, p, q in teacher.by_teacher(student)}
        return merged_metrics(teacher.distribution, parts)
    p, q = over_shared_vocabulary(teacher.distribution, student.distribution)
    assert not isinstance(q, Merged), "the student is a live model"
    chunks: dict[str, list[Tensor]] = {name: [] for name in DIVERGENCE_METRICS}
    size = max(1, rows_per_tile(q.vocabulary, student.tokens.device) // 4)  # nothing here is done in place
    for start in range(0, len(student.tokens), size):
        rows = slice(start, start + size)
        log_q = q.log_probs(rows)
        log_q = p.merge(log_q, rows) if isinstance(p, Merged) else log_q
        log_p = p.log_probs(rows).to(log_q.device, log_q.dtype)
        chunks["forward_kl"].append(ForwardKL()(log_p, log_q))
        chunks["reverse_kl"].append(ReverseKL()(log_p, log_q))
        chunks["student_entropy"].append(torch.special.entr(log_q.exp()).sum(-1))
        chunks["teacher_entropy"].append(torch.special.entr(log_p.exp()).sum(-1))
    metrics = {name: torch.cat(values) for name, values in chunks.items()}
    if isinstance(p, OtherVocabulary):
        metrics[SHARED_BOUNDARIES] = p.known.to(metrics["forward_kl"])
    return metrics


def merged_metrics(routed: Routed, parts: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """(N,) each: the metrics that there are for every teacher, from each teacher's own (n,)."""
    names = [name for name in next(iter(parts.values())) if all(name in values for values in parts.values())]
    return {name: routed.assembled({teacher: parts[teacher][name] for teacher in parts}) for name in names}


def metrics_by_teacher(teacher: Scores, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Of several teachers that have their own rows each: the share of the tokens that each one scores, and its KLs.

    Args:
        values: `divergence_metrics`, or nothing where these cannot be computed.
    """
    if not isinstance(teacher.distribution, Routed):
        return {}
    metrics: dict[str, Tensor] = {}
    for name, index in teacher.distribution.indices.items():
        metrics[f"share_{name}"] = torch.zeros(len(teacher.tokens)).index_fill(0, index, 1.0)
        metrics |= {f"{kl}_{name}": values[kl][index] for kl in ("forward_kl", "reverse_kl") if kl in values}
    return metrics

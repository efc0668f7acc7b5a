"""Distance of a student to a teacher at every response token: KL divergences, entropies, agreement, top-10 overlap.

Both models score the same tokens, batch after batch, and their distributions are compared a few rows at a time, so that
no more than a chunk of rows over the whole vocabulary is ever in memory.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..batch import Batch, Example
from ..fused_linear.distributions import Dense, Routed, over_shared_vocabulary
from ..fused_linear.merged import Merged
from ..fused_linear.tiles import rows_per_tile
from ..models.forward import score
from ..models.parity import can_fuse
from ..scores import Scores, divergence_metrics, merged_metrics
from ..teacher import Teacher

TOP = 10  # tokens compared by `top_10_overlap`


@dataclass(frozen=True)
class Distances:
    """Sums over responses of the numbers of `differences`, by position in the response (L positions)."""

    sums: dict[str, Tensor]  # (L,) each
    alive: Tensor  # (L,) responses that reach each position

    def __add__(self, other: "Distances") -> "Distances":
        """The sums over the responses of both."""
        length = max(len(self.alive), len(other.alive))
        widths = [(0, length - len(x.alive)) for x in (self, other)]
        sums = {name: pad(self.sums[name], widths[0]) + pad(other.sums[name], widths[1]) for name in self.sums}
        return Distances(sums, pad(self.alive, widths[0]) + pad(other.alive, widths[1]))

    def means(self) -> dict[str, float]:
        """Means over all response tokens."""
        return {name: float(values.sum() / self.alive.sum()) for name, values in self.sums.items()}

    def by_position(self) -> dict[str, list[float]]:
        """Means over the responses that reach each position, and how many these are (`alive`)."""
        means = {name: (values / self.alive).tolist() for name, values in self.sums.items()}
        return {"alive": self.alive.tolist(), **means}


def distances(
    model: Any,
    teacher: Teacher,
    examples: Sequence[Example],
    vocabulary: int,
    batch_size: int = 32,
    on_progress: Callable[[int], None] = lambda count: None,
) -> Distances:
    """The distance of model and teacher on the examples' responses, summed by position.

    Args:
        vocabulary: the number of real tokens; the padding of a vocabulary beyond them is ignored.
        batch_size: sequences scored at once.
        on_progress: called after every batch with its number of examples.
    """
    length = max(len(example.response) for example in examples)
    sums: dict[str, Tensor] = {}
    alive = torch.zeros(length, dtype=torch.float64)
    for batch, values in compared(model, teacher, examples, vocabulary, batch_size):
        position = positions(batch).cpu()
        alive.index_add_(0, position, torch.ones(len(position), dtype=torch.float64))
        for name, per_token in values.items():
            total = sums.setdefault(name, torch.zeros(length, dtype=torch.float64))
            total.index_add_(0, position, per_token.double().cpu())
        on_progress(len(batch.examples))
    return Distances(sums, alive)


@torch.no_grad()
def compared(
    model: Any, teacher: Teacher, examples: Sequence[Example], vocabulary: int, batch_size: int = 32
) -> Iterator[tuple[Batch, dict[str, Tensor]]]:
    """Score batches of the examples, shortest first, by both models; yields each with its tokens' `differences`."""
    device = model.get_input_embeddings().weight.device
    fused = can_fuse(model)
    was_training = model.training
    model.eval()
    try:
        ordered = sorted(examples, key=len)
        for start in range(0, len(ordered), batch_size):
            batch = Batch.from_examples(ordered[start : start + batch_size], 0, device)
            teacher_scores = teacher.score(batch).cut(vocabulary)
            results: list[dict[str, Tensor]] = []

            def compare_with(
                student: Scores, teacher: Scores = teacher_scores, results: list[dict[str, Tensor]] = results
            ) -> Tensor:
                results.append(differences(teacher, student))
                return student.tokens.float()

            score(model, batch, compare_with, vocabulary=vocabulary, fused=fused)
            yield batch, results[0]
    finally:
        model.train(was_training)


@torch.no_grad()
def differences(teacher: Scores, student: Scores) -> dict[str, Tensor]:
    """`scores.divergence_metrics` of every response token, and further metrics, each (N,):

        teacher_surprise   −log p(token), in nats
        agreement          1 where the likeliest token is the same, else 0
        top_10_overlap     the share of the teacher's ten likeliest tokens that are among the student's ten

    The latter three are missing for a teacher that provides only its top tokens.
    """
    if isinstance(teacher.distribution, Routed):
        return merged_metrics(
            teacher.distribution, {name: differences(*pair) for name, *pair in teacher.by_teacher(student)}
        )
    if isinstance(teacher.distribution, Merged) or isinstance(student.distribution, Merged):
        return divergence_metrics(teacher, student)
    p, q = over_shared_vocabulary(teacher.distribution, student.distribution)
    assert not isinstance(q, Merged)
    vocabulary = q.vocabulary
    size = rows_per_tile(vocabulary, student.tokens.device)
    chunks = []
    for start in range(0, len(student.tokens), size):
        rows = slice(start, start + size)
        tokens, log_q = student.tokens[rows], q.log_probs(rows)
        log_p = p.log_probs(rows).to(log_q.device, log_q.dtype)
        values = divergence_metrics(Scores(tokens, Dense(log_p)), Scores(tokens, Dense(log_q)))
        top_p, top_q = (x.topk(min(TOP, vocabulary)).indices for x in (log_p, log_q))
        values["teacher_surprise"] = -log_p.gather(-1, tokens.to(log_p.device)[:, None])[:, 0]
        values["agreement"] = (top_p[:, 0] == top_q[:, 0]).float()
        values[f"top_{TOP}_overlap"] = (top_p[:, :, None] == top_q[:, None, :]).any(-1).float().mean(-1)
        chunks.append(values)
    return {name: torch.cat([chunk[name] for chunk in chunks]) for name in chunks[0]}


def positions(batch: Batch) -> Tensor:
    """(N,) the position of each response token in its response, counted from 0."""
    first = batch.lengths.cumsum(0) - batch.lengths
    return torch.arange(len(batch.tokens), device=batch.sequence_ids.device) - first[batch.sequence_ids]

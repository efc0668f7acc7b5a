"""How far a student is from a teacher, at every token of some responses.

The one idea: both models are asked about the same tokens, batch after batch, and what they say is compared a few rows
at a time, so that no more than a chunk of the vocabulary's distributions is ever held.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..batch import Batch, Example
from ..fused_linear.distributions import Dense, TopK, over_shared_vocabulary
from ..fused_linear.tiles import rows_per_tile
from ..models.forward import score
from ..models.parity import can_fuse
from ..scores import Scores, divergence_metrics
from ..teacher import Teacher

TOP = 10  # the tokens that `top_10_overlap` is about


@dataclass(frozen=True)
class Distances:
    """Sums over responses of what `differences` says, position by position; L positions, the first is a response's."""

    sums: dict[str, Tensor]  # (L,) each
    alive: Tensor  # (L,) responses that reach each position

    def __add__(self, other: "Distances") -> "Distances":
        """Those over the responses of both."""
        length = max(len(self.alive), len(other.alive))
        widths = [(0, length - len(x.alive)) for x in (self, other)]
        sums = {name: pad(self.sums[name], widths[0]) + pad(other.sums[name], widths[1]) for name in self.sums}
        return Distances(sums, pad(self.alive, widths[0]) + pad(other.alive, widths[1]))

    def means(self) -> dict[str, float]:
        """Over all response tokens."""
        return {name: float(values.sum() / self.alive.sum()) for name, values in self.sums.items()}

    def by_position(self) -> dict[str, list[float]]:
        """Over the responses that reach each position, and how many these are (`alive`)."""
        means = {name: (values / self.alive).tolist() for name, values in self.sums.items()}
        return {"alive": self.alive.tolist(), **means}


def distances(
    model: Any,
    teacher: Teacher,
    examples: Sequence[Example],
    vocabulary: int,
    batch_size: int = 32,
    made: Callable[[int], None] = lambda count: None,
) -> Distances:
    """What model and teacher say of the examples' responses, summed by position.

    Args:
        vocabulary: how many tokens are real; what a padded vocabulary has beyond them takes no part.
        batch_size: sequences that are read at once.
        made: told after every batch how many more examples are done.
    """
    length = max(len(example.response) for example in examples)
    sums: dict[str, Tensor] = {}
    alive = torch.zeros(length, dtype=torch.float64)
    for batch, values in compared(model, teacher, examples, vocabulary, batch_size):
        position = positions(batch).cpu()
        alive.index_add_(0, position, torch.ones(len(position), dtype=torch.float64))
        for name, each in values.items():
            total = sums.setdefault(name, torch.zeros(length, dtype=torch.float64))
            total.index_add_(0, position, each.double().cpu())
        made(len(batch.examples))
    return Distances(sums, alive)


@torch.no_grad()
def compared(
    model: Any, teacher: Teacher, examples: Sequence[Example], vocabulary: int, batch_size: int = 32
) -> Iterator[tuple[Batch, dict[str, Tensor]]]:
    """Batches of the examples, shortest first, each with the `differences` of its N response tokens."""
    device = model.get_input_embeddings().weight.device
    projects = can_fuse(model)
    was_training = model.training
    model.eval()
    try:
        ordered = sorted(examples, key=len)
        for start in range(0, len(ordered), batch_size):
            batch = Batch.from_examples(ordered[start : start + batch_size], 0, device)
            taught = teacher.score(batch).cut(vocabulary)
            found: list[dict[str, Tensor]] = []

            def look(student: Scores, taught: Scores = taught, found: list[dict[str, Tensor]] = found) -> Tensor:
                found.append(differences(taught, student))
                return student.tokens.float()

            score(model, batch, look, vocabulary=vocabulary, fused=projects)
            yield batch, found[0]
    finally:
        model.train(was_training)


@torch.no_grad()
def differences(teacher: Scores, student: Scores) -> dict[str, Tensor]:
    """What `scores.compare` says at every response token, and further, each (N,):

        teacher_surprise   −log p(token), in nats
        agreement          is the likeliest token the same? 0 or 1
        top_10_overlap     the share of the teacher's ten likeliest tokens that are among the student's

    A teacher that is known by its top tokens only does not tell the latter three.
    """
    if isinstance(teacher.distribution, TopK) or isinstance(student.distribution, TopK):
        return divergence_metrics(teacher, student)
    p, q = over_shared_vocabulary(teacher.distribution, student.distribution)
    assert not isinstance(q, TopK)
    vocabulary = q.vocabulary
    size = rows_per_tile(vocabulary)
    chunks = []
    for start in range(0, len(student.tokens), size):
        rows = slice(start, start + size)
        tokens, log_q = student.tokens[rows], q.log_probs(rows)
        log_p = p.log_probs(rows).to(log_q.device, log_q.dtype)
        found = divergence_metrics(Scores(tokens, Dense(log_p)), Scores(tokens, Dense(log_q)))
        theirs, ours = (x.topk(min(TOP, vocabulary)).indices for x in (log_p, log_q))
        found["teacher_surprise"] = -log_p.gather(-1, tokens.to(log_p.device)[:, None])[:, 0]
        found["agreement"] = (theirs[:, 0] == ours[:, 0]).float()
        found[f"top_{TOP}_overlap"] = (theirs[:, :, None] == ours[:, None, :]).any(-1).float().mean(-1)
        chunks.append(found)
    return {name: torch.cat([chunk[name] for chunk in chunks]) for name in chunks[0]}


def positions(batch: Batch) -> Tensor:
    """(N,) where in its response each response token stands, counted from 0."""
    first = batch.lengths.cumsum(0) - batch.lengths
    return torch.arange(len(batch.tokens), device=batch.sequence_ids.device) - first[batch.sequence_ids]

"""The next-token distributions of N rows: from hidden rows and a head, dense log-probabilities, some tokens' alone, as
a weighted average of others, or for each row one of several.

Code that compares two models does not depend on which kind it has.

Shapes: N rows, C rows of a tile, V vocabulary, K tokens of a top-K distribution, D width.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .head import Head
from .merged import Merged, TopK
from .tiles import rows_per_tile


@dataclass(frozen=True)
class Projected:
    """Distributions of a live model, projected from its hidden rows lazily.

    Under autocast the projection is in autocast's dtype, as in the model's own forward, unless it is `constant`: a
    teacher's, whose forward is outside the student's autocast.
    """

    hidden: Tensor  # (N, D)
    head: Head
    constant: bool = False

    @property
    def requires_grad(self) -> bool:
        tensors = (self.hidden, self.head.weight, self.head.bias)
        return any(tensor is not None and tensor.requires_grad for tensor in tensors)

    @property
    def vocabulary(self) -> int:
        return self.head.vocabulary

    def detach(self) -> "Projected":
        """The same distributions as constants."""
        return Projected(self.hidden.detach(), self.head.detach(), constant=True)

    def cut(self, vocabulary: int) -> "Projected":
        return replace(self, head=self.head.cut(vocabulary))

    def log_probs(self, rows: slice = slice(None), temperature: float = 1.0) -> Tensor:
        """(C, V) log-probabilities of the rows `rows`, differentiable by autograd."""
        with torch.autocast(self.hidden.device.type, enabled=False) if self.constant else nullcontext():
            return (self.head(self.hidden[rows]) / temperature).log_softmax(-1)

    def rows(self, rows: Tensor) -> "Projected":
        """The rows with these indices."""
        return replace(self, hidden=self.hidden[rows])

    def chosen(self, tokens: Tensor) -> Tensor:
        """(N,) log-probabilities of `tokens` (N,), differentiable by autograd; computed tile by tile."""
        index, size = tokens.to(self.hidden.device)[:, None], rows_per_tile(self.vocabulary, self.hidden.device)
        tiles = [slice(start, start + size) for start in range(0, len(index), size)]
        return torch.cat([self.log_probs(rows).gather(-1, index[rows])[:, 0] for rows in tiles])


@dataclass(frozen=True)
class Dense:
    """Log-probabilities of the whole vocabulary."""

    values: Tensor  # (N, V), normalised

    @property
    def requires_grad(self) -> bool:
        return self.values.requires_grad

    @property
    def vocabulary(self) -> int:
        return self.values.shape[-1]

    def rows(self, rows: slice | Tensor) -> "Dense":
        return Dense(self.values[rows])

    def cut(self, vocabulary: int) -> "Dense":
        return self if vocabulary >= self.vocabulary else Dense(self.values[:, :vocabulary].log_softmax(-1))

    def log_probs(self, rows: slice = slice(None), temperature: float = 1.0) -> Tensor:
        return self.values[rows] if temperature == 1.0 else (self.values[rows] / temperature).log_softmax(-1)

    def chosen(self, tokens: Tensor) -> Tensor:
        """(N,) log-probabilities of `tokens` (N,)."""
        return self.values.gather(-1, tokens.to(self.values.device)[:, None])[:, 0]


@dataclass(frozen=True)
class Mixed:
    """A weighted average of distributions, log Σ_i w_i p_i(v), each normalised over the tokens that all of them have.

    It is computed a tile of rows at a time.
    """

    parts: "tuple[Projected | Dense | Mixed | Routed, ...]"
    weights: tuple[float, ...]  # w_i, whose sum is 1

    @property
    def requires_grad(self) -> bool:
        return any(part.requires_grad for part in self.parts)

    @property
    def vocabulary(self) -> int:
        return min(part.vocabulary for part in self.parts)

    def rows(self, rows: slice | Tensor) -> Dense:
        return Dense(self.log_probs(rows) if isinstance(rows, slice) else self.log_probs()[rows])

    def cut(self, vocabulary: int) -> "Mixed":
        return replace(self, parts=tuple(part.cut(vocabulary) for part in self.parts))

    def log_probs(self, rows: slice = slice(None), temperature: float = 1.0) -> Tensor:
        """(C, V), or the softmax of this over the temperature."""
        values = self._average([part.log_probs(rows) for part in self.cut(self.vocabulary).parts])
        return values if temperature == 1.0 else (values / temperature).log_softmax(-1)

    def chosen(self, tokens: Tensor) -> Tensor:
        """(N,) log-probabilities of `tokens` (N,)."""
        return self._average([part.chosen(tokens) for part in self.cut(self.vocabulary).parts])

    def _average(self, log_probs: Sequence[Tensor]) -> Tensor:
        total = log_probs[0] + math.log(self.weights[0])
        for values, weight in zip(log_probs[1:], self.weights[1:], strict=True):
            total = torch.logaddexp(total, values.to(total.device, total.dtype) + math.log(weight))
        return total


@dataclass(frozen=True)
class Routed:
    """For each row the distribution of one of several teachers, of any kinds.

    Comparing two models is done for the rows of each teacher (`scores.Scores.by_teacher`), so that every divergence is
    what it is with that teacher alone.
    """

    parts: "Mapping[str, Distribution]"  # by the teacher's name, of its rows in their order
    indices: Mapping[str, Tensor]  # of each teacher's rows among the N, on the CPU; empty for one that has no part

    @property
    def requires_grad(self) -> bool:
        return any(part.requires_grad for part in self.parts.values())

    @property
    def vocabulary(self) -> int:
        """The smallest of the parts that have one."""
        return min(part.vocabulary for part in self.parts.values() if not isinstance(part, Merged))

    def cut(self, vocabulary: int) -> "Routed":
        return replace(self, parts={name: part.cut(vocabulary) for name, part in self.parts.items()})

    def rows(self, rows: slice | Tensor) -> Dense:
        return Dense(self.log_probs(rows) if isinstance(rows, slice) else self.log_probs()[rows])

    def log_probs(self, rows: slice = slice(None), temperature: float = 1.0) -> Tensor:
        """(C, V), or (C, K+1) where all teachers are known by their top K.

        Raises:
            ValueError: for rows of different numbers of events.
        """
        start, stop, _ = rows.indices(sum(map(len, self.indices.values())))
        values = []
        for name, part in self.parts.items():
            first, end = torch.searchsorted(self.indices[name], torch.tensor([start, stop])).tolist()
            values.append(part.log_probs(slice(first, end), temperature))
        if len({value.shape[1] for value in values}) > 1:
            raise ValueError(
                "the routed teachers provide different numbers of log-probabilities per token: use a method that "
                "compares distributions by a divergence, or teachers of one kind"
            )
        indices = torch.cat([self.indices[name] for name in self.parts])
        return _joined(values)[indices[(indices >= start) & (indices < stop)].argsort()]

    def chosen(self, tokens: Tensor) -> Tensor:
        """(N,) log-probabilities of `tokens` (N,)."""
        return self.assembled({name: part.chosen(tokens[self.indices[name]]) for name, part in self.parts.items()})

    def assembled(self, values: Mapping[str, Tensor]) -> Tensor:
        """(N,) from each teacher's values (n,)."""
        return _joined([values[name] for name in self.parts])[
            torch.cat([self.indices[n] for n in self.parts]).argsort()
        ]


def _joined(values: Sequence[Tensor]) -> Tensor:
    """The tensors one after the other, on the first one's device."""
    return torch.cat([value.to(values[0].device, values[0].dtype) for value in values])


Distribution = Projected | Dense | Merged | Mixed | Routed


def over_shared_vocabulary(teacher: Distribution, student: Distribution) -> tuple[Distribution, Distribution]:
    """Teacher and student over the tokens that both vocabularies have; a teacher over merged events is unchanged."""
    if isinstance(teacher, Merged) or isinstance(student, Merged) or teacher.vocabulary == student.vocabulary:
        return teacher, student
    vocabulary = min(teacher.vocabulary, student.vocabulary)
    return teacher.cut(vocabulary), student.cut(vocabulary)


def top_k_tiles(
    distribution: Distribution, count: int, k: int, device: torch.device
) -> Iterator[tuple[slice, Tensor, Tensor, Tensor]]:
    """The K likeliest tokens of each of N rows, a tile of rows at a time, so that (N, V) is never stored.

    Yields a tile's rows, their log-probabilities (C, V), from which a caller computes whatever else it needs, and those
    (C, K) of the likeliest tokens with their ids (C, K), the likeliest first.

    Args:
        count: N.
        device: that of the distribution, whose memory tiles may use.
    """
    assert not isinstance(distribution, Merged), "events are no tokens"
    size = max(1, rows_per_tile(distribution.vocabulary, device) // 4)  # nothing here is done in place
    for start in range(0, count, size):
        rows = slice(start, start + size)
        log_probs = distribution.log_probs(rows)
        values, support = log_probs.topk(k)
        yield rows, log_probs, values, support


def likeliest(distribution: Distribution, tokens: Tensor, k: int) -> TopK:
    """The K likeliest tokens of each row, all others together and the chosen `tokens` (N,), on the CPU.

    They are computed tile by tile, or taken from a distribution that is known by at least as many tokens.

    Raises:
        ValueError: for a distribution over fewer tokens, or over events that are no tokens.
    """
    if isinstance(distribution, TopK):
        if distribution.values.shape[-1] < k:
            known = distribution.values.shape[-1]
            raise ValueError(f"this teacher gives {known} tokens, and {k} are to be saved: lower --top-k")
        values, places = distribution.values.topk(k)
        rest = TopK(values, places).merge(distribution.log_probs())[:, -1]
        chosen = None if distribution.chosen_values is None else distribution.chosen_values.cpu()
        return TopK(values.cpu(), distribution.support.gather(-1, places).cpu(), chosen, rest.cpu())
    parts = distribution.parts.values() if isinstance(distribution, Routed) else [distribution]
    if any(isinstance(part, Merged) for part in parts):
        raise ValueError("this teacher does not give the log-probability of every token, or of the likeliest ones")
    columns = []
    for rows, log_probs, values, support in top_k_tiles(distribution, len(tokens), k, tokens.device):
        chosen = log_probs.gather(-1, tokens[rows, None].to(log_probs.device))[:, 0]
        rest = TopK(values, support).merge(log_probs.float())[:, -1]
        columns.append([x.cpu() for x in (values.float(), support, chosen.float(), rest)])
    return TopK(*map(torch.cat, zip(*columns, strict=True)))

"""Comparing two models over events that are not tokens of one vocabulary: groups of tokens, or ranks.

An event holds tokens of both vocabularies, and each model's probability of it is the sum over its own tokens. So every
divergence applies. The last event is "any other token"; where a model has no token of it, its probability is the
dtype's resolution in place of 0.

Shapes: N rows, C rows of a tile, V vocabulary, E events.
"""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, overload

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .distributions import Dense, Projected
    from .spans import Spans


@dataclass(frozen=True)
class TokenEvents:
    """Each token of either vocabulary belongs to one of E events."""

    teacher: Tensor  # (V',) the event of each of the teacher's tokens
    student: Tensor  # (V,) … and of the student's; padding of the vocabulary belongs to the last event
    count: int  # E

    def to(self, device: torch.device) -> "TokenEvents":
        return TokenEvents(self.teacher.to(device), self.student.to(device), self.count)

    def of_teacher(self, log_p: Tensor) -> Tensor:
        """Log-probabilities (C, E) of the events from those of the teacher's tokens (C, V')."""
        return _log_sums(log_p, self.teacher, self.count)

    def of_student(self, log_q: Tensor) -> Tensor:
        """Log-probabilities (C, E) of the events from those of the student's tokens (C, V)."""
        return _log_sums(log_q, self.student, self.count)

    def token_gradient(self, grad: Tensor, events: Tensor, log_q: Tensor) -> Tensor:
        """From the derivative (C, E) by `events = of_student(log_q)` to that (C, V) by `log_q`."""
        index = _padded(self.student, log_q, self.count)
        share = (log_q - events.gather(-1, index)).exp_().masked_fill_(log_q == -torch.inf, 0)
        return share.mul_(grad.gather(-1, index))


@dataclass(frozen=True)
class RankEvents:
    """Event i is "the model's i-th likeliest token", whichever it is (ULD, Boizard et al., 2024).

    Over these events every f-divergence has the smallest value that it has over any one-to-one correspondence of the
    tokens, because f(p, q) as a function of both is submodular: the sorted pairs have the smallest sum. The sum of
    absolute differences, which is ULD's loss, is twice the total variation.
    """

    shared: int  # tokens of the smaller vocabulary; all lower ranks of the larger one are the last event

    @property
    def count(self) -> int:
        return self.shared + 1

    def to(self, device: torch.device) -> "RankEvents":
        return self

    def of_teacher(self, log_p: Tensor) -> Tensor:
        """(C, E): the sorted log-probabilities, and the sum of the rest."""
        ordered = log_p.sort(dim=-1, descending=True, stable=True).values
        rest = ordered[:, self.shared :]
        last = _or_resolution(rest.logsumexp(-1, keepdim=True)) if rest.shape[1] else _resolution(ordered[:, :1])
        return torch.cat([ordered[:, : self.shared], last], dim=-1)

    def of_student(self, log_q: Tensor) -> Tensor:
        """(C, E), as `of_teacher`."""
        return self.of_teacher(log_q)

    def token_gradient(self, grad: Tensor, events: Tensor, log_q: Tensor) -> Tensor:
        """From the derivative (C, E) by `events = of_student(log_q)` to that (C, V) by `log_q`."""
        ordered, order = log_q.sort(dim=-1, descending=True, stable=True)
        share = (ordered[:, self.shared :] - events[:, -1:]).exp()
        return torch.empty_like(log_q).scatter_(
            -1, order, torch.cat([grad[:, : self.shared], share * grad[:, -1:]], dim=-1)
        )


Events = TokenEvents | RankEvents


@dataclass(frozen=True)
class EventRows:
    """A teacher's log-probabilities of the events, for the rows of a tile."""

    values: Tensor  # (C, E)
    events: Events
    known: Tensor  # (C,) bool; in other rows the only event is "any token", so that all divergences are 0

    def rows(self, rows: slice | Tensor) -> "EventRows":
        return EventRows(self.values[rows], self.events, self.known[rows])

    def log_probs(self, rows: slice = slice(None), temperature: float = 1.0) -> Tensor:
        """(C, E).

        Raises:
            ValueError: for a temperature other than 1.
        """
        if temperature != 1.0:
            raise ValueError(
                "a teacher with another tokenizer cannot be softened, since its tokens are compared in groups: set the "
                "divergence's temperature to 1"
            )
        return self._of_known(self.values[rows], rows)

    def merge(self, log_q: Tensor, rows: slice = slice(None)) -> Tensor:
        """The student's log-probabilities (C, V) as those of the same events, (C, E)."""
        return self._of_known(self.events.of_student(log_q), rows)

    def unmerge_gradient(self, grad_merged: Tensor, merged: Tensor, log_q: Tensor) -> Tensor:
        """From the derivative (C, E) with respect to `merged = merge(log_q)` to that (C, V) by `log_q`."""
        known = self.known.to(log_q.device)[:, None]
        grad = self.events.token_gradient(grad_merged, merged.masked_fill(~known, 0), log_q)
        return grad.masked_fill_(~known, 0)

    def _of_known(self, values: Tensor, rows: slice) -> Tensor:
        """In rows that are not known the last event has probability 1."""
        certain = torch.full_like(values[:1], -torch.inf)
        certain[:, -1:] = 0
        return torch.where(self.known[rows].to(values.device)[:, None], values, certain)


@dataclass(frozen=True)
class OtherVocabulary:
    """A teacher's distributions over a vocabulary of its own, as events that it shares with the student's.

    It is projected a tile of rows at a time.
    """

    distribution: "Projected | Dense"  # of N rows over the teacher's vocabulary
    events: Events
    known: Tensor  # (N,) bool, see `EventRows`
    spans: "Spans | None" = None  # pieces of the text that are several tokens of one of the models

    requires_grad: ClassVar[bool] = False

    @overload
    def rows(self, rows: slice) -> EventRows: ...
    @overload
    def rows(self, rows: Tensor) -> "OtherVocabulary": ...
    def rows(self, rows: slice | Tensor) -> "EventRows | OtherVocabulary":
        """The events of a tile, computed; or the rows with some indices (n,). Both are without spans."""
        if isinstance(rows, slice):
            values = self.events.of_teacher(self.distribution.log_probs(rows))
            return EventRows(values, self.events, self.known[rows])
        return OtherVocabulary(self.distribution.rows(rows), self.events, self.known[rows])

    def cut(self, vocabulary: int) -> "OtherVocabulary":
        """Unchanged: the events are of real tokens."""
        return self

    def log_probs(self, rows: slice = slice(None), temperature: float = 1.0) -> Tensor:
        """(C, E): see `EventRows.log_probs`."""
        return self.rows(rows).log_probs(temperature=temperature)

    def chosen(self, tokens: Tensor) -> Tensor:
        """Refused.

        Raises:
            ValueError: always, with the remedy.
        """
        raise ValueError(
            "this teacher has another tokenizer, and not the log-probability of the chosen token: choose a method that "
            "compares distributions by a divergence"
        )

    def merge(self, log_q: Tensor, rows: slice = slice(None)) -> Tensor:
        """The student's log-probabilities (C, V) as those of the events, (C, E)."""
        none = log_q[:, :0]  # of the teacher; they play no part
        return EventRows(none, self.events, self.known[rows]).merge(log_q)


def _padded(index: Tensor, values: Tensor, count: int) -> Tensor:
    """(C, V) the event of each token in `values` (C, V)."""
    index = index.to(values.device)
    if (missing := values.shape[-1] - len(index)) > 0:
        index = torch.cat([index, index.new_full((missing,), count - 1)])
    return index.expand(values.shape)


def _log_sums(values: Tensor, index: Tensor, count: int) -> Tensor:
    """log Σ exp of the values (C, V) of each event, (C, E)."""
    index = _padded(index, values, count)
    shape = (len(values), count)
    none = values.new_full(shape, torch.finfo(values.dtype).min)
    largest = none.scatter_reduce(-1, index, values.detach(), "amax")
    sums = torch.zeros_like(none).scatter_add(-1, index, (values - largest.gather(-1, index)).exp())
    tiny = torch.finfo(values.dtype).tiny
    logs = torch.where(sums == 0, -torch.inf, largest + sums.clamp(min=tiny).log())
    return torch.cat([logs[:, :-1], _or_resolution(logs[:, -1:])], dim=-1)


def _resolution(like: Tensor) -> Tensor:
    return torch.full_like(like, math.log(torch.finfo(like.dtype).eps))


def _or_resolution(logs: Tensor) -> Tensor:
    return torch.where(logs == -torch.inf, _resolution(logs), logs)

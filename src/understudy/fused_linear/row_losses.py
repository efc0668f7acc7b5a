"""Losses of single rows: the divergence from a teacher, the log-probability of the chosen token or of an event."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..divergences import Divergence
from .distributions import Dense, Mixed, Routed
from .events import EventRows, TokenEvents
from .head import TileLogits
from .merged import TopK


@dataclass(frozen=True)
class DivergenceLoss:
    """The divergence of each row from the teacher."""

    divergence: Divergence
    teacher: TileLogits | Dense | TopK | EventRows | Mixed | Routed  # of the same rows

    def rows(self, rows: slice) -> "DivergenceLoss":
        return DivergenceLoss(self.divergence, self.teacher.rows(rows))

    def __call__(self, log_q: Tensor, q: Tensor | None) -> tuple[Tensor, Tensor | None]:
        divergence, teacher = self.divergence, self.teacher
        merges = isinstance(teacher, TopK | EventRows)
        events = teacher.merge(log_q) if merges else log_q
        if q is None:
            log_p = teacher.log_probs(temperature=divergence.temperature).to(log_q.device, log_q.dtype)
            return self._sums(divergence.value(log_p, events)), None
        log_p, p = (x.to(log_q.device, log_q.dtype) for x in self._softmax_of_teacher())
        value, grad = divergence.value_and_grad(log_p, events, p, events.exp() if merges else q)
        grad = _scale(grad, divergence.factor)
        return self._sums(value), teacher.unmerge_gradient(grad, events, log_q) if merges else grad

    def _softmax_of_teacher(self) -> tuple[Tensor, Tensor]:
        if isinstance(self.teacher, TileLogits):
            return self.teacher.softmax(self.divergence.temperature)
        log_p = self.teacher.log_probs(temperature=self.divergence.temperature)
        return log_p, log_p.exp()

    def _sums(self, elements: Tensor) -> Tensor:
        """(C,); scaled before the sum, since a number per row between two passes would split a compiled kernel."""
        return _scale(elements, self.divergence.factor).sum(-1)


def _scale(elements: Tensor, factor: float) -> Tensor:
    return elements if factor == 1 else factor * elements


@dataclass(frozen=True)
class ChosenLogProb:
    """log q of one token per row."""

    tokens: Tensor  # (N,)

    def rows(self, rows: slice) -> "ChosenLogProb":
        return ChosenLogProb(self.tokens[rows])

    def __call__(self, log_q: Tensor, q: Tensor | None) -> tuple[Tensor, Tensor | None]:
        index = self.tokens[:, None].to(log_q.device)
        values = log_q.gather(-1, index)[:, 0]
        return values, torch.zeros_like(log_q).scatter_(-1, index, 1.0) if q is not None else None


@dataclass(frozen=True)
class EventLogProb:
    """log Σ q over the tokens of one event per row."""

    events: TokenEvents
    event: Tensor  # (N,)

    def rows(self, rows: slice) -> "EventLogProb":
        return EventLogProb(self.events, self.event[rows])

    def __call__(self, log_q: Tensor, q: Tensor | None) -> tuple[Tensor, Tensor | None]:
        index, merged = self.event[:, None].to(log_q.device), self.events.of_student(log_q)
        values = merged.gather(-1, index)[:, 0]
        if q is None:
            return values, None
        one = torch.zeros_like(merged).scatter_(-1, index, 1.0)
        return values, self.events.token_gradient(one, merged, log_q)

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

    def normalized(self) -> "DivergenceLoss":
        if not isinstance(self.teacher, TileLogits):
            return self
        return DivergenceLoss(self.divergence, self.teacher.normalized(self.divergence.temperature))

    def __call__(self, log_q: Tensor, differentiate: bool) -> tuple[Tensor, Tensor | None]:
        divergence, teacher = self.divergence, self.teacher
        log_p = teacher.log_probs(temperature=divergence.temperature).to(log_q.device, log_q.dtype)
        events = teacher.merge(log_q) if isinstance(teacher, TopK | EventRows) else log_q
        # scaled before the sum: one number per row between two passes would split a compiled kernel
        values = _scale(divergence.value(log_p, events), divergence.factor).sum(-1)
        if not differentiate:
            return values, None
        grad = _scale(divergence.grad_log_q(log_p, events), divergence.factor)
        return values, teacher.unmerge_gradient(grad, events, log_q) if isinstance(teacher, TopK | EventRows) else grad


def _scale(elements: Tensor, factor: float) -> Tensor:
    return elements if factor == 1 else factor * elements


@dataclass(frozen=True)
class ChosenLogProb:
    """log q of one token per row."""

    tokens: Tensor  # (N,)

    def rows(self, rows: slice) -> "ChosenLogProb":
        return ChosenLogProb(self.tokens[rows])

    def normalized(self) -> "ChosenLogProb":
        return self

    def __call__(self, log_q: Tensor, differentiate: bool) -> tuple[Tensor, Tensor | None]:
        index = self.tokens[:, None].to(log_q.device)
        values = log_q.gather(-1, index)[:, 0]
        return values, torch.zeros_like(log_q).scatter_(-1, index, 1.0) if differentiate else None


@dataclass(frozen=True)
class EventLogProb:
    """log Σ q over the tokens of one event per row."""

    events: TokenEvents
    event: Tensor  # (N,)

    def rows(self, rows: slice) -> "EventLogProb":
        return EventLogProb(self.events, self.event[rows])

    def normalized(self) -> "EventLogProb":
        return self

    def __call__(self, log_q: Tensor, differentiate: bool) -> tuple[Tensor, Tensor | None]:
        index, merged = self.event[:, None].to(log_q.device), self.events.of_student(log_q)
        values = merged.gather(-1, index)[:, 0]
        if not differentiate:
            return values, None
        one = torch.zeros_like(merged).scatter_(-1, index, 1.0)
        return values, self.events.token_gradient(one, merged, log_q)

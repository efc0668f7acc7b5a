"""Spans: pieces of a response that are several tokens of teacher or student, as events of their own.

By the chain rule the probability of a span is the product of the conditional probabilities of its tokens along the text
that is there, P for the teacher and Q for the student (the entry of this text in GOLD's merged distribution, with each
token's probability taken where it is predicted). At the row where a span begins, its probability is taken out of the
events that the first tokens of both belong to:

    f(P, Q) + f(p_a − P, q_a − Q·1[a = b]) + f(p_b, q_b − Q) [a ≠ b]   in place of   f(p_a, q_a) + f(p_b, q_b) [a ≠ b]

with the event a of the teacher's first token and the event b of the student's. Both are distributions over one event
more, so every divergence applies; where a = b it is no smaller than without the span.

Shapes: N rows, G spans, M student's tokens in spans, C rows of a tile, E events.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..divergences import Divergence
from .distributions import Distribution, Projected
from .events import OtherVocabulary, TokenEvents
from .loss import chosen_log_prob, event_log_prob, row_values
from .tiles import rows_per_tile


def span_values(teacher: OtherVocabulary, student: Distribution, tokens: Tensor, divergence: Divergence) -> Tensor:
    """(N,) what the teacher's spans add to the divergence over its events, at the rows where spans begin; else 0.

    Args:
        tokens: (N,) the student's chosen tokens.
    """
    spans, events = teacher.spans, teacher.events
    assert spans is not None
    assert isinstance(events, TokenEvents)
    values = torch.zeros(len(tokens), device=tokens.device, dtype=torch.float32)
    if not len(spans.rows):
        return values
    rows, members, owner = (x.to(tokens.device) for x in (spans.rows, spans.members, spans.owner))
    a, b = spans.events.to(tokens.device), events.student.to(tokens.device)[tokens[rows]]
    log_q = _chosen(student, members, tokens)
    log_q_span = log_q.new_zeros(len(rows)).index_add(0, owner, log_q)
    q_a, q_b = (_of_events(student, rows, event, events) for event in (a, b))
    p_a, p_b = (x.to(log_q) for x in _teacher_events(teacher, rows, a, b))
    log_p_span, same = spans.log_probs.to(log_q), a == b
    none = torch.full_like(q_a, -torch.inf)
    p = [log_p_span, _less(p_a, log_p_span), p_b.where(~same, none)]
    q = [log_q_span, _less(q_a, log_q_span).where(same, q_a), _less(q_b, log_q_span).where(~same, none)]
    before = [torch.stack([x, y.where(~same, none)], dim=-1) for x, y in ((p_a, p_b), (q_a, q_b))]
    added = divergence(torch.stack(p, dim=-1), torch.stack(q, dim=-1)) - divergence(*before)
    return values.to(added).index_add(0, rows, added)


@dataclass(frozen=True)
class Spans:
    """The spans of N rows, and the teacher's log-probabilities of them."""

    rows: Tensor  # (G,) the row at which each begins
    members: Tensor  # (M,) the rows of their tokens
    owner: Tensor  # (M,) the span that each of these belongs to
    log_probs: Tensor  # (G,) log P
    events: Tensor  # (G,) the event of the teacher's first token


def _chosen(student: Distribution, rows: Tensor, tokens: Tensor) -> Tensor:
    """(M,) the student's log-probabilities of the tokens of some rows."""
    part = student.rows(rows)
    return row_values(part, chosen_log_prob(tokens[rows])) if isinstance(part, Projected) else part.chosen(tokens[rows])


def _of_events(student: Distribution, rows: Tensor, event: Tensor, events: TokenEvents) -> Tensor:
    """(G,) the student's log-probability of one event in each of some rows."""
    part = student.rows(rows)
    if isinstance(part, Projected):
        return row_values(part, event_log_prob(events, event))
    return events.of_student(part.log_probs()).gather(-1, event[:, None])[:, 0]


@torch.no_grad()
def _teacher_events(teacher: OtherVocabulary, rows: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """(2, G) the teacher's log-probabilities of two events in each of some rows, computed tile by tile."""
    index, parts = torch.stack([a, b], dim=-1), []
    for tile in rows.split(rows_per_tile(teacher.distribution.vocabulary, rows.device)):
        values = teacher.rows(tile.to(teacher.known.device)).log_probs()
        parts.append(values.gather(-1, index[: len(tile)].to(values.device)))
        index = index[len(tile) :]
    return torch.cat(parts).t()


def _less(log_x: Tensor, log_y: Tensor) -> Tensor:
    """log(x − y), and no less than what rounding leaves of x where y is nearly all of it."""
    ratio = (log_y - log_x).clamp(max=-torch.finfo(log_x.dtype).eps)
    return log_x + torch.log(-torch.expm1(ratio))

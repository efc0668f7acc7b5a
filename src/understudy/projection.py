"""From hidden rows and a head to a number per row, without ever holding (N, V).

The one idea: a vocabulary is projected, softmaxed, compared and differentiated a few rows at a time. For each chunk of
rows the student's log-probabilities are made, a rule says each row's value and its derivative with respect to them, and
the chain to hidden states and head is applied in closed form at once (four matrix products per chunk in all: two
projections and two gradients). What is kept is ∂/∂hidden (N, D) and ∂/∂weight (V, D), whatever N.

Where log-probabilities come from is a Source: `Projected` (hidden rows and a head), `Dense` (they are at hand) or
`TopK` (a few events, the others merged into one). Shapes: N rows, C rows of a chunk, V vocabulary, K support, D width.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .divergences import Divergence

CHUNK_MB = 256  # memory for one chunk's vocabulary-sized buffers
_BUFFERS = 6  # of shape (C, V), alive at once


def chunk_rows(vocabulary: int, memory_mb: float = CHUNK_MB) -> int:
    """How many rows a chunk may have for its float32 buffers to fit into `memory_mb`; from 16 to 1024.

    More than 1024 rows gain nothing: the matrix products are saturated and the buffers fall out of the cache.
    """
    return min(1024, max(16, int(memory_mb * 2**20) // (4 * _BUFFERS * vocabulary)))


@dataclass(frozen=True)
class Head:
    """A model's last linear layer, and what the model does to the logits after it: c · tanh(scale · logits / c)."""

    weight: Tensor  # (V, D)
    bias: Tensor | None = None  # (V,)
    scale: float = 1.0
    softcap: float | None = None  # c

    @property
    def vocabulary(self) -> int:
        return self.weight.shape[0]

    def cut(self, vocabulary: int) -> "Head":
        """The head over the first `vocabulary` tokens only: a padded vocabulary's rest takes no part in a softmax."""
        if vocabulary >= self.vocabulary:
            return self
        return replace(
            self, weight=self.weight[:vocabulary], bias=None if self.bias is None else self.bias[:vocabulary]
        )

    def __call__(self, hidden: Tensor) -> Tensor:
        """(C, D) → (C, V) logits, float32 or wider."""
        logits = F.linear(hidden.to(self.weight.dtype), self.weight, self.bias)
        logits = logits.to(_wide(logits.dtype))
        if self.scale != 1.0:
            logits = logits * self.scale
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)

    def chain(self, grad: Tensor, logits: Tensor) -> Tensor:
        """From the derivative with respect to `logits`, as returned by `__call__`, to that before scale and cap."""
        if self.softcap is not None:
            grad = grad * (1 - (logits / self.softcap) ** 2)
        return grad * self.scale if self.scale != 1.0 else grad


@dataclass(frozen=True)
class Projected:
    """Log-probabilities of a live model, made when asked for."""

    hidden: Tensor  # (N, D)
    head: Head

    @property
    def vocabulary(self) -> int:
        return self.head.vocabulary

    def cut(self, vocabulary: int) -> "Projected":
        return replace(self, head=self.head.cut(vocabulary))

    def log_probs(self, rows: slice = slice(None), temperature: float = 1.0) -> Tensor:
        """(C, V) for some rows, differentiable by autograd: the plain path."""
        return (self.head(self.hidden[rows]) / temperature).log_softmax(-1)


@dataclass(frozen=True)
class Dense:
    """Log-probabilities at hand."""

    values: Tensor  # (N, V), normalised

    @property
    def vocabulary(self) -> int:
        return self.values.shape[-1]

    def cut(self, vocabulary: int) -> "Dense":
        return self if vocabulary >= self.vocabulary else Dense(self.values[:, :vocabulary].log_softmax(-1))

    def log_probs(self, rows: slice = slice(None), temperature: float = 1.0) -> Tensor:
        return self.values[rows] if temperature == 1.0 else (self.values[rows] / temperature).log_softmax(-1)


@dataclass(frozen=True)
class TopK:
    """The log-probabilities of a few tokens per row: a full distribution over **K+1 events**, those and "any other".

    Merging events never increases an f-divergence, so comparing over them gives a lower bound of the full value, and no
    divergence needs a version of its own for truncated teachers.
    """

    values: Tensor  # (N, K)
    support: Tensor  # (N, K) token ids, no id twice in a row

    def log_probs(self, rows: slice = slice(None), temperature: float = 1.0) -> Tensor:
        """(C, K+1): the last event is any other token."""
        if temperature != 1.0:
            raise ValueError(
                "a teacher known by its top tokens only cannot be softened: the tail's shape is unknown; "
                "set the divergence's temperature to 1"
            )
        values = self.values[rows].to(_wide(self.values.dtype))
        known = values.logsumexp(-1, keepdim=True).clamp(max=-torch.finfo(values.dtype).eps)
        return torch.cat([values, torch.log(-torch.expm1(known))], dim=-1)

    def merge(self, log_q: Tensor, rows: slice = slice(None)) -> Tensor:
        """Another model's (C, V) as the same (C, K+1) events.

        Neither side's last event falls to probability 0 by rounding, or where the support is the whole vocabulary:
        the teacher's is at least the dtype's resolution, and an empty one of the other model takes that value.
        """
        support = self.support[rows].to(log_q.device)
        others = log_q.scatter(-1, support, -torch.inf)
        empty = (others == -torch.inf).all(-1, keepdim=True)
        rest = others.masked_fill(empty, 0).logsumexp(-1, keepdim=True)  # no NaN gradient of logsumexp(−inf, −inf, …)
        rest = rest.masked_fill(empty, math.log(torch.finfo(log_q.dtype).eps))
        return torch.cat([log_q.gather(-1, support), rest], dim=-1)

    def spread(self, pull: Tensor, merged: Tensor, log_q: Tensor, rows: slice = slice(None)) -> Tensor:
        """From the derivative (C, K+1) with respect to `merged = merge(log_q, rows)` to that (C, V) by `log_q`."""
        share = (log_q - merged[:, -1:]).exp_()  # of each token in "any other"
        return share.mul_(pull[:, -1:]).scatter_(-1, self.support[rows].to(log_q.device), pull[:, :-1])


Source = Projected | Dense | TopK

# A rule turns rows of the student's log-probabilities (C, V) into values (C,) and, if asked, their derivative (C, V).
Rule = Callable[[slice, Tensor, bool], tuple[Tensor, Tensor | None]]


def divergence_rule(divergence: Divergence, teacher: Source) -> Rule:
    """The divergence of each row from the teacher's."""

    def rule(rows: slice, log_q: Tensor, differentiate: bool) -> tuple[Tensor, Tensor | None]:
        log_p = teacher.log_probs(rows, divergence.temperature).to(log_q.device, log_q.dtype)
        events = teacher.merge(log_q, rows) if isinstance(teacher, TopK) else log_q
        value = divergence.factor * divergence.value(log_p, events).sum(-1)
        if not differentiate:
            return value, None
        pull = divergence.pull(log_p, events)
        pull = pull if divergence.factor == 1 else divergence.factor * pull
        return value, teacher.spread(pull, events, log_q, rows) if isinstance(teacher, TopK) else pull

    return rule


def chosen_rule(tokens: Tensor) -> Rule:
    """log q of one token per row, `tokens` (N,)."""

    def rule(rows: slice, log_q: Tensor, differentiate: bool) -> tuple[Tensor, Tensor | None]:
        index = tokens[rows, None].to(log_q.device)
        value = log_q.gather(-1, index)[:, 0]
        return value, torch.zeros_like(log_q).scatter_(-1, index, 1.0) if differentiate else None

    return rule


def project(student: Projected, rule: Rule, weights: Tensor | None = None, temperature: float = 1.0) -> Tensor:
    """The rule's value of every row, (N,), differentiable with respect to hidden rows, head weight and bias.

    Args:
        weights: (N,) what the caller will weigh the rows with before summing (default 1). Gradients are made in the
            forward pass under these weights; if the upstream gradient turns out to be a multiple of them it is
            applied as a factor, and otherwise the pass is repeated with the true one. Right in both cases.
        temperature: the logits are divided by it before the softmax.
    """
    hidden, head = student.hidden, student.head
    weight, bias = head.weight, head.bias
    device = hidden.device.type
    if torch.is_autocast_enabled(device):  # as the model's own head would have it
        dtype = torch.get_autocast_dtype(device)
        weight, bias = weight.to(dtype), None if bias is None else bias.to(dtype)
    hidden = hidden.to(weight.dtype)
    if weights is None:
        weights = torch.ones(len(hidden), device=hidden.device)
    if weight.dtype == torch.float16:
        # gradients are made before any loss scale is known: use the little range that float16 has
        weights = weights / weights.abs().amax().clamp(min=torch.finfo(weights.dtype).tiny)
    with torch.autocast(device, enabled=False):
        if not torch.is_grad_enabled():
            return _walk(hidden, weight, bias, head, rule, weights, temperature, (False, False, False))[0]
        return _Project.apply(hidden, weight, bias, head, rule, weights, temperature)


class _Project(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        head: Head,
        rule: Rule,
        weights: Tensor,
        temperature: float,
    ) -> Tensor:
        ctx.head, ctx.rule, ctx.temperature = head, rule, temperature
        values, grads = _walk(hidden, weight, bias, head, rule, weights, temperature, ctx.needs_input_grad[:3])
        ctx.save_for_backward(hidden, weight, bias, weights, *grads)
        return values

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, weights, *grads = ctx.saved_tensors
        factor = _common_factor(upstream, weights)
        if factor is not None:
            # the factor stays a float32 scalar: rounded to half precision it would bend every gradient's length
            grads = [None if grad is None else grad * factor for grad in grads]
        else:
            asked = ctx.needs_input_grad[:3]
            _, grads = _walk(hidden, weight, bias, ctx.head, ctx.rule, upstream, ctx.temperature, asked)
        return *grads, None, None, None, None


def _walk(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    head: Head,
    rule: Rule,
    weights: Tensor,
    temperature: float,
    asked: tuple[bool, ...],
) -> tuple[Tensor, list[Tensor | None]]:
    """One pass over all rows: values (N,) and the gradients of Σ weights · values that are asked for."""
    head = replace(head, weight=weight, bias=bias)
    wide = _wide(weight.dtype)
    values = torch.empty(len(hidden), dtype=wide, device=hidden.device)
    grad_hidden = torch.empty_like(hidden) if asked[0] else None
    grad_weight = torch.zeros_like(weight, dtype=wide) if asked[1] else None
    grad_bias = torch.zeros_like(bias, dtype=wide) if bias is not None and asked[2] else None
    size = chunk_rows(head.vocabulary)
    for start in range(0, len(hidden), size):
        rows = slice(start, start + size)
        logits = head(hidden[rows])
        log_q = (logits / temperature if temperature != 1.0 else logits).log_softmax(-1)
        values[rows], pull = rule(rows, log_q, any(asked))
        if pull is None:
            continue
        # ∂/∂z_v = h_v − q_v Σ h, then through the temperature and whatever the head does after its product
        grad = torch.addcmul(pull, log_q.exp_(), pull.sum(-1, keepdim=True), value=-1)
        grad = head.chain(grad.mul_(weights[rows, None].to(wide) / temperature), logits)
        if grad_bias is not None:
            grad_bias += grad.sum(0)
        grad = grad.to(weight.dtype)
        if grad_hidden is not None:
            torch.mm(grad, weight, out=grad_hidden[rows])
        if grad_weight is not None:
            if grad_weight.dtype == grad.dtype:
                grad_weight.addmm_(grad.t(), hidden[rows])
            else:
                grad_weight += grad.t() @ hidden[rows]
    narrow = [None if grad is None else grad.to(weight.dtype) for grad in (grad_hidden, grad_weight, grad_bias)]
    return values, narrow


def _common_factor(upstream: Tensor, weights: Tensor) -> Tensor | None:
    """The c with upstream = c · weights, if there is one."""
    at = weights.abs().argmax()
    factor = upstream[at] / weights[at]  # NaN, and so no factor, if all weights are 0
    rounding = 8 * torch.finfo(upstream.dtype).eps
    return factor if torch.allclose(upstream, factor * weights.to(upstream.dtype), rtol=rounding, atol=0) else None


def _wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype of softmaxes: float32, or float64 for float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32

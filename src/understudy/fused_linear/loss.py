"""From hidden rows and a head to a number per row, without ever holding (N, V).

The one idea: a vocabulary is projected, softmaxed, compared and differentiated a few rows at a time. For each tile of
rows the head's products are made, a rule says each row's value and its derivative, which gives the tile's gradient, and
this is carried to hidden rows and head at once (four matrix products in all: two projections and two gradients). What
is kept is ∂/∂hidden (N, D) and ∂/∂weight (V, D), whatever N.

Shapes: N rows, C rows of a tile, V vocabulary, D width.
"""

import math
from collections.abc import Callable
from dataclasses import astuple, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..divergences import Divergence
from .distributions import Dense, Head, Logits, Projected, Source, TopK
from .tiles import Rule, Transform, chunk_rows, current, empty_tile, finish, tiles, tiling, wide


@dataclass(frozen=True)
class DivergenceRule:
    """The divergence of each row from the teacher's."""

    divergence: Divergence
    teacher: Logits | Dense | TopK  # of the same rows

    def at(self, rows: slice) -> "DivergenceRule":
        return DivergenceRule(self.divergence, self.teacher.at(rows))

    def normalized(self) -> "DivergenceRule":
        if not isinstance(self.teacher, Logits):
            return self
        return DivergenceRule(self.divergence, self.teacher.normalized(self.divergence.temperature))

    def __call__(self, log_q: Tensor, differentiate: bool) -> tuple[Tensor, Tensor | None]:
        divergence, teacher = self.divergence, self.teacher
        log_p = teacher.log_probs(temperature=divergence.temperature).to(log_q.device, log_q.dtype)
        events = teacher.merge(log_q) if isinstance(teacher, TopK) else log_q
        # scaled before the sum: a number per row in between would tear a compiled kernel apart
        values = _scaled(divergence.value(log_p, events), divergence.factor).sum(-1)
        if not differentiate:
            return values, None
        pull = _scaled(divergence.pull(log_p, events), divergence.factor)
        return values, teacher.spread(pull, events, log_q) if isinstance(teacher, TopK) else pull


def _scaled(elements: Tensor, factor: float) -> Tensor:
    return elements if factor == 1 else factor * elements


@dataclass(frozen=True)
class ChosenRule:
    """log q of one token per row."""

    tokens: Tensor  # (N,)

    def at(self, rows: slice) -> "ChosenRule":
        return ChosenRule(self.tokens[rows])

    def normalized(self) -> "ChosenRule":
        return self

    def __call__(self, log_q: Tensor, differentiate: bool) -> tuple[Tensor, Tensor | None]:
        index = self.tokens[:, None].to(log_q.device)
        values = log_q.gather(-1, index)[:, 0]
        return values, torch.zeros_like(log_q).scatter_(-1, index, 1.0) if differentiate else None


# From the number of rows of a tile to a function that says, tile after tile, the rule for its rows.
Rules = Callable[[int], Callable[[slice], Rule]]


def divergence_rule(divergence: Divergence, teacher: Source) -> Rules:
    """The divergence of each row from the teacher's; a live teacher's logits are made tile by tile, in one buffer."""

    def rules(size: int) -> Callable[[slice], Rule]:
        if not isinstance(teacher, Projected):
            return DivergenceRule(divergence, teacher).at
        hidden, head = teacher.hidden, teacher.head
        buffer = empty_tile(size, head.vocabulary, like=head.weight)

        def at(rows: slice) -> Rule:
            some = hidden[rows]
            head.product(some, out=buffer[: len(some)])
            return DivergenceRule(divergence, Logits(buffer[: len(some)], head.transform))

        return at

    return rules


def chosen_rule(tokens: Tensor) -> Rules:
    """log q of one token per row, `tokens` (N,)."""
    return lambda size: ChosenRule(tokens).at


def project(student: Projected, rules: Rules, weights: Tensor | None = None, temperature: float = 1.0) -> Tensor:
    """The rule's value of every row, (N,), differentiable with respect to hidden rows, head weight and bias.

    Args:
        weights: (N,) what the caller will weigh the rows with before summing (default 1). Gradients are made in the
            forward pass under these weights; if the upstream gradient turns out to be a multiple of them it is
            applied as a factor, and otherwise the pass is repeated with the true one. Right in both cases.
        temperature: the logits are divided by it before the softmax.
    """
    return _project(student, rules, weights, temperature, summed=False)


def fused_divergence(
    divergence: Divergence,
    hidden: Tensor,
    weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    *,
    bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    row_weights: Tensor | None = None,
    temperature: float = 1.0,
    memory_mb: float = 256.0,
) -> Tensor:
    """Σ_n w_n D(p_n, q_n) of a teacher p and a student q given by hidden rows and heads; never holds (N, V).

        hidden = student.model(ids).last_hidden_state[predicts]
        with torch.no_grad():
            teacher_hidden = teacher.model(ids).last_hidden_state[predicts]
        loss = fused_divergence(
            JensenShannon(0.5), hidden, student.lm_head.weight, teacher_hidden, teacher.lm_head.weight,
            row_weights=torch.full((len(hidden),), 1 / len(hidden)),
        )
        loss.backward()

    The gradients by `hidden`, `weight` and `bias` are made in the same pass, in closed form: four matrix products over
    the vocabulary in all, three where the head is frozen. Under autocast the products are made in its dtype; softmax
    and divergence are always in float32 or wider. In `tile.tiling(compiled=True)` what lies between the products is
    compiled.

    Args:
        divergence: what to compare with; its own temperature must be 1 if `temperature` is not.
        hidden, weight, bias: the student's (N, D), (V, D) and (V,).
        teacher_hidden, teacher_weight, teacher_bias: the teacher's (N, E), (V', E) and (V',), constants. Tokens beyond
            the smaller of V and V' are padding and take no part.
        row_weights: (N,) default 1. Rows of weight 0 are left out, whatever they hold.
        temperature: of both softmaxes.
        memory_mb: for what is (C, V)-shaped, which decides how many rows C are worked on at once.

    Raises:
        ValueError: for shapes that do not belong together, and for two temperatures.
    """
    _check_shapes(hidden, weight, teacher_hidden, teacher_weight, row_weights)
    if temperature != 1.0:
        if divergence.temperature != 1.0:
            raise ValueError(
                "the divergence has a temperature already: give it there or to fused_divergence, not twice"
            )
        divergence = replace(divergence, temperature=temperature)
    if row_weights is not None:
        row_weights = row_weights.detach()
        kept = row_weights != 0
        if not kept.all():
            hidden, teacher_hidden, row_weights = hidden[kept], teacher_hidden[kept], row_weights[kept]
    vocabulary = min(len(weight), len(teacher_weight))
    student = Projected(hidden, Head(weight, bias)).cut(vocabulary)
    teacher_head = Head(_autocast(teacher_weight.detach()), _autocast(teacher_bias))
    teacher = Projected(teacher_hidden.detach(), teacher_head).cut(vocabulary)
    with tiling(memory_mb):
        rules = divergence_rule(divergence, teacher)
        return _project(student, rules, row_weights, divergence.temperature, summed=True)


def _check_shapes(
    hidden: Tensor, weight: Tensor, teacher_hidden: Tensor, teacher_weight: Tensor, row_weights: Tensor | None
) -> None:
    for whose, rows, head in (("student", hidden, weight), ("teacher", teacher_hidden, teacher_weight)):
        if rows.dim() != 2 or head.dim() != 2 or rows.shape[1] != head.shape[1]:
            raise ValueError(
                f"the {whose}'s hidden rows {tuple(rows.shape)} and head {tuple(head.shape)} must be (N, D) and (V, D)"
            )
    if len(hidden) != len(teacher_hidden) or (row_weights is not None and row_weights.shape != hidden.shape[:1]):
        given = "" if row_weights is None else f" and {tuple(row_weights.shape)} row weights"
        raise ValueError(f"{len(hidden)} rows of the student meet {len(teacher_hidden)} of the teacher{given}")


def _autocast(tensor: Any) -> Any:
    """A tensor (or None) in the dtype of an autocast that is on."""
    if tensor is None or not torch.is_autocast_enabled(tensor.device.type):
        return tensor
    return tensor.to(torch.get_autocast_dtype(tensor.device.type))


def _project(student: Projected, rules: Rules, weights: Tensor | None, temperature: float, summed: bool) -> Tensor:
    hidden, head = student.hidden, student.head
    weight: Tensor = _autocast(head.weight)  # as the model's own head would have it
    device = hidden.device.type
    bias: Tensor | None = _autocast(head.bias)
    hidden = hidden.to(weight.dtype)
    if weights is None:
        weights = torch.ones(len(hidden), device=hidden.device)
    with torch.autocast(device, enabled=False):
        if not torch.is_grad_enabled():
            frozen = (False, False, False)
            values = _walk(hidden, replace(head, weight=weight, bias=bias), rules, weights, temperature, frozen)[0]
            return (values * weights).sum() if summed else values
        return _Project.apply(hidden, weight, bias, head.transform, rules, weights, temperature, summed)


class _Project(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        transform: Transform,
        rules: Rules,
        weights: Tensor,
        temperature: float,
        summed: bool,
    ) -> Tensor:
        ctx.transform, ctx.rules, ctx.temperature, ctx.tiling = transform, rules, temperature, astuple(current())
        head, announced = Head(weight, bias, transform), weights
        if weight.dtype == torch.float16:
            # gradients are made before any loss scale is known: use the little range that float16 has
            announced = weights / weights.abs().amax().clamp(min=torch.finfo(weights.dtype).tiny)
        values, ctx.grads = _walk(hidden, head, rules, announced, temperature, ctx.needs_input_grad[:3])
        ctx.save_for_backward(hidden, weight, bias, weights, announced)
        return (values * weights).sum() if summed else values

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, weights, announced = ctx.saved_tensors
        upstream = upstream * weights if upstream.dim() == 0 else upstream
        grads, ctx.grads = ctx.grads, None  # handed out once, so that they can be scaled where they lie
        factor = _common_factor(upstream, announced) if grads else None
        if grads and factor is not None:
            # the factor stays a float32 scalar: rounded to half precision it would bend every gradient's length
            grads = [None if grad is None else grad.mul_(factor) for grad in grads]
        else:
            asked, head = ctx.needs_input_grad[:3], Head(weight, bias, ctx.transform)
            with tiling(*ctx.tiling):
                _, grads = _walk(hidden, head, ctx.rules, upstream, ctx.temperature, asked)
        grads = [None if grad is None else grad.to(weight.dtype) for grad in grads]
        return *grads, None, None, None, None, None


def _walk(
    hidden: Tensor, head: Head, rules: Rules, weights: Tensor, temperature: float, asked: tuple[bool, ...]
) -> tuple[Tensor, list[Tensor | None]]:
    """One pass over all rows: values (N,) and the gradients of Σ weights · values that are asked for."""
    weight, bias, count = head.weight, head.bias, len(hidden)
    values = torch.empty(count, dtype=wide(weight.dtype), device=hidden.device)
    grad_hidden = torch.empty_like(hidden) if asked[0] else None
    grad_weight = torch.zeros_like(weight, dtype=values.dtype) if asked[1] else None
    grad_bias = torch.zeros_like(bias, dtype=values.dtype) if bias is not None and asked[2] else None
    size = math.ceil(count / max(1, math.ceil(count / chunk_rows(head.vocabulary))))  # tiles of like size
    rule_at, (products, gradients) = rules(size), tiles(size, head.vocabulary, like=weight)
    for start in range(0, count, max(1, size)):
        rows = slice(start, start + size)
        some = hidden[rows]
        product, gradient = products[: len(some)], gradients[: len(some)]
        head.product(some, out=product)
        out = gradient if any(asked) else None
        values[rows] = finish(product, rule_at(rows), weights[rows], head.transform, temperature, out)
        if grad_bias is not None:
            grad_bias += gradient.sum(0, dtype=grad_bias.dtype)
        if grad_hidden is not None:
            torch.mm(gradient, weight, out=grad_hidden[rows])
        if grad_weight is not None:
            if grad_weight.dtype == gradient.dtype:
                grad_weight.addmm_(gradient.t(), some)
            else:
                grad_weight += gradient.t() @ some
    if grad_weight is not None:
        grad_weight = grad_weight.to(weight.dtype)  # it may be large, and lies there until the backward pass
    return values, [grad_hidden, grad_weight, grad_bias]


def _common_factor(upstream: Tensor, weights: Tensor) -> Tensor | None:
    """The c with upstream = c · weights, if there is one."""
    if not len(weights):
        return upstream.new_ones(())
    at = weights.abs().argmax()
    factor = upstream[at] / weights[at]  # NaN, and so no factor, if all weights are 0
    rounding = 8 * torch.finfo(upstream.dtype).eps
    return factor if torch.allclose(upstream, factor * weights.to(upstream.dtype), rtol=rounding, atol=0) else None

"""Fused linear losses: a value per row from hidden rows and a head, with gradients, without ever storing (N, V).

Projection, softmax, divergence and gradient are computed a tile of rows at a time. For each tile the head's products
are computed, a `RowLoss` returns each row's value and derivative, and the tile's gradient is added to those of hidden
rows and head at once: four matrix products in all, two projections and two gradients. Only ∂/∂hidden (N, D) and
∂/∂weight (V, D) are stored.

Shapes: N rows, C rows of a tile, V vocabulary, D width.
"""

import math
from collections.abc import Callable
from dataclasses import astuple, replace
from typing import Any

import torch
from torch import Tensor

from ..divergences import Divergence
from .compiling import called_often
from .distributions import Distribution, Projected
from .events import TokenEvents
from .head import Head, TileLogits, Transform, softmax_dtype
from .kernel import RowLoss, tile_loss
from .row_losses import ChosenLogProb, DivergenceLoss, EventLogProb
from .tiles import current_tiling, product_and_gradient_tiles, rows_per_tile, tiling, zero_tile

# From the number of rows of a tile to a function from a tile's rows to their loss, called tile after tile.
RowLosses = Callable[[int], Callable[[slice], RowLoss]]


def divergence_loss(divergence: Divergence, teacher: Distribution) -> RowLosses:
    """Each row's divergence from the teacher; a live teacher's products are computed tile by tile, in one buffer."""

    def row_losses(size: int) -> Callable[[slice], RowLoss]:
        if not isinstance(teacher, Projected):
            merged = teacher
            return lambda rows: DivergenceLoss(divergence, merged.rows(rows))
        hidden, head = teacher.hidden, teacher.head
        buffer = zero_tile(size, head.vocabulary, like=head.weight)

        def of_rows(rows: slice) -> RowLoss:
            tile_hidden = hidden[rows]
            product = buffer[: len(tile_hidden)]
            head.product(tile_hidden, out=product)
            return DivergenceLoss(divergence, TileLogits(product, head.transform))

        return of_rows

    return row_losses


def chosen_log_prob(tokens: Tensor) -> RowLosses:
    """log q of one token per row, `tokens` (N,)."""
    return lambda size: ChosenLogProb(tokens).rows


def event_log_prob(events: TokenEvents, event: Tensor) -> RowLosses:
    """log q of one event per row, `event` (N,)."""
    return lambda size: EventLogProb(events, event).rows


def row_values(
    student: Projected, row_losses: RowLosses, weights: Tensor | None = None, temperature: float = 1.0
) -> Tensor:
    """The value of every row, (N,), differentiable with respect to hidden rows, head weight and bias.

    Args:
        weights: (N,) the weights with which the caller will sum the rows. Gradients are computed in the forward pass
            with these weights; in the backward pass they are multiplied by a factor if the upstream gradient is a
            multiple of the weights, and otherwise the pass is repeated with the upstream gradient. None: gradients are
            computed in the backward pass. The result is the same; the cost is 3, 6 or 4 products respectively.
        temperature: the logits are divided by it before the softmax.
    """
    return _project(student, row_losses, weights, temperature, summed=False)


def fused_divergence(
    divergence: Divergence,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    hidden: Tensor,
    weight: Tensor,
    *,
    teacher_bias: Tensor | None = None,
    bias: Tensor | None = None,
    row_weights: Tensor | None = None,
    temperature: float = 1.0,
    memory_mb: float | None = None,
) -> Tensor:
    """Σ_n w_n D(p_n, q_n) of a teacher p and a student q given by hidden rows and heads; never stores (N, V).

        hidden = student.model(ids).last_hidden_state[predicts]
        with torch.no_grad():
            teacher_hidden = teacher.model(ids).last_hidden_state[predicts]
        loss = fused_divergence(
            JensenShannon(0.5), teacher_hidden, teacher.lm_head.weight, hidden, student.lm_head.weight,
            row_weights=torch.full((len(hidden),), 1 / len(hidden)),
        )
        loss.backward()

    Gradients of `hidden`, `weight` and `bias` come from the same pass, in closed form: four matrix products over the
    vocabulary, three where the head is frozen. Under autocast the products are in its dtype; softmax and divergence are
    always in float32 or float64. Within `tiles.tiling(compiled=True)` the kernel between the products is compiled, and
    within `tiling(compiled=False)` it is not. Otherwise it is compiled after 10¹⁰ elements (rows × V) of one
    divergence, vocabulary, device and pair of dtypes in this process, if there is a compiler; that changes rounding.

    Args:
        divergence: its own temperature must be 1 if `temperature` is not.
        teacher_hidden, teacher_weight, teacher_bias: the teacher's (N, E), (V', E) and (V',), constants. Tokens beyond
            the smaller of V and V' are padding and take no part.
        hidden, weight, bias: the student's (N, D), (V, D) and (V,).
        row_weights: (N,) default 1. Rows of weight 0 are left out, whatever they hold.
        temperature: of both softmaxes.
        memory_mb: for (C, V)-shaped tiles, from which the number of rows C of a tile follows; default: 256, or what
            `tiling` says, and more on a GPU (`tiles.default_memory_mb`).

    Raises:
        ValueError: for shapes that do not match, and for two temperatures.
    """
    _check_shapes(teacher_hidden, teacher_weight, hidden, weight, row_weights)
    divergence = _with_temperature(divergence, temperature)
    if row_weights is None:
        row_weights = torch.ones(len(hidden), device=hidden.device)
    row_weights = row_weights.detach()
    nonzero = row_weights != 0
    if not nonzero.all():
        hidden, teacher_hidden, row_weights = hidden[nonzero], teacher_hidden[nonzero], row_weights[nonzero]
    vocabulary = min(len(weight), len(teacher_weight))
    student = Projected(hidden, Head(weight, bias)).cut(vocabulary)
    teacher_head = Head(_autocast(teacher_weight.detach()), _autocast(teacher_bias))
    teacher = Projected(teacher_hidden.detach(), teacher_head).cut(vocabulary)
    with tiling(memory_mb, _compiled(divergence, student, teacher)):
        return _project(student, divergence_loss(divergence, teacher), row_weights, divergence.temperature, summed=True)


def _check_shapes(
    teacher_hidden: Tensor, teacher_weight: Tensor, hidden: Tensor, weight: Tensor, row_weights: Tensor | None
) -> None:
    for name, rows, head in (("student", hidden, weight), ("teacher", teacher_hidden, teacher_weight)):
        if rows.dim() != 2 or head.dim() != 2 or rows.shape[1] != head.shape[1]:
            raise ValueError(
                f"the {name}'s hidden rows {tuple(rows.shape)} and head {tuple(head.shape)} must be (N, D) and (V, D)"
            )
    if len(hidden) != len(teacher_hidden) or (row_weights is not None and row_weights.shape != hidden.shape[:1]):
        weights = "" if row_weights is None else f", and row_weights has the shape {tuple(row_weights.shape)}"
        raise ValueError(
            f"the student has {len(hidden)} hidden rows and the teacher {len(teacher_hidden)}{weights}: give all of "
            "them for the same rows"
        )


def _compiled(divergence: Divergence, student: Projected, teacher: Projected) -> bool:
    """Should this call of `fused_divergence` be compiled? What `tiling` says, or else whether there were many."""
    if (compiled := current_tiling().compiled) is not None:
        return compiled
    device, vocabulary = student.hidden.device, student.vocabulary
    dtypes = (student.head.weight.dtype, teacher.head.weight.dtype, torch.is_autocast_enabled(device.type))
    return called_often((repr(divergence), vocabulary, device, dtypes), len(student.hidden), vocabulary, device.type)


def _with_temperature(divergence: Divergence, temperature: float) -> Divergence:
    if temperature == 1.0:
        return divergence
    if divergence.temperature != 1.0:
        raise ValueError("the divergence has a temperature already: give it there or to fused_divergence, not twice")
    return replace(divergence, temperature=temperature)


def _autocast(tensor: Any) -> Any:
    """A tensor (or None) in autocast's dtype, if autocast is enabled."""
    if tensor is None or not torch.is_autocast_enabled(tensor.device.type):
        return tensor
    return tensor.to(torch.get_autocast_dtype(tensor.device.type))


def _project(
    student: Projected, row_losses: RowLosses, weights: Tensor | None, temperature: float, summed: bool
) -> Tensor:
    hidden, head = student.hidden, student.head
    weight: Tensor = head.weight if student.constant else _autocast(head.weight)  # as in the model's own forward
    bias: Tensor | None = head.bias if student.constant else _autocast(head.bias)
    hidden = hidden.to(weight.dtype)
    with torch.autocast(hidden.device.type, enabled=False):
        if not torch.is_grad_enabled():
            head, no_gradients = replace(head, weight=weight, bias=bias), (False, False, False)
            values = _run_tiles(hidden, head, row_losses, _or_ones(weights, hidden), temperature, no_gradients)[0]
            return (values * weights).sum() if summed and weights is not None else values
        return _Project.apply(hidden, weight, bias, head.transform, row_losses, weights, temperature, summed)


def _or_ones(weights: Tensor | None, hidden: Tensor) -> Tensor:
    return torch.ones(len(hidden), device=hidden.device) if weights is None else weights


class _Project(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        transform: Transform,
        row_losses: RowLosses,
        weights: Tensor | None,
        temperature: float,
        summed: bool,
    ) -> Tensor:
        ctx.transform, ctx.row_losses, ctx.temperature = transform, row_losses, temperature
        ctx.tiling = astuple(current_tiling())
        head, needs_grad, expected_weights = Head(weight, bias, transform), ctx.needs_input_grad[:3], weights
        if weights is None:
            needs_grad = (False, False, False)
        elif weight.dtype == torch.float16:
            # gradients are computed before the loss scale is known: use the range of float16
            expected_weights = weights / weights.abs().amax().clamp(min=torch.finfo(weights.dtype).tiny)
        values, ctx.grads = _run_tiles(
            hidden, head, row_losses, _or_ones(expected_weights, hidden), temperature, needs_grad
        )
        ctx.save_for_backward(hidden, weight, bias, weights, expected_weights)
        return (values * weights).sum() if summed and weights is not None else values

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, weights, expected_weights = ctx.saved_tensors
        upstream = upstream * weights if upstream.dim() == 0 else upstream
        grads, ctx.grads = ctx.grads, None  # released, so that they can be scaled in place
        factor = _common_factor(upstream, expected_weights) if grads and expected_weights is not None else None
        if factor is not None:
            # the factor stays a float32 scalar: rounding it to half precision would change every gradient's norm
            grads = [None if grad is None else grad.mul_(factor) for grad in grads]
        else:
            needs_grad, head = ctx.needs_input_grad[:3], Head(weight, bias, ctx.transform)
            with tiling(*ctx.tiling):
                _, grads = _run_tiles(hidden, head, ctx.row_losses, upstream, ctx.temperature, needs_grad)
        grads = [None if grad is None else grad.to(weight.dtype) for grad in grads]
        return *grads, None, None, None, None, None


def _run_tiles(
    hidden: Tensor,
    head: Head,
    row_losses: RowLosses,
    weights: Tensor,
    temperature: float,
    needs_grad: tuple[bool, ...],
) -> tuple[Tensor, list[Tensor | None]]:
    """One pass over all tiles: values (N,), and those gradients of Σ weights · values that are needed."""
    weight, bias, count = head.weight, head.bias, len(hidden)
    values = torch.empty(count, dtype=softmax_dtype(weight.dtype), device=hidden.device)
    grad_hidden = torch.empty_like(hidden) if needs_grad[0] else None
    grad_weight = torch.zeros_like(weight, dtype=values.dtype) if needs_grad[1] else None
    grad_bias = torch.zeros_like(bias, dtype=values.dtype) if bias is not None and needs_grad[2] else None
    most = rows_per_tile(head.vocabulary, hidden.device)
    size = math.ceil(count / max(1, math.ceil(count / most)))  # tiles of similar size
    loss_of_rows = row_losses(size)
    products, gradients = product_and_gradient_tiles(size, head.vocabulary, like=weight)
    for start in range(0, count, max(1, size)):
        rows = slice(start, start + size)
        tile_hidden = hidden[rows]
        product, gradient = products[: len(tile_hidden)], gradients[: len(tile_hidden)]
        head.product(tile_hidden, out=product)
        student, out = TileLogits(product, head.transform), gradient if any(needs_grad) else None
        values[rows] = tile_loss(student, loss_of_rows(rows), weights[rows], temperature, out)
        if grad_bias is not None:
            grad_bias += gradient.sum(0, dtype=grad_bias.dtype)
        if grad_hidden is not None:
            torch.mm(gradient, weight, out=grad_hidden[rows])
        if grad_weight is not None:
            if grad_weight.dtype == gradient.dtype:
                grad_weight.addmm_(gradient.t(), tile_hidden)
            else:
                grad_weight += gradient.t() @ tile_hidden
    if grad_weight is not None:
        grad_weight = grad_weight.to(weight.dtype)  # it may be large, and is stored until the backward pass
    return values, [grad_hidden, grad_weight, grad_bias]


def _common_factor(upstream: Tensor, weights: Tensor) -> Tensor | None:
    """The c with upstream = c · weights, if there is one."""
    if not len(weights):
        return upstream.new_ones(())
    largest = weights.abs().argmax()
    factor = upstream[largest] / weights[largest]  # NaN, and so no factor, if all weights are 0
    rounding = 8 * torch.finfo(upstream.dtype).eps
    return factor if torch.allclose(upstream, factor * weights.to(upstream.dtype), rtol=rounding, atol=0) else None

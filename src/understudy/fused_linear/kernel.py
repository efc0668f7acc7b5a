"""Chunked loss kernel: log-softmax, loss and logit gradient of a tile, in place.

Between the matrix products everything is elementwise along a row, so that intermediate results stay in the processor's
cache: compiled, the kernel works on one row at a time; otherwise on a block of rows, and the gradient is written over
the products.

Shapes: C rows of a tile, V vocabulary.
"""

from typing import Any, Protocol, cast

import torch
from torch import Tensor

from .compiling import CompiledFunction
from .head import TileLogits
from .tiles import current_tiling, row_blocks


class RowLoss(Protocol):
    """A function of each row of the student's log-probabilities (C, V)."""

    def rows(self, rows: slice) -> "RowLoss":
        """The loss of some of the rows."""
        ...

    def __call__(self, log_q: Tensor, q: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Values (C,) and, if the probabilities are given too, their derivative (C, V) with respect to `log_q`."""
        ...


def tile_loss(
    student: TileLogits, row_loss: RowLoss, weights: Tensor, temperature: float, grad_product: Tensor | None
) -> Tensor:
    """The loss of each row of a tile, (C,).

    The gradient of Σ weights · values with respect to the student's product is written to `grad_product` (C, V), if
    that is given; it may be the product's own memory, but not in compiled code.
    """
    if current_tiling().triton:
        from .triton_kernel import supports, triton_loss  # imported here because Triton is optional

        if supports(student, row_loss):
            return triton_loss(student, cast(Any, row_loss), weights, grad_product)
    if not current_tiling().compiled:
        return _block_by_block(student, row_loss, weights, temperature, grad_product)
    weights = weights.clone()  # not a view: code compiled for all of a tensor's memory is compiled again for a part
    return _compiled_kernel(student, row_loss, weights, temperature, grad_product)


def _block_by_block(
    student: TileLogits, row_loss: RowLoss, weights: Tensor, temperature: float, grad_product: Tensor | None
) -> Tensor:
    values = []
    for rows in row_blocks(student.product):
        grad = None if grad_product is None else grad_product[rows]
        values.append(_kernel(student.rows(rows), row_loss.rows(rows), weights[rows], temperature, grad))
    return torch.cat(values)


def _kernel(
    student: TileLogits, row_loss: RowLoss, weights: Tensor, temperature: float, grad_product: Tensor | None
) -> Tensor:
    if grad_product is None:
        return row_loss(student.log_probs(temperature), None)[0]
    logits = student.logits()
    log_q, q = student.softmax(temperature, logits)
    values, grad_log_q = row_loss(log_q, q)
    if grad_log_q is not None:
        # ∂/∂z_v = h_v − q_v Σ h, then through the temperature and the model's transform of its product
        grad = torch.addcmul(grad_log_q, q, grad_log_q.sum(-1, keepdim=True), value=-1)
        scale = weights[:, None].to(grad.dtype) / temperature
        grad_product.copy_(student.transform.grad_product(grad * scale, logits))
    return values


_compiled_kernel = CompiledFunction(
    _kernel,
    "the loss cannot be compiled here, which makes it slower",
    fallback=_block_by_block,
    fullgraph=True,  # a function in several graphs would need several more tiles
    dynamic=True,
)

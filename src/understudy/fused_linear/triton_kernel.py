"""Triton kernel of a tile: softmax, forward KL, reverse KL or JSD, and the logit gradient, in one launch. Experimental.

One program computes one row. It reads the row three times: for the normalizers of teacher and student (online softmax),
for the value and Σ h, and for the gradient ∂/∂z_v = h_v − q_v Σ h, which it writes. Nothing else of size V is stored,
where eager code stores a (C, V) array for each intermediate result.

It is used within `tiles.tiling(triton=True)` only. Its results are tested in Triton's interpreter on a CPU, and that it
compiles for a GPU; it has never run on one, so its speed and its rounding there are unknown.

Shapes: C rows of a tile, V vocabulary.
"""

# pyright: reportInvalidTypeForm=false
# triton.language is imported without its types, because it is optional.

import os
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from ..divergences import _STEEPEST, Divergence, ForwardKL, JensenShannon, ReverseKL
from .head import TileLogits
from .row_losses import DivergenceLoss

triton: Any = import_module("triton")
tl: Any = import_module("triton.language")

_FORWARD, _REVERSE, _JSD = 0, 1, 2
_BLOCK, _WARPS = 2048, 8


def supports(student: TileLogits, row_loss: Any) -> bool:
    """Has the kernel this loss? Forward KL, reverse KL and JSD from a live teacher's logits, in float32 or below."""
    return (
        isinstance(row_loss, DivergenceLoss)
        and isinstance(row_loss.teacher, TileLogits)
        and type(row_loss.divergence) in (ForwardKL, ReverseKL, JensenShannon)
        and torch.float64 not in (student.product.dtype, row_loss.teacher.product.dtype)
    )


def triton_loss(student: TileLogits, row_loss: DivergenceLoss, weights: Tensor, grad_product: Tensor | None) -> Tensor:
    """The divergence of each row, (C,) in float32, and the gradient of Σ weights · values.

    The gradient with respect to the student's product is written to `grad_product` (C, V), if that is given; it may be
    the product's own memory.

    Raises:
        ValueError: for a loss that the kernel does not have, and on a CPU outside Triton's interpreter.
    """
    product, teacher, divergence = student.product, row_loss.teacher, row_loss.divergence
    if not supports(student, row_loss) or not isinstance(teacher, TileLogits):
        raise ValueError(f"the Triton kernel does not compute {divergence} from {type(teacher).__name__}")
    if product.device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError(
            "Triton has no compiler for CPUs: leave out triton=True, or set TRITON_INTERPRET=1 before Python starts to "
            "interpret the kernel, which is slow and meant for tests"
        )
    kind, beta, scale = _kind(divergence)
    rows, vocabulary = product.shape
    values = torch.empty(rows, dtype=torch.float32, device=product.device)
    gradient = product if grad_product is None else grad_product
    teacher_product = teacher.product.to(product.device)
    assert product.stride(1) == teacher_product.stride(1) == gradient.stride(1) == 1
    _kernel[(rows,)](
        product,
        teacher_product,
        weights.to(product.device, torch.float32).contiguous(),
        values,
        gradient,
        product.stride(0),
        teacher_product.stride(0),
        gradient.stride(0),
        vocabulary,
        divergence.temperature,
        divergence.factor,
        beta,
        scale,
        STUDENT_SCALE=student.transform.scale,
        STUDENT_SOFTCAP=student.transform.softcap or 0.0,
        TEACHER_SCALE=teacher.transform.scale,
        TEACHER_SOFTCAP=teacher.transform.softcap or 0.0,
        KIND=kind,
        BETA_IS_SMALL=beta <= 0.5,
        STEEPEST=_STEEPEST,
        DIFFERENTIATE=grad_product is not None,
        BLOCK=min(_BLOCK, triton.next_power_of_2(vocabulary)),
        num_warps=_WARPS,
    )
    return values


def _kind(divergence: Divergence) -> tuple[int, float, float]:
    """The number of the divergence, β, and the constant in front of a JSD."""
    if isinstance(divergence, JensenShannon) and divergence.beta not in (0, 1):
        return _JSD, divergence.beta, divergence._scale
    forward = isinstance(divergence, ForwardKL) or (isinstance(divergence, JensenShannon) and divergence.beta == 0)
    return (_FORWARD if forward else _REVERSE), 0.0, 1.0


@triton.jit
def _load_logits(row, columns, vocabulary, SCALE: tl.constexpr, SOFTCAP: tl.constexpr):
    """float32 logits of one block of columns; −inf beyond the vocabulary."""
    inside = columns < vocabulary
    logits = tl.load(row + columns, mask=inside, other=0.0).to(tl.float32) * SCALE
    if SOFTCAP > 0:
        logits = SOFTCAP * (2 / (1 + tl.exp(-2 * logits / SOFTCAP)) - 1)
    return tl.where(inside, logits, float("-inf"))


@triton.jit
def _normalizer(row, vocabulary, temperature, SCALE: tl.constexpr, SOFTCAP: tl.constexpr, BLOCK: tl.constexpr):
    """The largest logit of a row over the temperature, and log Σ exp of the differences to it.

    They are not added, because that would round what is subtracted from large logits.
    """
    lanes = tl.arange(0, BLOCK)
    peak = tl.full([BLOCK], -3.0e38, tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, vocabulary, BLOCK):
        logits = _load_logits(row, start + lanes, vocabulary, SCALE, SOFTCAP) / temperature
        highest = tl.maximum(peak, logits)
        total = total * tl.exp(peak - highest) + tl.exp(logits - highest)
        peak = highest
    highest = tl.max(peak, axis=0)
    return highest, tl.log(tl.sum(total * tl.exp(peak - highest), axis=0))


@triton.jit
def _expm1(x):
    """exp(x) − 1, exact near 0 whatever the hardware's exp is: a Taylor series there."""
    series = x * (1 + x / 2 * (1 + x / 3 * (1 + x / 4 * (1 + x / 5))))
    return tl.where(tl.abs(x) < 0.1, series, tl.exp(x) - 1)


@triton.jit
def _log1p(x):
    """log(1 + x), exact near 0: there 2 artanh(x / (2 + x)) as a series."""
    s = x / (2 + x)
    series = 2 * s * (1 + s * s * (1 / 3 + s * s * (1 / 5 + s * s / 7)))
    return tl.where(tl.abs(x) < 0.1, series, tl.log(1 + x))


@triton.jit
def _divergence(log_p, log_q, beta, scale, KIND: tl.constexpr, BETA_IS_SMALL: tl.constexpr, STEEPEST: tl.constexpr):
    """f(p, q) and h = q ∂f/∂q, elementwise, as in divergences.py."""
    p, q = tl.exp(log_p), tl.exp(log_q)
    if KIND == 0:
        value = tl.where(p == 0, 0.0, p * (log_p - log_q))
        grad = -p
    elif KIND == 1:
        value = tl.where(q == 0, 0.0, q * (log_q - log_p))
        ratio = tl.where(q == 0, 0.0, log_q - log_p)
        grad = q * (tl.minimum(ratio, STEEPEST) + 1)
    else:
        ratio = tl.where(log_p == log_q, 0.0, log_p - log_q)
        ratio = tl.minimum(tl.maximum(ratio, -80.0), 80.0)
        if BETA_IS_SMALL:
            q_to_m = -_log1p(beta * _expm1(ratio))
            p_to_m = ratio + q_to_m
        else:
            p_to_m = -_log1p((1 - beta) * _expm1(-ratio))
            q_to_m = p_to_m - ratio
        grad = (1 - beta) * scale * q * q_to_m
        value = beta * scale * p * p_to_m + grad
    return value, grad


@triton.jit
def _kernel(
    student,
    teacher,
    weights,
    values,
    gradient,
    student_stride,
    teacher_stride,
    gradient_stride,
    vocabulary,
    temperature,
    factor,
    beta,
    scale,
    STUDENT_SCALE: tl.constexpr,
    STUDENT_SOFTCAP: tl.constexpr,
    TEACHER_SCALE: tl.constexpr,
    TEACHER_SOFTCAP: tl.constexpr,
    KIND: tl.constexpr,
    BETA_IS_SMALL: tl.constexpr,
    STEEPEST: tl.constexpr,
    DIFFERENTIATE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    student += row * student_stride
    teacher += row * teacher_stride
    gradient += row * gradient_stride
    lanes = tl.arange(0, BLOCK)

    p_peak, p_rest = _normalizer(teacher, vocabulary, temperature, TEACHER_SCALE, TEACHER_SOFTCAP, BLOCK)
    q_peak, q_rest = _normalizer(student, vocabulary, temperature, STUDENT_SCALE, STUDENT_SOFTCAP, BLOCK)
    sums = tl.zeros([BLOCK], tl.float32)
    grad_sums = tl.zeros([BLOCK], tl.float32)
    for start in range(0, vocabulary, BLOCK):
        z_p = _load_logits(teacher, start + lanes, vocabulary, TEACHER_SCALE, TEACHER_SOFTCAP)
        z_q = _load_logits(student, start + lanes, vocabulary, STUDENT_SCALE, STUDENT_SOFTCAP)
        log_p, log_q = z_p / temperature - p_peak - p_rest, z_q / temperature - q_peak - q_rest
        value, grad = _divergence(log_p, log_q, beta, scale, KIND, BETA_IS_SMALL, STEEPEST)
        sums += value
        grad_sums += grad
    tl.store(values + row, factor * tl.sum(sums, axis=0))

    if DIFFERENTIATE:
        grad_sum = tl.sum(grad_sums, axis=0)
        weight = tl.load(weights + row) * factor / temperature
        for start in range(0, vocabulary, BLOCK):
            columns = start + lanes
            z_p = _load_logits(teacher, columns, vocabulary, TEACHER_SCALE, TEACHER_SOFTCAP)
            z_q = _load_logits(student, columns, vocabulary, STUDENT_SCALE, STUDENT_SOFTCAP)
            log_p, log_q = z_p / temperature - p_peak - p_rest, z_q / temperature - q_peak - q_rest
            _, grad = _divergence(log_p, log_q, beta, scale, KIND, BETA_IS_SMALL, STEEPEST)
            grad = weight * (grad - tl.exp(log_q) * grad_sum)
            if STUDENT_SOFTCAP > 0:
                grad *= 1 - (z_q / STUDENT_SOFTCAP) * (z_q / STUDENT_SOFTCAP)
            grad *= STUDENT_SCALE
            tl.store(gradient + columns, grad.to(gradient.dtype.element_ty), mask=columns < vocabulary)

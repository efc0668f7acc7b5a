"""Divergences between a teacher p and a student q: forward and reverse KL, JSD, total variation, skew KL, αβ.

Every divergence has the form D(p, q) = Σ_v f(p_v, q_v) and is defined by two elementwise functions,

    value         f(p_v, q_v)
    grad_log_q    h_v = q_v ∂f/∂q_v

and its gradient with respect to the student's logits z (q = softmax z) is

    ∂D/∂z_v = h_v − q_v Σ_u h_u.

Summation, chunking over the vocabulary projection, top-K teachers and temperature are written once, in fused_linear/ or
in the base class. The teacher always comes first and is a constant: gradients reach the student only.

Conventions: natural logarithms; 0 · log 0 = 0; a token with log-probability −inf on both sides contributes 0 and has
gradient 0. Where only the supports differ, the value is what the formula says (a KL is infinite) while every
`grad_log_q` stays finite. Shapes: N rows, V events.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

_STEEPEST = 1e4  # nats; the log-ratio inside a gradient is cut here, so that a forbidden token gives a finite gradient
_LARGEST = 1e30  # what is left of an infinite gradient, small enough to be summed over a vocabulary in float32


@dataclass(frozen=True)
class Divergence(ABC):
    """D(p, q) = Σ_v f(p_v, q_v) for a teacher p and a student q.

    Calling an instance on log-probabilities `(N, V)`, teacher first, returns `(N,)`:

        JensenShannon(0.1)(log_p, log_q)

    Args:
        temperature: τ; both sides are softened to softmax(log-probabilities / τ) before they are compared.
        rescale: multiply the value by τ², which keeps the gradient's size comparable over τ (Hinton et al., 2015).
    """

    temperature: float = field(default=1.0, kw_only=True)
    rescale: bool = field(default=False, kw_only=True)

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise ValueError(f"a divergence's temperature must be above 0, not {self.temperature}")

    @abstractmethod
    def value(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        """f(p_v, q_v), elementwise, of log-probabilities of any one shape."""

    @abstractmethod
    def grad_log_q(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        """h_v = q_v ∂f/∂q_v, elementwise: the derivative of Σ f with respect to log q_v."""

    def value_and_grad(self, log_p: Tensor, log_q: Tensor, p: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
        """f and h at once, where the probabilities are known too: those of a tile are, from its softmax."""
        return self.value(log_p, log_q), self.grad_log_q(log_p, log_q)

    @property
    def factor(self) -> float:
        """What the sum of values is multiplied by: τ² with `rescale`, else 1."""
        return self.temperature**2 if self.rescale else 1.0

    def __call__(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        """(N, V), (N, V) → (N,), differentiable with respect to `log_q`; `log_p` is treated as a constant.

        Half-precision inputs are widened first, so the result is float32, or float64 if an input is.
        """
        wide = torch.promote_types(torch.promote_types(log_p.dtype, log_q.dtype), torch.float32)
        log_p, log_q = log_p.to(wide), log_q.to(wide)
        if self.temperature != 1.0:
            log_p, log_q = ((x / self.temperature).log_softmax(-1) for x in (log_p, log_q))
        return self.factor * _Sum.apply(log_p, log_q, self)


class _Sum(torch.autograd.Function):
    """Σ_v f with the closed-form gradient, so that a divergence has one derivative wherever it is computed."""

    @staticmethod
    def forward(ctx: Any, log_p: Tensor, log_q: Tensor, divergence: Divergence) -> Tensor:
        ctx.save_for_backward(log_p, log_q)
        ctx.divergence = divergence
        return divergence.value(log_p, log_q).sum(-1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[None, Tensor, None]:
        return None, upstream[..., None] * ctx.divergence.grad_log_q(*ctx.saved_tensors), None


class _Joint(Divergence):
    """A divergence defined by `value_and_grad`, because f and h contain the same terms."""

    def value(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        return self.value_and_grad(log_p, log_q, log_p.exp(), log_q.exp())[0]

    def grad_log_q(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        return self.value_and_grad(log_p, log_q, log_p.exp(), log_q.exp())[1]

    @abstractmethod
    def value_and_grad(self, log_p: Tensor, log_q: Tensor, p: Tensor, q: Tensor) -> tuple[Tensor, Tensor]: ...


@dataclass(frozen=True)
class ForwardKL(_Joint):
    """KL(p‖q) = Σ p log(p/q), h = −p. Covers every mode of the teacher (word-level KD; GKD §2)."""

    def value_and_grad(self, log_p: Tensor, log_q: Tensor, p: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
        return _times_log_ratio(p, log_p, log_q), -p


@dataclass(frozen=True)
class ReverseKL(_Joint):
    """KL(q‖p) = Σ q log(q/p), h = q (log(q/p) + 1). Seeks one mode of the teacher (MiniLLM; GKD §2)."""

    def value_and_grad(self, log_p: Tensor, log_q: Tensor, p: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
        return _times_log_ratio(q, log_q, log_p), q * (_log_ratio(log_q, log_p).clamp(max=_STEEPEST) + 1)


@dataclass(frozen=True)
class JensenShannon(_Joint):
    """Generalized JSD (GKD, Agarwal et al. 2024, Eq. 1). **β weights the teacher**, in the mixture and in front:

        JSD_β(p‖q) = β KL(p‖m) + (1−β) KL(q‖m),   m = βp + (1−β)q,   h = (1−β) q log(q/m)

    Small β covers the teacher's modes, β near 1 seeks one. The formula tends to 0 at both ends, with JSD_β/β → KL(p‖q)
    and JSD_β/(1−β) → KL(q‖p); β = 0 and β = 1 *mean* those two KLs, as in other libraries, so the value jumps there.
    `normalized` divides by β(1−β): continuous up to and including the ends, and with the same curvature at p = q for
    every β, so that learning rates are comparable between them.
    """

    beta: float = 0.5
    normalized: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.beta <= 1:
            raise ValueError(f"jensen_shannon needs beta between 0 and 1, not {self.beta}")

    @property
    def _scale(self) -> float:
        return 1 / (self.beta * (1 - self.beta)) if self.normalized else 1.0

    def value_and_grad(self, log_p: Tensor, log_q: Tensor, p: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
        if self.beta in (0, 1):
            return (ForwardKL() if self.beta == 0 else ReverseKL()).value_and_grad(log_p, log_q, p, q)
        p_to_m, q_to_m = _log_ratios_to_mixture(log_p, log_q, p, q, self.beta)
        grad = ((1 - self.beta) * self._scale) * q * q_to_m
        return (self.beta * self._scale) * p * p_to_m + grad, grad


@dataclass(frozen=True)
class TotalVariation(Divergence):
    """TVD(p, q) = ½ Σ |p − q|, h = ½ q sign(q − p), with sign 0 at q = p. Lies in [0, 1] (f-distill, GKD §2)."""

    def value(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        return 0.5 * (log_p.exp() - log_q.exp()).abs()

    def grad_log_q(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        return 0.5 * log_q.exp() * (log_q - log_p).nan_to_num(0.0).sign()


@dataclass(frozen=True)
class SkewKL(_Joint):
    """KL(p‖m) with m = αp + (1−α)q, h = −(1−α) p q/m. At most −log α (DistiLLM, Ko et al. 2024, Eq. 4)."""

    alpha: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_alpha("skew_kl", self.alpha)

    def value_and_grad(self, log_p: Tensor, log_q: Tensor, p: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
        if self.alpha == 0:
            return ForwardKL().value_and_grad(log_p, log_q, p, q)
        p_to_m, q_to_m = _log_ratios_to_mixture(log_p, log_q, p, q, self.alpha)
        return p * p_to_m, (self.alpha - 1) * p * q_to_m.exp()


@dataclass(frozen=True)
class SkewReverseKL(_Joint):
    """KL(q‖m) with m = (1−α)p + αq, h = q (log(q/m) + 1 − αq/m). At most −log α (DistiLLM, Eq. 5).

    The mixture's q is differentiated too; DistiLLM-2's script holds it constant.
    """

    alpha: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_alpha("skew_reverse_kl", self.alpha)

    def value_and_grad(self, log_p: Tensor, log_q: Tensor, p: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
        if self.alpha == 0:
            return ReverseKL().value_and_grad(log_p, log_q, p, q)
        q_to_m = _log_ratios_to_mixture(log_p, log_q, p, q, 1 - self.alpha)[1]
        return q * q_to_m, q * (q_to_m + 1 - self.alpha * q_to_m.exp())


@dataclass(frozen=True)
class AlphaBeta(Divergence):
    """The αβ-divergence (ABKD, Wang et al., ICML 2025):

        D(p‖q) = −1/(αβ) Σ [ p^α q^β − α/(α+β) p^(α+β) − β/(α+β) q^(α+β) ],    h = q^β (q^α − p^α)/α

    with its limits where a denominator vanishes:

        β = 0       1/α² Σ [ p^α log(p^α/q^α) − p^α + q^α ]         (α = 1: KL(p‖q))
        α = 0       1/β² Σ [ q^β log(q^β/p^β) − q^β + p^β ]         (β = 1: KL(q‖p))
        α + β = 0   1/α² Σ [ log(q^α/p^α) + p^α/q^α − 1 ]
        α = β = 0   ½ Σ (log p − log q)²

    (½, ½) is 2 Σ(√p−√q)², (1, 1) is ½‖p−q‖², (2, −1) is ½χ². All cases are one, with the difference quotient
    G(t) = q^(α+β) ((p/q)^t − 1)/t, which is smooth in t through 0: the value is (G(α+β) − G(α))/β, and h = −G(α).
    """

    alpha: float = 0.5
    beta: float = 0.5

    def value(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        a, b = self.alpha, self.beta
        if a == b == 0:
            return 0.5 * _difference(log_p, log_q) ** 2
        if abs(a) > abs(b):  # D_αβ(p‖q) = D_βα(q‖p), so the division can be by the larger of the two
            a, b, log_p, log_q = b, a, log_q, log_p
        value = (_growth(log_p, log_q, a + b, a + b) - _growth(log_p, log_q, a + b, a)) / b
        # no element is negative, so where two infinities meet the larger one is positive
        return torch.where((log_p == -torch.inf) & (log_q == -torch.inf), 0, value.nan_to_num(torch.inf, torch.inf))

    def grad_log_q(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        a, b = self.alpha, self.beta
        near = log_p.clamp(log_q - _STEEPEST, log_q + _STEEPEST)
        return -_growth(near, log_q, a + b, a).nan_to_num(0.0).clamp(-_LARGEST, _LARGEST)


def _difference(log_a: Tensor, log_b: Tensor) -> Tensor:
    """log(a/b), and 0 where a = b = 0."""
    return torch.where(log_a == log_b, 0, log_a - log_b)


def _log_ratio(log_a: Tensor, log_b: Tensor) -> Tensor:
    """log(a/b), and 0 where a = 0: there it is always multiplied by a."""
    return torch.where(log_a == -torch.inf, 0, log_a - log_b)


def _times_log_ratio(a: Tensor, log_a: Tensor, log_b: Tensor) -> Tensor:
    """a log(a/b), and 0 where a is 0 or too small for its dtype, even if b = 0."""
    return torch.where(a == 0, 0, a * (log_a - log_b))


def _log_ratios_to_mixture(log_p: Tensor, log_q: Tensor, p: Tensor, q: Tensor, weight: float) -> tuple[Tensor, Tensor]:
    """log(p/m) and log(q/m) for m = weight · p + (1 − weight) · q.

    Through log(m/q) = log1p(weight · (p/q − 1)) or its mirror image, whichever has the smaller weight: exact near p = q
    and for weights near 0 and 1. Probabilities below e⁻⁶⁴, which add nothing, count as e⁻⁶⁴.
    """
    ratio = log_p.clamp(min=-64) - log_q.clamp(min=-64)
    p, q = p.clamp(min=math.exp(-64)), q.clamp(min=math.exp(-64))
    if weight <= 0.5:
        m_to_q = torch.log1p(weight * _relative_difference(p, q, ratio))
        return ratio - m_to_q, -m_to_q
    m_to_p = torch.log1p((1 - weight) * _relative_difference(q, p, -ratio))
    return -m_to_p, -ratio - m_to_p


def _relative_difference(a: Tensor, b: Tensor, log_ratio: Tensor) -> Tensor:
    """a/b − 1; where a ≈ b, the Taylor series of exp(log(a/b)) − 1, since a − b would be rounding errors."""
    x, largest = log_ratio, (720 * torch.finfo(a.dtype).eps) ** (1 / 5)  # beyond it x⁶/6! is above x · rounding
    series = x * (1 + x * (1 / 2 + x * (1 / 6 + x * (1 / 24 + x * (1 / 120)))))
    return torch.where(x.abs() < largest, series, (a - b) / b)


def _growth(log_p: Tensor, log_q: Tensor, total: float, power: float) -> Tensor:
    """q^total ((p/q)^power − 1)/power, and q^total log(p/q) for power 0; never through an intermediate overflow."""
    difference = _difference(log_p, log_q)
    start = _log_power(log_q, total)
    if power == 0:
        scale = start.exp()
        return torch.where(scale == 0, 0, scale * difference)
    top = torch.maximum(start, _log_power(log_q, total - power) + _log_power(log_p, power))
    growth = top.exp() * -torch.expm1(-(power * difference).abs()) * difference.sign() / abs(power)
    return torch.where(difference == 0, 0, growth)


def _log_power(log_x: Tensor, exponent: float) -> Tensor:
    """log x^exponent, with x⁰ = 1 even for x = 0."""
    return exponent * log_x if exponent != 0 else torch.zeros_like(log_x)


def _check_alpha(name: str, alpha: float) -> None:
    if not 0 <= alpha <= 1:
        raise ValueError(f"{name} needs alpha between 0 and 1, not {alpha}")

"""How far a student q is from its teacher p: one value per row of log-probabilities.

The one idea: every divergence here has the form D(p, q) = Σ_v f(p_v, q_v), so it is two elementwise functions,

    value    f(p_v, q_v)
    pull     h_v = q_v ∂f/∂q_v

and its gradient with respect to the student's logits z (q = softmax z) is

    ∂D/∂z_v = h_v − q_v Σ_u h_u.

Summation, chunking over the vocabulary projection, top-K teachers and temperature are written once, elsewhere or in the
base class. The teacher always comes first and is a constant: gradients reach the student only.

Conventions: natural logarithms; 0 · log 0 = 0; a token with log-probability −inf on both sides contributes 0 and has
gradient 0. Where only the supports differ, the value is what the formula says (a KL is infinite) while every pull
stays finite. Shapes: N rows, V events.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

_STEEPEST = 1e4  # nats; the log-ratio inside a pull is cut here, so that a forbidden token gives a finite gradient


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
    def pull(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        """h_v = q_v ∂f/∂q_v, elementwise: the derivative of Σ f with respect to log q_v."""

    @property
    def factor(self) -> float:
        """What the sum of values is multiplied by: τ² with `rescale`, else 1."""
        return self.temperature**2 if self.rescale else 1.0

    def __call__(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        """(N, V), (N, V) → (N,), differentiable with respect to `log_q`; `log_p` is treated as a constant."""
        if self.temperature != 1.0:
            log_p, log_q = ((x / self.temperature).log_softmax(-1) for x in (log_p, log_q))
        return self.factor * _Sum.apply(log_p, log_q, self)

    def between(self, teacher: Any, student: Any) -> Tensor:
        """The divergence at every response token, (N,), of two `Scores` of one batch: teacher first, as above."""
        return student.divergence_from(teacher, self)


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
        return None, upstream[..., None] * ctx.divergence.pull(*ctx.saved_tensors), None


@dataclass(frozen=True)
class ForwardKL(Divergence):
    """KL(p‖q) = Σ p log(p/q), pull −p. Covers every mode of the teacher (word-level KD; GKD §2)."""

    def value(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        return log_p.exp() * _log_ratio(log_p, log_q)

    def pull(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        return -log_p.exp()


@dataclass(frozen=True)
class ReverseKL(Divergence):
    """KL(q‖p) = Σ q log(q/p), pull q (log(q/p) + 1). Seeks one mode of the teacher (MiniLLM; GKD §2)."""

    def value(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        return log_q.exp() * _log_ratio(log_q, log_p)

    def pull(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        return log_q.exp() * (_log_ratio(log_q, log_p).clamp(max=_STEEPEST) + 1)


@dataclass(frozen=True)
class JensenShannon(Divergence):
    """Generalized JSD (GKD, Agarwal et al. 2024, Eq. 1). **β weights the teacher**, in the mixture and in front:

        JSD_β(p‖q) = β KL(p‖m) + (1−β) KL(q‖m),   m = βp + (1−β)q,   pull (1−β) q log(q/m)

    Small β covers the teacher's modes, β near 1 seeks one. The formula tends to 0 at both ends, with JSD_β/β → KL(p‖q)
    and JSD_β/(1−β) → KL(q‖p); β = 0 and β = 1 here *mean* those two KLs, as in other libraries, so the value jumps there.
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

    def value(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        if self.beta in (0, 1):
            return (ForwardKL() if self.beta == 0 else ReverseKL()).value(log_p, log_q)
        p_to_m, q_to_m = self._log_ratios(log_p, log_q)
        return (self.beta * self._scale) * log_p.exp() * p_to_m + ((1 - self.beta) * self._scale) * log_q.exp() * q_to_m

    def pull(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        if self.beta in (0, 1):
            return (ForwardKL() if self.beta == 0 else ReverseKL()).pull(log_p, log_q)
        return ((1 - self.beta) * self._scale) * log_q.exp() * self._log_ratios(log_p, log_q)[1]

    def _log_ratios(self, log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
        """log(p/m) and log(q/m) through log(m/q) = log1p(β (p/q − 1)), exact near p = q and for β near its ends.

        Beyond ±80 nats the smaller of p and q adds nothing to either term, so the ratio may be cut there.
        """
        ratio = torch.where(log_p == log_q, 0, log_p - log_q).clamp(-80, 80)
        m_to_q = torch.log1p(self.beta * torch.expm1(ratio))
        return ratio - m_to_q, -m_to_q


@dataclass(frozen=True)
class TotalVariation(Divergence):
    """TVD(p, q) = ½ Σ |p − q|, pull ½ q sign(q − p), with sign 0 at q = p. Lies in [0, 1] (f-distill, GKD §2)."""

    def value(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        return 0.5 * (log_p.exp() - log_q.exp()).abs()

    def pull(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        return 0.5 * log_q.exp() * (log_q - log_p).nan_to_num(0.0).sign()


@dataclass(frozen=True)
class SkewKL(Divergence):
    """KL(p‖m) with m = αp + (1−α)q, pull −(1−α) p q/m. At most −log α (DistiLLM, Ko et al. 2024, Eq. 4)."""

    alpha: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_alpha("skew_kl", self.alpha)

    def value(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        return log_p.exp() * _log_ratio(log_p, _log_mixture(log_p, log_q, self.alpha))

    def pull(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        log_m = _log_mixture(log_p, log_q, self.alpha)
        return -(1 - self.alpha) * log_p.exp() * torch.where(log_m == -torch.inf, 0, (log_q - log_m).exp())


@dataclass(frozen=True)
class SkewReverseKL(Divergence):
    """KL(q‖m) with m = (1−α)p + αq, pull q (log(q/m) + 1 − αq/m). At most −log α (DistiLLM, Eq. 5).

    The mixture's q is differentiated too; DistiLLM-2's script holds it constant.
    """

    alpha: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_alpha("skew_reverse_kl", self.alpha)

    def value(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        return log_q.exp() * _log_ratio(log_q, _log_mixture(log_p, log_q, 1 - self.alpha))

    def pull(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        ratio = _log_ratio(log_q, _log_mixture(log_p, log_q, 1 - self.alpha)).clamp(max=_STEEPEST)
        return log_q.exp() * (ratio + 1 - (self.alpha * ratio.exp() if self.alpha > 0 else 0))


@dataclass(frozen=True)
class AlphaBeta(Divergence):
    """The αβ-divergence (ABKD, Wang et al., ICML 2025):

        D(p‖q) = −1/(αβ) Σ [ p^α q^β − α/(α+β) p^(α+β) − β/(α+β) q^(α+β) ],    pull q^β (q^α − p^α)/α

    with its limits where a denominator vanishes:

        β = 0       1/α² Σ [ p^α log(p^α/q^α) − p^α + q^α ]         (α = 1: KL(p‖q))
        α = 0       1/β² Σ [ q^β log(q^β/p^β) − q^β + p^β ]         (β = 1: KL(q‖p))
        α + β = 0   1/α² Σ [ log(q^α/p^α) + p^α/q^α − 1 ]
        α = β = 0   ½ Σ (log p − log q)²

    (½, ½) is twice the squared Hellinger-type sum Σ(√p−√q)², (1, 1) is ½‖p−q‖², (2, −1) is ½χ².
    """

    alpha: float = 0.5
    beta: float = 0.5

    def value(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        a, b = self.alpha, self.beta
        difference = torch.where(log_p == log_q, 0, log_p - log_q)  # log(p/q)
        if a == 0 and b == 0:
            value = 0.5 * difference**2
        elif a + b == 0:
            value = ((a * difference).exp() - a * difference - 1).nan_to_num(torch.inf, torch.inf) / a**2
        elif b == 0:
            value = (_power(log_p, a) * torch.where(log_p == -torch.inf, 0, a * difference - 1) + _power(log_q, a)) / a**2
        elif a == 0:
            value = (_power(log_q, b) * torch.where(log_q == -torch.inf, 0, -b * difference - 1) + _power(log_p, b)) / b**2
        else:
            cross = torch.where(log_p == log_q, (a + b) * log_p, a * log_p + b * log_q).exp()
            value = (a * _power(log_p, a + b) + b * _power(log_q, a + b)) / (a * b * (a + b)) - cross / (a * b)
        return torch.where((log_p == -torch.inf) & (log_q == -torch.inf), 0, value)

    def pull(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        a, b = self.alpha, self.beta
        difference = torch.where(log_p == log_q, 0, log_q - log_p).clamp(-_STEEPEST, _STEEPEST)  # log(q/p)
        # q^β (q^α − p^α)/α, written so that p = q gives exactly 0
        pull = _power(log_q, b) * difference if a == 0 else -torch.expm1(-a * difference) / a * _power(log_q, a + b)
        return torch.where(log_q == -torch.inf, 0, pull).nan_to_num()


def _log_ratio(log_a: Tensor, log_b: Tensor) -> Tensor:
    """log(a/b), and 0 where a = 0: there it is always multiplied by a."""
    return torch.where(log_a == -torch.inf, 0, log_a - log_b)


def _log_mixture(log_p: Tensor, log_q: Tensor, weight: float) -> Tensor:
    """log(weight · p + (1 − weight) · q)."""
    if weight in (0, 1):
        return log_p if weight == 1 else log_q
    return torch.logaddexp(log_p + math.log(weight), log_q + math.log1p(-weight))


def _power(log_x: Tensor, exponent: float) -> Tensor:
    """x^exponent, with x⁰ = 1 even for x = 0."""
    return (exponent * log_x).exp() if exponent != 0 else torch.ones_like(log_x)


def _check_alpha(name: str, alpha: float) -> None:
    if not 0 <= alpha <= 1:
        raise ValueError(f"{name} needs alpha between 0 and 1, not {alpha}")

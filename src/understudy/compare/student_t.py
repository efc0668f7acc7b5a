"""Student's t distribution for whole degrees of freedom: quantiles and two-sided p values, without further libraries.

Formulas of Abramowitz and Stegun, Handbook of Mathematical Functions (1964): 26.7.3 and 26.7.4, finite sums, below 30
degrees of freedom; from 30 on the expansion 26.7.5 around the normal distribution, whose error at the usual levels is
below 1e-6 there.
"""

import math
from collections.abc import Callable
from functools import lru_cache
from statistics import NormalDist

_NORMAL = NormalDist()
_SUMS_BELOW = 30
_LEAST = 1e-12  # the least p value


@lru_cache(maxsize=100_000)
def quantile(alpha: float, freedom: int) -> float:
    """The t that |T| exceeds with probability `alpha`: 12.706 for 5 % and one degree of freedom."""
    if freedom >= _SUMS_BELOW:
        return _expansion(_NORMAL.inv_cdf(1 - alpha / 2), freedom)
    if freedom == 1:
        return 1 / math.tan(math.pi * alpha / 2)
    high = 1.0
    while 1 - _inside(high, freedom) > alpha:
        high *= 2
    return bisect(lambda t: 1 - _inside(t, freedom) > alpha, 0.0, high)


def p_value(is_outside: Callable[[float], bool]) -> float:
    """The least alpha at which a value is outside of the interval of level 1 − alpha; `is_outside(alpha)`.

    An interval shrinks as alpha grows. At least 1e-12.
    """
    return math.exp(bisect(lambda log_alpha: not is_outside(math.exp(log_alpha)), math.log(_LEAST), 0.0))


def bisect(is_below: Callable[[float], bool], low: float, high: float) -> float:
    """The place between `low` and `high` where `is_below` turns from true to false."""
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if is_below(middle) else (low, middle)
    return high


def _inside(t: float, freedom: int) -> float:
    """P(|T| ≤ t)."""
    angle = math.atan(t / math.sqrt(freedom))
    square = math.cos(angle) ** 2
    term = total = math.cos(angle) if freedom % 2 else 1.0
    for k in range(2 + freedom % 2, freedom - 1, 2):  # (k − 1)/k: 1/2, 3/4, … or 2/3, 4/5, …
        term *= square * (k - 1) / k
        total += term
    if freedom % 2 == 0:
        return math.sin(angle) * total
    return 2 / math.pi * (angle + (math.sin(angle) * total if freedom > 1 else 0.0))


def _expansion(z: float, freedom: int) -> float:
    """The quantile of t from the normal distribution's, z, in powers of 1/freedom."""
    g1 = (z**3 + z) / 4
    g2 = (5 * z**5 + 16 * z**3 + 3 * z) / 96
    g3 = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    g4 = (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160
    return z + g1 / freedom + g2 / freedom**2 + g3 / freedom**3 + g4 / freedom**4

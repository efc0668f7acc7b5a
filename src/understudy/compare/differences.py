"""The difference between two variants on the same prompts, with an interval that holds its level for few seeds.

A score d[s, a] = score of the variant − score of the baseline, with seed s on prompt a, has two sources of chance that
are crossed: the training runs and the prompts. A mean over a few seeds is as uncertain as these seeds are few, however
many prompts there are, so both sources get a variance of their own from a two-way analysis of variance, and Student's
t with the degrees of freedom of each:

    half-width² = max(t²(α, S − 1) · V_seeds, t²(α, (S − 1)(A − 1)) · MS_e/A)/S + t²(α, A − 1) · V_prompts/A
    S, A          the numbers of seeds and prompts
    V_seeds       the variance of the seeds' means
    V_prompts     max(variance of the prompts' means − MS_e/S, 0)
    MS_e          the mean square of the interaction of seeds and prompts, by which the seeds' means differ at least

Banerjee (1960) shows that such a sum covers at least as often as it says, whatever the ratio of the variances; the
second member of the maximum widens it where the seeds agree by chance, as shares of few prompts do.
Replacing the two quantiles by one of Welch's and Satterthwaite's degrees of freedom would be narrower, but with two or
three seeds these are themselves estimated from two or three numbers, and a small variance by chance rejects too often.
The bootstrap of both factors has the same fault: two seeds resampled are often the same seed twice. With one seed the
variance between training runs is unknown: the interval is over prompts alone, and there is no p value.

- S. K. Banerjee (1960), Approximate confidence interval for linear functions of means of k populations when the
  population variances are not equal, Sankhya 22.
- F. E. Satterthwaite (1946), An approximate distribution of estimates of variance components, Biometrics Bulletin 2.
- C. M. Judd, J. Westfall, D. A. Kenny (2012), Treating stimuli as a random factor in social psychology, Journal of
  Personality and Social Psychology 103: designs of two crossed random factors.
- E. Miller (2024), Adding error bars to evals, arXiv:2411.00640: paired differences over prompts.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .student_t import p_value, quantile

LEVEL = 0.95
LEAST_PROMPTS = 20  # below, scores of 0 and 1 are too far from a normal distribution for a p value


@dataclass(frozen=True)
class Difference:
    """A variant's mean score minus the baseline's, with a 95 % interval and a two-sided p value."""

    mean: float
    low: float
    high: float
    p: float | None  # None with one seed or fewer than 20 prompts: then there is no test
    seeds: int  # with one seed the interval is over prompts alone


def paired_difference(scores: Sequence[Sequence[float]], baseline: Sequence[Sequence[float]]) -> Difference:
    """The difference between two (S, A) tables of scores: S seeds, and the same A prompts in each."""
    delta = np.asarray(scores, dtype=np.float64) - np.asarray(baseline, dtype=np.float64)
    seeds, prompts = delta.shape
    mean = float(delta.mean())
    variances = _Variances.of(delta)
    half = variances.half_width(1 - LEVEL)
    tested = seeds > 1 and prompts >= LEAST_PROMPTS
    p = p_value(lambda alpha: abs(mean) > variances.half_width(alpha)) if tested else None
    return Difference(mean, mean - half, mean + half, p, seeds)


@dataclass(frozen=True)
class _Variances:
    """The two-way analysis of variance of an (S, A) table; a variance is 0 where there is only one seed or prompt."""

    shape: tuple[int, int]
    of_seeds: float
    of_prompts: float
    interaction: float

    @classmethod
    def of(cls, delta: np.ndarray) -> "_Variances":
        seeds, prompts = delta.shape
        by_seed, by_prompt = delta.mean(axis=1), delta.mean(axis=0)
        interaction = 0.0
        if seeds > 1 and prompts > 1:
            residual = delta - by_seed[:, None] - by_prompt[None, :] + delta.mean()
            interaction = float((residual**2).sum()) / ((seeds - 1) * (prompts - 1))
        of_prompts = max(_variance(by_prompt) - interaction / seeds, 0.0)
        return cls((seeds, prompts), _variance(by_seed), of_prompts, interaction)

    def half_width(self, alpha: float) -> float:
        """Of the interval of level 1 − alpha."""
        seeds, prompts = self.shape
        of_seeds = of_prompts = 0.0
        if seeds > 1:
            least = quantile(alpha, (seeds - 1) * max(prompts - 1, 1)) ** 2 * self.interaction / prompts
            of_seeds = max(quantile(alpha, seeds - 1) ** 2 * self.of_seeds, least) / seeds
        if prompts > 1:
            of_prompts = quantile(alpha, prompts - 1) ** 2 * self.of_prompts / prompts
        return (of_seeds + of_prompts) ** 0.5


def _variance(values: np.ndarray) -> float:
    return float(values.var(ddof=1)) if len(values) > 1 else 0.0

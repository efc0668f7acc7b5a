"""How often are variants that are equal called significantly different? `python -m benchmarks.null_differences`.

Both variants answer the same prompts. A run's accuracy is shifted by a normal number of its own, which stands for its
training; the variants are the same otherwise, so every rejection is an error. Beside the test of `understudy compare`
is the percentile bootstrap that resamples seeds and prompts.
"""

import argparse
from collections.abc import Callable

import numpy as np

from understudy.compare.differences import paired_difference

SETTINGS = {
    "half right": {"prompts": 1000, "accuracy": 0.5, "deviation": 0.019},
    "half right, no chance in training": {"prompts": 1000, "accuracy": 0.5, "deviation": 0.0},
    "few prompts": {"prompts": 50, "accuracy": 0.5, "deviation": 0.019},
    "few right": {"prompts": 500, "accuracy": 0.04, "deviation": 0.01},
    "variants that are good at different prompts": {"prompts": 500, "accuracy": 0.5, "deviation": 0.019, "taste": 0.2},
}
Test = Callable[[np.ndarray, np.ndarray], float]


def scores(
    draw: np.random.Generator, seeds: int, prompts: int, accuracy: float, deviation: float, taste: float = 0.0
) -> np.ndarray:
    """(2, S, A) right or wrong answers of two variants that are equally good.

    Args:
        accuracy: mean over prompts, whose difficulties have a beta distribution.
        deviation: standard deviation of a run's accuracy over training seeds.
        taste: standard deviation over prompts of what a variant is better or worse at, the same for all of its seeds.
    """
    difficulty = draw.beta(1.5 * accuracy, 1.5 * (1 - accuracy), prompts)
    training = draw.normal(0, deviation, (2, seeds, 1))
    preference = draw.normal(0, taste, (2, 1, prompts))
    return (draw.random((2, seeds, prompts)) < difficulty + training + preference).astype(float)


def rejections(test: Test, count: int, seeds: int, **settings: float) -> float:
    """The share of `count` comparisons of equal variants with p < 0.05."""
    draw = np.random.default_rng(seeds)
    return float(np.mean([test(*scores(draw, seeds, **settings)) < 0.05 for _ in range(count)]))  # type: ignore


def analysis_of_variance(scores: np.ndarray, baseline: np.ndarray) -> float:
    """The p value of `understudy compare`; NaN where it gives none."""
    p = paired_difference(scores, baseline).p  # type: ignore
    return float("nan") if p is None else p


def bootstrap(scores: np.ndarray, baseline: np.ndarray, resamples: int = 1000) -> float:
    """The p value of a percentile bootstrap over seeds and prompts."""
    delta = scores - baseline
    draw = np.random.default_rng(0)
    by_seed, by_prompt = (draw.multinomial(n, np.full(n, 1 / n), resamples) / n for n in delta.shape)
    means = ((by_seed @ delta) * by_prompt).sum(axis=1)
    other = (means <= 0).mean() if delta.mean() > 0 else (means >= 0).mean()
    return max(2 * float(other), 1 / resamples)


def main() -> None:
    parser = argparse.ArgumentParser(description="rejections at p < 0.05 of equal variants")
    parser.add_argument("--count", type=int, default=4000, help="comparisons for each cell")
    parser.add_argument("--bootstrap-count", type=int, default=400)
    options = parser.parse_args()
    counts = {analysis_of_variance: options.count, bootstrap: options.bootstrap_count}
    numbers = (1, 2, 3, 4, 5, 7, 10)
    print("| setting | test | " + " | ".join(f"{n} seed{'s' * (n > 1)}" for n in numbers) + " |")
    print("|---|---|" + "---|" * len(numbers))
    for name, settings in SETTINGS.items():
        for test, count in counts.items():
            shares = [rejections(test, count, seeds, **settings) for seeds in numbers]
            untested = [test is analysis_of_variance and seeds == 1 for seeds in numbers]
            cells = ["–" if no else f"{share:.1%}" for no, share in zip(untested, shares, strict=True)]
            print(f"| {name} | {test.__name__.replace('_', ' ')} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()

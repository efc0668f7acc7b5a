"""Statistics over runs: means over seeds, confidence intervals, paired differences, costs.

The table is computed from saved results, so that it can be computed again at any time. A result has one model's metrics
under every protocol ("greedy", "T=1") and, where each response is correct or wrong, the score of every response, by
which two models are compared on the same prompts.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..budget import amount, spent
from .differences import LEAST_PROMPTS, Difference, paired_difference
from .student_t import quantile

Differences = Mapping[str, Mapping[str, Difference]]  # protocol → metric → difference, where prompts are paired
SHARES = ("accuracy", "truncated", "agreement", "top_10_overlap")  # metrics that are written in percent


@dataclass(frozen=True)
class Result:
    """The metrics of one model, and what its training cost."""

    metrics: Mapping[str, Mapping[str, float]]  # protocol → metric → value
    scores: Mapping[str, Mapping[str, Sequence[float]]] = field(default_factory=dict)  # the same of every prompt
    seconds: float | None = None  # of training
    cpu_seconds: float | None = None
    tokens: float | None = None  # response tokens trained on
    budget: Mapping[str, Any] | None = None  # the limit, what was spent and what ended the run, as run.json has it


@dataclass(frozen=True)
class Spread:
    """A mean over seeds with its standard deviation and the ends of Student's 95 % interval (one seed: the mean)."""

    mean: float
    deviation: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """The sample standard deviation (n − 1) and mean ± t · deviation/√n."""
        array = np.asarray(values, dtype=np.float64)
        mean = float(array.mean())
        if len(array) < 2:
            return cls(mean, 0.0, mean, mean)
        deviation = float(array.std(ddof=1))
        half = quantile(0.05, len(array) - 1) * deviation / len(array) ** 0.5
        return cls(mean, deviation, mean - half, mean + half)


@dataclass(frozen=True)
class TableRow:
    """One variant in the table."""

    name: str
    seeds: int
    failed: tuple[str, ...]  # why some seeds have no result
    metrics: Mapping[str, Mapping[str, Spread]]  # protocol → metric → its spread
    difference: Differences  # from the baseline
    gain: Differences  # from the warm start
    gap_closed: Mapping[str, Mapping[str, float]]  # protocol → metric → share of the gap from warm start to teacher
    seconds: Spread | None
    cpu_seconds: Spread | None
    tokens: Spread | None
    budget: Mapping[str, float] | None  # {"tokens" or "seconds": the limit}, where all seeds had the same
    ended_early: tuple[str, ...]  # seeds that ended before their budget was spent, and by what


def table_rows(
    results: Mapping[str, Mapping[int, Result | str]],
    baseline: str | None = None,
    teacher: Result | None = None,
    start: Result | None = None,
) -> list[TableRow]:
    """The table of `results`: variant → seed → its result, or why there is none."""
    table = []
    for name, by_seed in results.items():
        finished = {seed: r for seed, r in by_seed.items() if isinstance(r, Result)}
        failed = tuple(f"seed {seed}: {r}" for seed, r in by_seed.items() if isinstance(r, str))
        metrics = _spreads(list(finished.values()))
        difference = _differences(finished, results[baseline]) if baseline not in (None, name) else {}
        costs = {n: _cost(list(finished.values()), n) for n in ("seconds", "cpu_seconds", "tokens")}
        gain = _differences(finished, dict.fromkeys(finished, start)) if start is not None else {}
        gap = _gap_closed(metrics, teacher, start)
        ends = {"budget": _limit(finished), "ended_early": _ended_early(finished)}
        table.append(TableRow(name, len(finished), failed, metrics, difference, gain, gap, **costs, **ends))
    return table


def _limit(results: Mapping[int, Result]) -> dict[str, float] | None:
    limits = [
        {k: r.budget[k] for k in ("tokens", "seconds") if k in r.budget} if r.budget else None for r in results.values()
    ]
    return limits[0] if limits and all(limit == limits[0] for limit in limits) else None


def _ended_early(results: Mapping[int, Result]) -> tuple[str, ...]:
    budgets = {seed: r.budget for seed, r in results.items() if r.budget}
    return tuple(
        f"seed {seed}: {b['ended_by']} ended the run with {spent(b)} spent"
        for seed, b in budgets.items()
        if b["ended_by"] != "budget"
    )


def budget_notes(rows: Sequence[TableRow]) -> list[str]:
    """The budget of every variant, and which runs ended before it was spent."""
    finished = [row for row in rows if row.seeds]
    limits = [row.budget for row in finished]
    notes = []
    if limits and limits[0] and all(limit == limits[0] for limit in limits):
        notes = [f"Every run could spend {amount(limits[0])}."]
    elif any(limits):
        notes = [
            f"{row.name} {f'could spend {amount(row.budget)}' if row.budget else 'had no budget'}." for row in finished
        ]
    return notes + [f"{row.name}, {end}." for row in finished for end in row.ended_early]


def difference_notes(rows: Sequence[TableRow]) -> list[str]:
    """Why differences in the table have no p value."""
    differences = [by_metric for row in rows for by_metric in (*row.difference.values(), *row.gain.values())]
    untested = [d for by_metric in differences for d in by_metric.values() if d.p is None]
    notes = []
    if any(difference.seeds < 2 for difference in untested):
        notes.append(
            "With one seed, the interval of a difference is over prompts alone: what another seed would change is "
            "unknown, so there is no p value."
        )
    if any(difference.seeds > 1 for difference in untested):
        notes.append(f"With fewer than {LEAST_PROMPTS} prompts, a difference has no p value.")
    return notes


def _spreads(results: list[Result]) -> dict[str, dict[str, Spread]]:
    if not results:
        return {}
    return {
        protocol: {
            metric: Spread.of([r.metrics[protocol][metric] for r in results])
            for metric in metrics
            if all(metric in r.metrics[protocol] for r in results)  # none where responses were read from a file
        }
        for protocol, metrics in results[0].metrics.items()
    }


def _differences(results: Mapping[int, Result], baseline: Mapping[int, Result | str]) -> Differences:
    """The differences from the baseline over the seeds that both have, in metrics with a number for every prompt."""
    pairs = [
        (result, baseline_result)
        for seed, result in results.items()
        if isinstance(baseline_result := baseline.get(seed), Result)
    ]
    differences: dict[str, dict[str, Difference]] = {}
    for protocol, scores in (pairs[0][0].scores if pairs else {}).items():
        for metric in scores:
            if (difference := difference_of(pairs, protocol, metric)) is not None:
                differences.setdefault(protocol, {})[metric] = difference
    return differences


def difference_of(pairs: Sequence[tuple[Result, Result]], protocol: str, metric: str) -> Difference | None:
    """The difference of pairs of results, one for each seed; None unless all have scores of the same prompts."""
    first, second = ([pair[i].scores.get(protocol, {}).get(metric, ()) for pair in pairs] for i in (0, 1))
    if len({len(scores) for scores in (*first, *second)}) != 1 or not first[0]:
        return None
    return paired_difference(first, second)


def _gap_closed(
    metrics: Mapping[str, Mapping[str, Spread]], teacher: Result | None, start: Result | None
) -> dict[str, dict[str, float]]:
    """(mean − start)/(teacher − start), for metrics in which the two differ."""
    if teacher is None or start is None:
        return {}
    shares: dict[str, dict[str, float]] = {}
    for protocol, spreads in metrics.items():
        for metric, spread in spreads.items():
            top, bottom = (r.metrics.get(protocol, {}).get(metric) for r in (teacher, start))
            if top is not None and bottom is not None and top != bottom:
                shares.setdefault(protocol, {})[metric] = (spread.mean - bottom) / (top - bottom)
    return shares


def _cost(results: list[Result], name: str) -> Spread | None:
    values = [getattr(r, name) for r in results]
    return Spread.of(values) if values and None not in values else None

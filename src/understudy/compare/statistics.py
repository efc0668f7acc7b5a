"""What follows from several runs: means over seeds, intervals, differences, and what the improvement cost.

The one idea: a comparison is a table computed from plain results, so that it can be computed again at any time. A
result is one model's metrics under every protocol ("greedy", "T=1") and, where answers are right or wrong one by one,
the score of every answer, by which two models are compared on the same problems.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..budget import amount, spent

RESAMPLES = 10_000
_SHARES = ("accuracy", "truncated")  # written in percent


@dataclass(frozen=True)
class Result:
    """One model, measured."""

    metrics: Mapping[str, Mapping[str, float]]  # protocol → metric → value
    scores: Mapping[str, Sequence[float]] = field(default_factory=dict)  # protocol → one number per answer
    seconds: float | None = None  # of training
    cpu_seconds: float | None = None
    tokens: float | None = None  # response tokens trained on
    budget: Mapping[str, Any] | None = None  # the limit, what was spent and what ended the run, as run.json has it


@dataclass(frozen=True)
class Spread:
    """A mean over seeds. `low` and `high` are the ends of Student's 95 % interval; equal to the mean for one seed."""

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
        half = _student_t(len(array) - 1) * deviation / len(array) ** 0.5
        return cls(mean, deviation, mean - half, mean + half)


@dataclass(frozen=True)
class Difference:
    """One contestant's mean score less the baseline's, with a paired bootstrap's 95 % interval and p value."""

    mean: float
    low: float
    high: float
    p: float


def difference(ours: Sequence[Sequence[float]], theirs: Sequence[Sequence[float]], seed: int = 0) -> Difference:
    """The paired bootstrap of two (S, A) tables of scores, S seeds and A answers to the same A problems in each.

    Seeds and problems are both drawn anew, with replacement, `RESAMPLES` times. p is twice the share of the resamples
    that lie on the other side of 0 than the mean, at least 1/RESAMPLES.
    """
    delta = np.asarray(ours, dtype=np.float64) - np.asarray(theirs, dtype=np.float64)
    runs, answers = delta.shape
    draw = np.random.default_rng(seed)
    problems = draw.multinomial(answers, np.full(answers, 1 / answers), size=RESAMPLES) / answers
    seeds = draw.multinomial(runs, np.full(runs, 1 / runs), size=RESAMPLES) / runs
    means = ((seeds @ delta) * problems).sum(axis=1)
    low, high = np.quantile(means, (0.025, 0.975))
    mean = float(delta.mean())
    other = float((means <= 0).mean() if mean > 0 else (means >= 0).mean())
    return Difference(mean, float(low), float(high), min(1.0, max(2 * other, 1 / RESAMPLES)))


@dataclass(frozen=True)
class Line:
    """One contestant in the table."""

    name: str
    seeds: int
    failed: tuple[str, ...]  # why some seeds have no result
    metrics: Mapping[str, Mapping[str, Spread]]  # protocol → metric → its spread
    against: Mapping[str, Difference]  # protocol → the difference from the baseline, where answers can be paired
    closed: Mapping[str, Mapping[str, float]]  # protocol → metric → share of the way from the warm start to the teacher
    seconds: Spread | None
    cpu_seconds: Spread | None
    tokens: Spread | None
    budget: Mapping[str, float] | None  # {"tokens" or "seconds": the limit}, where all seeds had the same
    early: tuple[str, ...]  # which seeds ended before their budget was spent, and by what


def lines(
    results: Mapping[str, Mapping[int, Result | str]],
    baseline: str | None = None,
    teacher: Result | None = None,
    start: Result | None = None,
) -> list[Line]:
    """The table of `results`: contestant → seed → its result, or why there is none."""
    table = []
    for name, by_seed in results.items():
        found = {seed: r for seed, r in by_seed.items() if isinstance(r, Result)}
        failed = tuple(f"seed {seed}: {r}" for seed, r in by_seed.items() if isinstance(r, str))
        metrics = _spreads(list(found.values()))
        against = _against(found, results[baseline]) if baseline not in (None, name) else {}
        costs = {n: _cost(list(found.values()), n) for n in ("seconds", "cpu_seconds", "tokens")}
        closed = _closed(metrics, teacher, start)
        budget, early = _limit(found), _early(found)
        line = Line(name, len(found), failed, metrics, against, closed, **costs, budget=budget, early=early)
        table.append(line)
    return table


def _limit(found: Mapping[int, Result]) -> dict[str, float] | None:
    limits = [
        {k: r.budget[k] for k in ("tokens", "seconds") if k in r.budget} if r.budget else None for r in found.values()
    ]
    return limits[0] if limits and all(limit == limits[0] for limit in limits) else None


def _early(found: Mapping[int, Result]) -> tuple[str, ...]:
    budgets = {seed: r.budget for seed, r in found.items() if r.budget}
    return tuple(
        f"seed {seed}: {b['ended_by']} ended the run with {spent(b)} spent"
        for seed, b in budgets.items()
        if b["ended_by"] != "budget"
    )


def budget_notes(table: Sequence[Line]) -> list[str]:
    """What every contestant could spend, and who left some of it."""
    having = [line for line in table if line.seeds]
    limits = [line.budget for line in having]
    notes = []
    if limits and limits[0] and all(limit == limits[0] for limit in limits):
        notes = [f"Every run could spend {amount(limits[0])}."]
    elif any(limits):
        notes = [
            f"{line.name} could spend {amount(line.budget) if line.budget else 'what it wanted'}." for line in having
        ]
    return notes + [f"{line.name}, {how}." for line in having for how in line.early]


def _spreads(results: list[Result]) -> dict[str, dict[str, Spread]]:
    if not results:
        return {}
    first = results[0].metrics
    return {
        protocol: {metric: Spread.of([r.metrics[protocol][metric] for r in results]) for metric in first[protocol]}
        for protocol in first
    }


def _against(ours: Mapping[int, Result], theirs: Mapping[int, Result | str]) -> dict[str, Difference]:
    """Over the seeds that both have."""
    pairs = [(ours[seed], other) for seed in ours if isinstance(other := theirs.get(seed), Result)]
    if not pairs:
        return {}
    protocols = [p for p in pairs[0][0].scores if p in pairs[0][1].scores]
    return {p: difference([a.scores[p] for a, _ in pairs], [b.scores[p] for _, b in pairs]) for p in protocols}


def _closed(
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


def _student_t(freedom: int) -> float:
    """The 97.5 % quantile of Student's t with so many degrees of freedom."""
    table = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
    return table[freedom - 1] if freedom <= len(table) else 1.96 + 2.4 / freedom


def markdown(table: Sequence[Line], columns: Sequence[tuple[str, str]], extra: Mapping[str, Result]) -> str:
    """The table in Markdown.

    Args:
        columns: (protocol, metric) pairs.
        extra: models to show above the contestants, such as the teacher.
    """
    heads = ["model", *(f"{metric} ({protocol})" for protocol, metric in columns)]
    heads += ["difference", "gap closed", "seconds", "CPU seconds", "response tokens"]
    rows = [
        [name, *(_number(r.metrics.get(p, {}).get(m), m) for p, m in columns), "", "", "", "", ""]
        for name, r in extra.items()
    ]
    for line in table:
        row = [line.name]
        for protocol, metric in columns:
            spread = line.metrics.get(protocol, {}).get(metric)
            row.append("" if spread is None else _plus_minus(spread, metric, line.seeds))
        first = columns[0][0]
        against, closed = line.against.get(first), line.closed.get(first, {}).get(columns[0][1])
        row.append("" if against is None else f"{100 * against.mean:+.1f} (p {_p(against.p)})")
        row.append("" if closed is None else f"{closed:.0%}")
        row += ["" if s is None else f"{s.mean:,.0f}" for s in (line.seconds, line.cpu_seconds, line.tokens)]
        if line.failed:
            row[0] += f" ({len(line.failed)} failed)"
        rows.append(row)
    used = [i for i in range(len(heads)) if i == 0 or any(row[i] for row in rows)]
    text = ["| " + " | ".join(row[i] for i in used) + " |" for row in [heads, *rows]]
    text.insert(1, "|---" * len(used) + "|")
    notes = [f"- {line.name}, {why}" for line in table for why in line.failed]
    notes += [f"- {note}" for note in budget_notes(table)]
    return "\n".join([*text, *([""] if notes else []), *notes]) + "\n"


def _plus_minus(spread: Spread, metric: str, seeds: int) -> str:
    text = _number(spread.mean, metric)
    scale = 100 if metric in _SHARES else 1
    return text if seeds < 2 else with_deviation(text, scale * spread.deviation)


def _number(value: float | None, metric: str) -> str:
    if value is None:
        return ""
    return f"{100 * value:.1f}" if metric in _SHARES else f"{value:#.4g}".rstrip(".")


def with_deviation(mean: str, deviation: float) -> str:
    """A mean as it is written, and its deviation to the same digit."""
    return f"{mean} ± {deviation:.{len(mean.partition('.')[2])}f}"


def _p(value: float) -> str:
    return f"{value:.3f}" if value >= 0.001 else "< 0.001"

"""The data of curves: over a sweep's values, and exposure bias and distances by position in the response.

A point of a curve is a `Spread`, like a cell of the table: a mean with an interval over seeds.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import takewhile, zip_longest
from typing import Any

from ..compare.statistics import Spread
from .records import is_number

KLS = ("reverse_kl", "forward_kl")
_DECADES = 30  # positive values whose largest is more than this times the smallest get a logarithmic axis


def sweep(record: Mapping[str, Any], evaluated: Sequence[str]) -> dict[str, Any] | None:
    """The sweep in a comparison's record, for the variants that were evaluated.

    Returns the `option`, the `axis` (linear, log, or words for values that are not all numbers) and the `recipes`, each
    with its points (`name` of the variant, `value`, and `written` as it was given), in the order of the axis.
    """
    content = record.get("sweep") or {}
    points = {name: point for name, point in content.get("points", {}).items() if name in evaluated}
    if not points:
        return None
    values = [point["value"] for point in points.values()]
    numbers = all(is_number(value) and math.isfinite(value) for value in values)
    axis = "words" if not numbers else "log" if min(values) > 0 and max(values) > _DECADES * min(values) else "linear"
    recipes: dict[str, list[dict[str, Any]]] = {}
    for name, point in points.items():
        recipes.setdefault(point["recipe"], []).append(
            {"name": name, "value": point["value"], "written": point["written"]}
        )
    if numbers:
        recipes = {recipe: sorted(points, key=lambda point: point["value"]) for recipe, points in recipes.items()}
    return {"option": content["option"], "axis": axis, "recipes": recipes}


def exposure_bias(runs: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Exposure bias of each variant that measured it, in percent by position: `mean`, `low`, `high` and the `seeds`.

    `low` and `high` are the ends of the 95 % interval over seeds; of two seeds, whose interval is too wide, the seeds'
    own values; of a single seed, ± one standard error over prompts. The curve ends with the last position that the
    responses of all seeds reach.
    """
    curves = _by_variant(runs, "exposure_bias")
    return {
        name: _single_seed(by_seed[0]) if len(by_seed) == 1 else _several_seeds(by_seed)
        for name, by_seed in curves.items()
    }


def distance(runs: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, list[float]]]:
    """Both KLs by position for each variant that measured them: means over the tokens of all its runs.

    A curve ends where fewer than a twentieth of the responses are as long.
    """
    curves = _by_variant(runs, "distance")
    return {name: {kind: _pooled(by_run, kind) for kind in KLS} for name, by_run in curves.items()}


def _by_variant(runs: Sequence[Mapping[str, Any]], kind: str) -> dict[str, list[Mapping[str, Any]]]:
    """The runs' curves of one kind by position, grouped by variant."""
    curves: dict[str, list[Mapping[str, Any]]] = {}
    for run in runs:
        if curve := run["positions"].get(kind):
            curves.setdefault(run["name"], []).append(curve)
    return curves


def _pooled(curves: Sequence[Mapping[str, Any]], kind: str) -> list[float]:
    """Σ alive · value / Σ alive at each position."""
    columns = list(
        zip_longest(*(zip(c["alive"], c[kind], strict=False) for c in curves if kind in c), fillvalue=(0, 0))
    )
    reached = [[(alive, value) for alive, value in column if alive and value is not None] for column in columns]
    counts = [sum(alive for alive, _ in column) for column in reached]
    long = takewhile(lambda count: count > 0 and count >= counts[0] / 20, counts)
    return [sum(alive * value for alive, value in column) / count for column, count in zip(reached, long, strict=False)]


def _single_seed(curve: Mapping[str, Any]) -> dict[str, Any]:
    mean = curve["percent"]
    errors = [*(curve.get("standard_error") or []), *[None] * len(mean)]
    ends = {
        name: [None if m is None else m + sign * (error or 0.0) for m, error in zip(mean, errors, strict=False)]
        for name, sign in (("low", -1), ("high", 1))
    }
    return {"seeds": 1, "mean": mean, **ends}


def _several_seeds(curves: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    columns = zip(*(curve["percent"] for curve in curves), strict=False)
    spreads = [None if None in column else _spread(column) for column in columns]
    ends = {name: [s and getattr(s, name) for s in spreads] for name in ("mean", "low", "high")}
    return {"seeds": len(curves), **ends}


def _spread(values: Sequence[float]) -> Spread:
    spread = Spread.of(values)
    return spread if len(values) > 2 else replace(spread, low=min(values), high=max(values))

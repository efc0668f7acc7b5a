"""The numbers of curves over a sweep's values, and of exposure bias and distances by position in the response.

A point of a curve is a `Spread`, as a cell of the table is: a mean with an interval over seeds.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import takewhile, zip_longest
from typing import Any

from ..compare.statistics import Spread

KLS = ("reverse_kl", "forward_kl")
_DECADES = 30  # values that span more than this, and are all above 0, stand on a logarithmic axis


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
    numbers = all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)
    axis = "words" if not numbers else "log" if min(values) > 0 and max(values) > _DECADES * min(values) else "linear"
    recipes: dict[str, list[dict[str, Any]]] = {}
    for name, point in points.items():
        recipes.setdefault(point["recipe"], []).append(
            {"name": name, "value": point["value"], "written": point["written"]}
        )
    if numbers:
        recipes = {recipe: sorted(of, key=lambda point: point["value"]) for recipe, of in recipes.items()}
    return {"option": content["option"], "axis": axis, "recipes": recipes}


def exposure_bias(runs: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """For each variant whose runs measured it, in percent by position: `mean`, `low` and `high`, and the `seeds`.

    The ends are those of the 95 % interval over seeds; of two seeds, whose interval would hide everything, they are the
    seeds' own values, and of a single one they are one standard error over prompts away. The curve ends with the last
    position that the responses of all seeds reach.
    """
    curves = _by_variant(runs, "exposure_bias")
    return {name: _of_one(of[0]) if len(of) == 1 else _of_several(of) for name, of in curves.items()}


def distance(runs: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, list[float]]]:
    """For each variant whose runs measured them, both KLs by position: means over the tokens of all its runs.

    A curve ends where fewer than a twentieth of the responses are as long.
    """
    curves = _by_variant(runs, "distance")
    return {name: {kind: _pooled(of, kind) for kind in KLS} for name, of in curves.items()}


def _by_variant(runs: Sequence[Mapping[str, Any]], kind: str) -> dict[str, list[Mapping[str, Any]]]:
    """The curves of one kind over positions, of each variant's runs that have it."""
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


def _of_one(curve: Mapping[str, Any]) -> dict[str, Any]:
    mean = curve["percent"]
    errors = [*(curve.get("standard_error") or []), *[None] * len(mean)]
    ends = {
        name: [None if m is None else m + sign * (error or 0.0) for m, error in zip(mean, errors, strict=False)]
        for name, sign in (("low", -1), ("high", 1))
    }
    return {"seeds": 1, "mean": mean, **ends}


def _of_several(curves: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    columns = zip(*(curve["percent"] for curve in curves), strict=False)
    spreads = [None if None in column else _spread(column) for column in columns]
    ends = {name: [s and getattr(s, name) for s in spreads] for name in ("mean", "low", "high")}
    return {"seeds": len(curves), **ends}


def _spread(values: Sequence[float]) -> Spread:
    spread = Spread.of(values)
    return spread if len(values) > 2 else replace(spread, low=min(values), high=max(values))

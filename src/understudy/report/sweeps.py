"""Charts of a sweep: a metric over the values of the swept option, with a line for each recipe.

Up to three recipes share a panel; with more, each has its own panel, and the others are in grey.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import NullLocator

from .drawing import ACCENT, FAINT, INK, SOFT, WIDTH, Chart, Panel, label_ends, plain
from .text import heading, interval, is_share, number

_COLOURS = (ACCENT, INK, SOFT)  # the lines of one panel, best first
_LEFT, _RIGHT = 0.13, 0.72
_OFFSET = 0.12  # distance between recipes at a word, as a share of the distance to the next word
_LETTER = 3.9  # the approximate width of a letter of a tick's label, in points
_GREY_LINES = 8  # behind a recipe's own
_FAR = 0.75  # a reference farther away than this times the height of the curves is named, and not drawn

Point = tuple[float, Mapping[str, float], str]  # place on the axis, spread, the value as it was written


@dataclass(frozen=True)
class _Curves:
    """One metric of a sweep."""

    metric: str
    option: str
    axis: str  # linear, log or words
    lines: Mapping[str, Sequence[Point]]  # by recipe, the best first
    references: Mapping[str, float]  # teacher, warm start, baseline


def swept(content: Mapping[str, Any]) -> list[Chart]:
    """A chart for each metric over the values of a comparison's sweep; none without a sweep.

    Metrics that are the same everywhere are left out, unless they measure quality.
    """
    comparison = content["comparison"]
    if not comparison or not comparison["sweep"]:
        return []
    charts = []
    seeds = max(row["seeds"] for row in comparison["rows"])
    about = {1: "one seed each", 2: "means, and from one seed to the other"}
    about = about.get(seeds, "means and 95 % intervals over seeds")
    for protocol, metric in comparison["columns"]:
        curves = _curves(comparison, protocol, metric)
        means = {spread["mean"] for points in curves.lines.values() for _, spread, _ in points}
        if len(means) > 1 or (means and [protocol, metric] in comparison["quality"]):
            charts.append(_chart(curves, protocol, about))
    return charts


def _curves(comparison: Mapping[str, Any], protocol: str, metric: str) -> _Curves:
    by_name = {
        row["name"]: spread if row["seeds"] != 2 else _from_seed_to_seed(spread)
        for row in comparison["rows"]
        if (spread := row["metrics"].get(protocol, {}).get(metric)) is not None
    }
    sweep = comparison["sweep"]
    words = list(dict.fromkeys(point["written"] for points in sweep["recipes"].values() for point in points))
    lines: dict[str, list[Point]] = {}
    for recipe, points in sweep["recipes"].items():
        for point in points:
            place = words.index(point["written"]) if sweep["axis"] == "words" else point["value"]
            if (spread := by_name.get(point["name"])) is not None:
                lines.setdefault(recipe, []).append((place, spread, point["written"]))
    best = sorted(lines, key=lambda recipe: -max(spread["mean"] for _, spread, _ in lines[recipe]))
    models = comparison["references"].items()
    references = {name: r["metrics"].get(protocol, {}).get(metric) for name, r in models}
    references["baseline"] = (by_name.get(comparison["baseline"]) or {}).get("mean")
    references = {name: value for name, value in references.items() if value is not None}
    return _Curves(metric, sweep["option"], sweep["axis"], {recipe: lines[recipe] for recipe in best}, references)


def _from_seed_to_seed(spread: Mapping[str, float]) -> dict[str, float]:
    """The spread of two seeds with their values as ends: the 95 % interval, ± 12.7 standard errors, is too wide."""
    half = spread["deviation"] / 2**0.5
    return {**spread, "low": spread["mean"] - half, "high": spread["mean"] + half}


def _chart(curves: _Curves, protocol: str, about: str) -> Chart:
    short = curves.option.rpartition(".")[2]
    title = f"{heading(curves.metric)} ({protocol}) over {short}"
    if len(curves.lines) <= len(_COLOURS):
        panels = [_panel(title, curves, dict(zip(curves.lines, _COLOURS, strict=False)))]
    else:
        greys = dict.fromkeys(curves.lines, FAINT)
        panels = [_panel(recipe, curves, {**greys, recipe: ACCENT}) for recipe in curves.lines]
    return Chart(f"sweep-{protocol}-{curves.metric}".replace("=", ""), title, about, panels)


def _panel(title: str, curves: _Curves, colours: Mapping[str, str]) -> Panel:
    """The recipes' lines in these colours, with error bars and names for those that are not grey."""
    named = [recipe for recipe in curves.lines if colours[recipe] != FAINT]
    limits, near = _limits(curves)

    def draw(axes: Axes) -> None:
        if curves.axis == "log":
            axes.set_xscale("log")
        ends = []
        grey = [recipe for recipe in curves.lines if recipe not in named][:_GREY_LINES]
        for recipe in [*grey, *named]:
            colour, points = colours[recipe], curves.lines[recipe]
            linestyle = "none" if curves.axis == "words" else "-"
            offset = (
                _OFFSET * (named.index(recipe) - (len(named) - 1) / 2) if linestyle == "none" and recipe in named else 0
            )
            thin = {} if recipe in named else {"linewidth": 0.7, "ms": 2}
            style = {"color": colour, "linestyle": linestyle, "marker": "o", "ms": 3, **thin}
            axes.plot([x + offset for x, _, _ in points], [s["mean"] for _, s, _ in points], **style)
            for x, spread, _ in points if recipe in named else ():
                axes.plot([x + offset, x + offset], [spread["low"], spread["high"]], color=colour, linewidth=0.8)
            if recipe in named:
                last = points[-1][1]["mean"]
                ends.append((last, recipe if len(curves.lines) > 1 else number(last, curves.metric), colour))
        for name, value in curves.references.items():
            far = "" if name in near else f" {number(value, curves.metric)} {'↑' if value > limits[1] else '↓'}"
            ends.append((min(max(value, limits[0]), limits[1]), name + far, SOFT))
            if name in near:
                axes.axhline(value, color=SOFT, linewidth=0.8, linestyle=(0, (3, 2)), zorder=0.5)
        axes.set_ylim(limits)
        plain(axes, steps=False, shares=is_share(curves.metric))
        _tick(axes, curves)
        label_ends(axes, ends)

    about = [f"{recipe}: {_description(curves.lines[recipe], curves.metric)}" for recipe in named]
    about += [f"{name} {number(value, curves.metric)}" for name, value in curves.references.items()]
    return Panel(title, f"Over {curves.option}. " + "; ".join(about) + ".", draw, 2.3, right=_RIGHT, left=_LEFT)


def _description(points: Sequence[Point], metric: str) -> str:
    return ", ".join(f"{number(s['mean'], metric)}{interval(s, metric)} at {text}" for _, s, text in points)


def _limits(curves: _Curves) -> tuple[tuple[float, float], set[str]]:
    """The limits of the axes, and the references that are inside."""
    values = [s[end] for line in curves.lines.values() for _, s, _ in line for end in ("low", "mean", "high")]
    low, high = min(values), max(values)
    room = _FAR * ((high - low) or abs(high) or 1.0)
    near = {name for name, value in curves.references.items() if low - room <= value <= high + room}
    inside = [*values, *(curves.references[name] for name in near)]
    edge = 0.06 * (max(inside) - min(inside)) or abs(high) or 1.0
    return (min(inside) - edge, max(inside) + edge), near


def _tick(axes: Axes, curves: _Curves) -> None:
    """Label the swept values as written; labels that are too close are in two rows (words) or left out (numbers)."""
    labels = {x: text for line in curves.lines.values() for x, _, text in line}
    places = sorted(labels)
    axes.set_xlabel(curves.option, fontsize=7, labelpad=2)
    axes.xaxis.set_minor_locator(NullLocator())
    axes.grid(axis="x", linewidth=0)
    if curves.axis == "words":
        axes.set_xlim(-0.5, len(places) - 0.5)
        letters = (_RIGHT - _LEFT) * WIDTH * 72 / len(places) / _LETTER  # letters from one place to the next
        rows = 2 if max(map(len, labels.values())) > letters else 1
        texts = [
            text if len(text) <= rows * letters else f"{text[: int(rows * letters) - 1]}…" for text in labels.values()
        ]
        axes.set_xticks(places, ["\n" * (i % rows) + text for i, text in enumerate(texts)])
        if rows > 1:
            axes.set_xlabel("")  # there is no room below two rows; the title names the option
        return
    scale, end, labelled = 72 / axes.figure.dpi, float("-inf"), []
    for x in places:
        middle, half = axes.transData.transform((x, 0))[0] * scale, _LETTER * len(labels[x]) / 2
        if middle - half > end:
            labelled.append(x)
            end = middle + half + 2
    axes.set_xticks(labelled, [labels[x] for x in labelled])

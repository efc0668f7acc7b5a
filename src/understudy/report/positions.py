"""Charts by position in the response: exposure bias and distances to the teacher of every variant."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes

from .drawing import ACCENT, FAINT, INK, SOFT, Chart, Panel, label_ends, limits_of, plain, thinned
from .text import label

_BANDS = {1: "± one standard error over prompts", 2: "from one seed to the other", 3: "95 % interval over seeds"}
_GREY_LINES, _GREY_POINTS = 8, 40  # behind a variant's own
_UNSETTLED = 5  # the first fifth of the positions does not set the axis of exposure bias


def by_position(content: Mapping[str, Any]) -> Iterator[Chart]:
    """The charts by position; none without measurements."""
    biased = {name: curve for name, curve in content["exposure_bias"].items() if _points(curve["mean"])}
    if biased:
        ends = [_points(curve[end]) for curve in biased.values() for end in ("low", "mean", "high")]
        limits = limits_of([0.0, *(value for points in ends for _, value in points[len(points) // _UNSETTLED :])])
        cut = max(value for points in ends for _, value in points) > limits[1]
        panels = [_exposure(name, biased, limits) for name in biased]
        shaded = " or ".join(dict.fromkeys(_BANDS[min(curve["seeds"], 3)] for curve in biased.values()))
        about = "excess of accumulated forward KL on student prefixes over teacher prefixes, percent; shaded: "
        about += shaded
        about += "; the first positions, where the KL on teacher prefixes is nearly 0, run off the chart" if cut else ""
        yield Chart("exposure-bias", "Exposure bias by position", about, panels)
    distances = {name: curves for name, curves in content["distance"].items() if any(curves.values())}
    if distances:
        limits = limits_of([value for curves in distances.values() for values in curves.values() for value in values])
        panels = [_distances(name, curves, limits) for name, curves in distances.items()]
        yield Chart("distance", "Distance to the teacher by position", "nats, on student samples", panels)


def _exposure(variant: str, all_curves: Mapping[str, Mapping[str, Any]], limits: tuple[float, float]) -> Panel:
    """One variant's curve with its band, in front of the other variants' curves, on shared axes."""
    curve = all_curves[variant]
    points, low, high = (_points(curve[name]) for name in ("mean", "low", "high"))

    def draw(axes: Axes) -> None:
        for other in list(all_curves)[: _GREY_LINES + 1]:
            if other != variant:
                grey = thinned(_points(all_curves[other]["mean"]), _GREY_POINTS)
                axes.plot(*zip(*grey, strict=True), color=FAINT, linewidth=0.7)
        positions = [position for position, _ in low]
        axes.fill_between(positions, [v for _, v in low], [v for _, v in high], color=ACCENT, alpha=0.18, linewidth=0)
        axes.plot(*zip(*points, strict=True), color=ACCENT)
        axes.axhline(0, color=SOFT, linewidth=0.6)
        axes.set_ylim(limits)
        plain(axes)
        axes.set_xlabel("position", fontsize=7, labelpad=2)
        label_ends(axes, [(points[-1][1], f"{points[-1][1]:.0f} %", ACCENT)])

    (position, last), lowest, highest = points[-1], low[-1][1], high[-1][1]
    peak, most = max(points, key=lambda point: point[1])
    about = f"Exposure bias of {variant}: {last:.1f} % over {position} positions"
    about += f", at most {most:.0f} % at position {peak}" if peak < position else ""
    if curve["seeds"] > 1:
        about += f", mean of {curve['seeds']} seeds, {_BANDS[min(curve['seeds'], 3)]}: {lowest:.1f} to {highest:.1f} %"
    return Panel(variant, about + ("; others in grey." if len(all_curves) > 1 else "."), draw, right=0.86)


def _points(values: Sequence[float | None]) -> list[tuple[int, float]]:
    """(position, value), positions counted from 1, without values that are None."""
    return [(position, value) for position, value in enumerate(values, start=1) if value is not None]


def _distances(name: str, curves: Mapping[str, Sequence[float]], limits: tuple[float, float]) -> Panel:
    lines = {kind: points for kind, values in curves.items() if (points := _points(values))}

    def draw(axes: Axes) -> None:
        for (_, points), colour in zip(lines.items(), (ACCENT, INK), strict=False):
            axes.plot(*zip(*points, strict=True), color=colour)
        axes.set_ylim(limits)
        plain(axes)
        axes.set_xlabel("position", fontsize=7, labelpad=2)
        colours = dict(zip(lines, (ACCENT, INK), strict=False))
        label_ends(axes, [(points[-1][1], label(kind), colours[kind]) for kind, points in lines.items()])

    about = [
        f"{label(kind)} {points[0][1]:.3g} at first, {points[-1][1]:.3g} at last" for kind, points in lines.items()
    ]
    return Panel(name, "; ".join(about) + ".", draw)

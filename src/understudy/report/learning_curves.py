"""The first charts of a comparison: held-out quality, and exposure bias, over the response tokens trained on."""

from collections.abc import Mapping, Sequence
from statistics import fmean, stdev
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import EngFormatter

from ..metrics import names
from .drawing import ACCENT, FAINT, INK, SOFT, Chart, Panel, label_ends, plain
from .text import heading, is_share, number

_EXPOSURE_BIAS = "exposure_bias"
_COLOURS = (ACCENT, INK, SOFT)  # of the best variants; further ones are faint
_MOST = 8  # variants that are drawn, the best ones
_RIGHT = 0.66
_FAR = 2  # a teacher this many times above the best curve is named, and not drawn

Line = Sequence[tuple[float, float]]


def learning_curves(content: Mapping[str, Any]) -> list[Chart]:
    """Held-out accuracy, or another metric that several variants logged, and exposure bias, over training tokens.

    Quality has a line for each seed, and a label with the mean of their last values. Exposure bias, which is noisier,
    has one line for each variant, the mean over seeds, and a label with its mean over training after the start.
    """
    metric, lines = _metric_and_lines(content)
    return [*([_quality(content, metric, lines)] if lines else []), *_exposure_bias(content)]


def _quality(content: Mapping[str, Any], metric: str, lines: Mapping[str, Sequence[Line]]) -> Chart:
    ends = {variant: sum(line[-1][1] for line in of) / len(of) for variant, of in lines.items()}
    ranked = sorted(lines, key=lambda variant: -ends[variant])[:_MOST]
    teacher = _teacher(content, metric)
    about = "; ".join(f"{variant} {number(ends[variant], metric)} at the end" for variant in ranked)
    about += "" if teacher is None else f"; teacher {number(teacher, metric)}"
    shows_teacher = teacher is not None and teacher < _FAR * max(ends.values())
    subtitle = "on held-out data" + _the_best(ranked, lines)
    subtitle += "" if teacher is None or shows_teacher else f"; the teacher is at {number(teacher, metric)}"
    limit = teacher if shows_teacher else None
    panel = _panel(metric, about, {variant: lines[variant] for variant in ranked}, ends, limit)
    return Chart("learning-curves", panel.title, subtitle, [panel])


def _exposure_bias(content: Mapping[str, Any]) -> list[Chart]:
    """The mean over seeds of each variant; the variant with the least exposure bias during training is the first."""
    lines = _lines(content, _EXPOSURE_BIAS)
    if len(lines) < 2:
        return []
    curves = {variant: _mean(of) for variant, of in lines.items()}
    means = {variant: fmean(value for _, value in line[1:]) for variant, line in curves.items()}
    ranked = sorted(means, key=lambda variant: means[variant])[:_MOST]
    about = "; ".join(f"{variant} {_spread(lines[variant])}" for variant in ranked)
    about = f"Mean over training, after the start, and standard deviation over seeds: {about}"
    ordered = {variant: [curves[variant]] for variant in ranked}
    panel = _panel(_EXPOSURE_BIAS, about, ordered, means, None)
    subtitle = "in percent, mean over seeds; labels are means over training, less is better"
    return [Chart("exposure-bias-in-training", panel.title, subtitle + _the_best(ranked, lines), [panel])]


def _the_best(ranked: Sequence[str], lines: Mapping[str, Any]) -> str:
    return f", the best {_MOST} of {len(lines)} recipes" if len(lines) > len(ranked) else ""


def _mean(lines: Sequence[Line]) -> Line:
    """The mean of lines, point by point, as far as all of them go."""
    return [(fmean(x for x, _ in points), fmean(y for _, y in points)) for points in zip(*lines, strict=False)]


def _spread(lines: Sequence[Line]) -> str:
    """The mean over training of each line, after its start: the mean of these and their standard deviation."""
    means = [fmean(value for _, value in line[1:]) for line in lines]
    deviation = f" ± {number(stdev(means), _EXPOSURE_BIAS)}" if len(means) > 1 else ""
    return number(fmean(means), _EXPOSURE_BIAS) + deviation


def _panel(
    metric: str, about: str, lines: Mapping[str, Sequence[Line]], labels: Mapping[str, float], teacher: float | None
) -> Panel:
    """The lines of variants, the best first, each with its label and the number of it at the end of the line."""

    def draw(axes: Axes) -> None:
        ends = []
        for (variant, of), colour in zip(lines.items(), [*_COLOURS, *[FAINT] * len(lines)], strict=False):
            for line in of:
                axes.plot(*zip(*line, strict=True), color=colour, linewidth=1.4 if colour == ACCENT else 1)
            text = f"{variant} {number(labels[variant], metric)}"
            ends.append((fmean(line[-1][1] for line in of), text, SOFT if colour == FAINT else colour))
        if teacher is not None:
            axes.axhline(teacher, color=SOFT, linewidth=0.8, linestyle=(0, (3, 2)))
            ends.append((teacher, f"teacher {number(teacher, metric)}", SOFT))
        axes.set_ylim(bottom=min(0.0, axes.get_ylim()[0]))
        plain(axes, steps=False, shares=is_share(metric))
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.set_xlabel("response tokens trained on", fontsize=7, labelpad=2)
        label_ends(axes, ends)

    return Panel(f"{heading(metric)} over training tokens", f"{about}.", draw, right=_RIGHT)


def _metric_and_lines(content: Mapping[str, Any]) -> tuple[str, dict[str, list[Line]]]:
    """The first metric of the comparison, else of all, that several variants logged; and their lines by variant."""
    compared = [metric for _, metric in (content["comparison"] or {"quality": ()})["quality"]]
    for metric in dict.fromkeys([*compared, "accuracy", *names()]):
        if metric != _EXPOSURE_BIAS and len(lines := _lines(content, metric)) > 1:
            return metric, lines
    return "", {}


def _lines(content: Mapping[str, Any], metric: str) -> dict[str, list[Line]]:
    """What each variant's runs measured of the metric on held-out data: (response tokens, value), once per place."""
    lines: dict[str, list[Line]] = {}
    for run in content["runs"]:
        series = run["series"].get(f"eval_{metric}", {"tokens": (), "value": ()})
        points = zip(series["tokens"], series["value"], strict=True)
        line = list({tokens: (tokens, value) for tokens, value in points if value is not None}.values())
        if len(line) > 1:
            lines.setdefault(run["name"], []).append(line)
    return lines


def _teacher(content: Mapping[str, Any], metric: str) -> float | None:
    """The teacher's greedy value on the data of the comparison."""
    references = (content["comparison"] or {"references": {}})["references"]
    return references.get("teacher", {}).get("metrics", {}).get("greedy", {}).get(metric)

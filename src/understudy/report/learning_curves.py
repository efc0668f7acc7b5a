"""The first chart of a comparison: held-out quality over the response tokens that each run was trained on."""

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import EngFormatter

from ..metrics import names
from .drawing import ACCENT, FAINT, INK, SOFT, Chart, Panel, label_ends, plain
from .text import heading, is_share, number

_COLOURS = (ACCENT, INK, SOFT)  # of the best variants; further ones are faint
_MOST = 8  # variants that are drawn, the best ones
_RIGHT = 0.66
_FAR = 2  # a teacher this many times above the best curve is named, and not drawn

Line = Sequence[tuple[float, float]]


def learning_curves(content: Mapping[str, Any]) -> list[Chart]:
    """Held-out accuracy, or another metric that several variants logged, over training tokens; none for one variant.

    There is a line for each seed; a label has the mean of their last values.
    """
    metric, lines = _metric_and_lines(content)
    if not lines:
        return []
    ends = {variant: sum(line[-1][1] for line in of) / len(of) for variant, of in lines.items()}
    ranked = sorted(lines, key=lambda variant: -ends[variant])[:_MOST]
    teacher = _teacher(content, metric)
    about = "; ".join(f"{variant} {number(ends[variant], metric)} at the end" for variant in ranked)
    about += "" if teacher is None else f"; teacher {number(teacher, metric)}"
    shows_teacher = teacher is not None and teacher < _FAR * max(ends.values())
    subtitle = "on held-out data" + (f", the best {_MOST} of {len(lines)} recipes" if len(lines) > _MOST else "")
    subtitle += "" if teacher is None or shows_teacher else f"; the teacher is at {number(teacher, metric)}"

    def draw(axes: Axes) -> None:
        labels = []
        for variant, colour in zip(ranked, [*_COLOURS, *[FAINT] * len(ranked)], strict=False):
            for line in lines[variant]:
                axes.plot(*zip(*line, strict=True), color=colour, linewidth=1.4 if colour == ACCENT else 1)
            text = f"{variant} {number(ends[variant], metric)}"
            labels.append((ends[variant], text, SOFT if colour == FAINT else colour))
        if teacher is not None and shows_teacher:
            axes.axhline(teacher, color=SOFT, linewidth=0.8, linestyle=(0, (3, 2)))
            labels.append((teacher, f"teacher {number(teacher, metric)}", SOFT))
        axes.set_ylim(bottom=min(0.0, axes.get_ylim()[0]))
        plain(axes, steps=False, shares=is_share(metric))
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.set_xlabel("response tokens trained on", fontsize=7, labelpad=2)
        label_ends(axes, labels)

    title = f"{heading(metric)} over training tokens"
    panel = Panel(title, f"{about}.", draw, right=_RIGHT)
    return [Chart("learning-curves", title, subtitle, [panel])]


def _metric_and_lines(content: Mapping[str, Any]) -> tuple[str, dict[str, list[Line]]]:
    """The first metric of the comparison, else of all, that several variants logged; and their lines by variant."""
    compared = [metric for _, metric in (content["comparison"] or {"quality": ()})["quality"]]
    for metric in dict.fromkeys([*compared, "accuracy", *names()]):
        lines: dict[str, list[Line]] = {}
        for run in content["runs"]:
            series = run["series"].get(f"eval_{metric}", {"tokens": (), "value": ()})
            points = zip(series["tokens"], series["value"], strict=True)
            line = [(tokens, value) for tokens, value in points if value is not None]
            if len(line) > 1:
                lines.setdefault(run["name"], []).append(line)
        if len(lines) > 1:
            return metric, lines
    return "", {}


def _teacher(content: Mapping[str, Any], metric: str) -> float | None:
    """The teacher's greedy value on the data of the comparison."""
    references = (content["comparison"] or {"references": {}})["references"]
    return references.get("teacher", {}).get("metrics", {}).get("greedy", {}).get(metric)

"""Draw charts with matplotlib: an SVG for each panel, in the page's colours, and one PNG of all panels.

A figure is drawn with the colours of the light page, which the SVG replaces by the page's CSS variables, so that charts
follow the page's light or dark mode. Text stays text.
"""

import io
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from ..files import write_atomic

# CSS variable → its colour on the light page; all colours are different.
PALETTE = {
    "ink": "#1c1b1a",
    "soft": "#6c6a66",
    "faint": "#bdbab3",
    "rule": "#e6e3dc",
    "accent": "#b4441a",
    "paper": "#fffefb",
}
INK, SOFT, FAINT, RULE, ACCENT, PAPER = PALETTE.values()

WIDTH, HEIGHT = 3.4, 2.0  # inches of a panel
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 7.5,
    "text.parse_math": False,  # a dollar sign in a folder's name is a dollar sign
    "text.color": INK,
    "axes.labelcolor": SOFT,
    "axes.edgecolor": FAINT,
    "axes.facecolor": "none",
    "axes.linewidth": 0.6,
    "xtick.color": SOFT,
    "ytick.color": SOFT,
    "xtick.major.size": 2.5,
    "xtick.major.width": 0.6,
    "ytick.major.size": 0,
    "lines.linewidth": 1.2,
    "lines.solid_capstyle": "round",
    "path.simplify_threshold": 0.4,
    "figure.facecolor": PAPER,
}


@dataclass(frozen=True)
class Panel:
    """One small chart. `draw` fills its axes; `about` describes it as text."""

    title: str
    about: str
    draw: Callable[[Axes], None]
    height: float = HEIGHT
    right: float = 0.74  # where the axes end, as a share of the width; line labels are to the right
    left: float = 0.13


@dataclass(frozen=True)
class Chart:
    """Panels that belong together, and have the same axes."""

    name: str  # of the PNG
    title: str
    about: str
    panels: Sequence[Panel]
    open: bool = True  # False: folded


MOST = 24  # panels of a chart, and quantities that are drawn
MOST_ROWS = 60  # bars of a chart


def limited(chart: Chart) -> Chart:
    """The chart with its first panels, and a note where there are more."""
    if len(chart.panels) <= MOST:
        return chart
    note = f"{chart.about}; the first {MOST} of {len(chart.panels)}, all numbers are in report.json"
    return replace(chart, about=note, panels=chart.panels[:MOST])


def with_file_names(sections: Mapping[str, Sequence[Chart]]) -> dict[str, list[Chart]]:
    """The charts, each with a name of its own that a file can have; metrics may be called anything."""
    taken: set[str] = set()
    named: dict[str, list[Chart]] = {}
    for section, charts in sections.items():
        for chart in charts:
            name = plain_name = re.sub(r"[^A-Za-z0-9_.-]", "_", chart.name)[:80]
            number = 2
            while name in taken:
                name, number = f"{plain_name}-{number}", number + 1
            taken.add(name)
            named.setdefault(section, []).append(replace(chart, name=name))
    return {section: named.get(section, []) for section in sections}


def thinned(points: Sequence[tuple[float, float]], most: int) -> list[tuple[float, float]]:
    """At most about `most` of a line's points, with the first and the last."""
    every = max(1, len(points) // most)
    return [*points[::every], *(points[-1:] if (len(points) - 1) % every else [])]


def svg(panel: Panel, name: str) -> str:
    """The panel as an inline SVG with a title and a description; `name` keeps its ids apart from other panels'."""
    with mpl.rc_context({**_STYLE, "svg.hashsalt": name}):
        figure = Figure(figsize=(WIDTH, panel.height))
        _fill(figure, [panel], 1)
        file = io.StringIO()
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = file.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"\s*<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'<g id="[^"]*"', "<g", text)  # ids that every figure has, but must be unique in a page
    text = re.sub(r'(id="|url\(#|href="#)', rf"\g<1>{name}-", text)
    for variable, colour in PALETTE.items():
        text = re.sub(colour, f"var(--{variable})", text, flags=re.IGNORECASE)
    head = f'<svg role="img" aria-labelledby="{name}-t {name}-d" '
    labels = f'<title id="{name}-t">{_escaped(panel.title)}</title><desc id="{name}-d">{_escaped(panel.about)}</desc>'
    opening = text.index(">") + 1
    tag = re.sub(r' (width|height|xmlns(:xlink)?|version)="[^"]*"', "", text[:opening]).replace("<svg ", head)
    return tag + labels + text[opening:].strip()


def png(chart: Chart, path: Path) -> None:
    """All panels of a chart in one picture."""
    with mpl.rc_context(_STYLE):
        columns = min(3, len(chart.panels))
        rows = -(-len(chart.panels) // columns)
        tall = max(panel.height for panel in chart.panels) + 0.25
        figure = Figure(figsize=(columns * WIDTH, rows * tall + 0.3))
        figure.suptitle(chart.title, x=0.02, ha="left", fontsize=9)
        _fill(figure, chart.panels, columns, titled=True)
        picture = io.BytesIO()
        figure.savefig(picture, format="png", dpi=160)
    write_atomic(path, picture.getvalue())


def _fill(figure: Figure, panels: Sequence[Panel], columns: int, titled: bool = False) -> None:
    """Draw the panels side by side, `columns` in a row."""
    rows = -(-len(panels) // columns)
    head = 0.3 / figure.get_figheight() if titled else 0.0
    for index, panel in enumerate(panels):
        row, column = divmod(index, columns)
        tall = (1 - head) / rows
        bottom = (1 - head) - (row + 1) * tall
        foot, top = 0.42 / (figure.get_figheight() * tall), (0.22 if titled else 0.08) / (figure.get_figheight() * tall)
        left = (column + panel.left) / columns
        box = (left, bottom + foot * tall, (panel.right - panel.left) / columns, tall * (1 - foot - top))
        axes = figure.add_axes(box)
        for side in ("top", "right", "left"):
            axes.spines[side].set_visible(False)
        axes.grid(axis="y", color=RULE, linewidth=0.6)
        axes.set_axisbelow(True)
        panel.draw(axes)
        if titled and panel.title != figure.get_suptitle():
            axes.set_title(panel.title, loc="left", fontsize=7.5, color=INK, pad=5)


def plain(axes: Axes, steps: bool = True, shares: bool = False) -> None:
    """Few ticks; for steps, at integers."""
    axes.xaxis.set_major_locator(MaxNLocator(4, integer=steps))
    if len(axes.get_yticks()):
        axes.yaxis.set_major_locator(MaxNLocator(4))
        in_percent(axes.yaxis, shares)
    if steps:
        axes.set_xlabel("step", fontsize=7, labelpad=2)
    axes.grid(axis="x", color=RULE, linewidth=0 if steps else 0.6)


def in_percent(axis: Any, shares: bool) -> None:
    if shares:
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g} %"))


def limits_of(values: Sequence[float | None]) -> tuple[float, float]:
    """Limits of an axis: from the least to the greatest value, with a margin; never equal."""
    numbers = [value for value in values if value is not None] or [0.0]
    low, high = min(*numbers, 0.0) if min(numbers) < 0.4 * max(numbers) else min(numbers), max(numbers)
    room = 0.06 * (high - low) or abs(high) or 1.0
    return low - room, high + room


def label_ends(axes: Axes, ends: Sequence[tuple[float, str, str]]) -> None:
    """Label lines where they end, (height in data, label, colour) each, and keep the labels apart."""
    low, high = axes.get_ylim()
    gap = 0.8 * 7.5 / 72 * 1.3 / (axes.get_position().height * _figure(axes).get_figheight())
    height = -1.0
    for value, label, colour in sorted(ends):
        height = max((value - low) / (high - low), height + gap)
        axes.text(1.02, height, label, color=colour, transform=axes.transAxes, va="center", fontsize=7)


def label_points(axes: Axes, points: Mapping[str, tuple[float, float]]) -> None:
    """Label points inside the axes where there is room; labels that fit nowhere are left out.

    Widths of labels are estimates, since the page's font is unknown.
    """
    scale = 72 / _figure(axes).dpi
    frame = axes.get_window_extent()
    places = {name: axes.transData.transform(point) * scale for name, point in points.items()}
    taken = [(x - 2, y - 2, x + 2, y + 2) for x, y in places.values()]
    for name, (x, y) in places.items():
        width, height = 3.5 * len(name), 7.0
        for side, up in _AROUND:
            start = x + 5 if side > 0 else x - 5 - width
            box = (start, y + up - height / 2, start + width, y + up + height / 2)
            if frame.x0 * scale <= box[0] and box[2] <= frame.x1 * scale and not any(_overlap(box, t) for t in taken):
                taken.append(box)
                line = {"arrowstyle": "-", "color": FAINT, "linewidth": 0.5, "shrinkA": 0, "shrinkB": 2}
                line["relpos"] = (0 if side > 0 else 1, 0.5)
                style = {"va": "center", "ha": "left" if side > 0 else "right", "fontsize": 6, "color": SOFT}
                offset = {"xytext": (5 * side, up), "textcoords": "offset points"}
                axes.annotate(name, points[name], **offset, **style, arrowprops=line if up else None)
                break


_AROUND = [(side, up) for up in (0, 7, -7, 14, -14, 21, -21, 28, -28) for side in (1, -1)]


def _overlap(a: tuple[float, float, float, float], b: tuple[float, float, float, float]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _figure(axes: Axes) -> Any:
    return axes.figure


def _escaped(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")

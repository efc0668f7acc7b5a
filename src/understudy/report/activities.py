"""The chart of seconds by activity: a bar for each run."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes

from .drawing import ACCENT, FAINT, INK, MOST_ROWS, SOFT, Chart, Panel, plain
from .text import duration

_ACTIVITIES = {"generate": ACCENT, "score": SOFT, "learn": INK, "other": FAINT}


def by_activity(runs: Sequence[Mapping[str, Any]]) -> Iterator[Chart]:
    """Seconds of training by activity, a bar for each run."""
    all_timed = [run for run in runs if run["seconds_by_activity"]]
    timed = all_timed[:MOST_ROWS]
    if not timed:
        return
    names = [run["name"] for run in timed]
    labels = [f"{r['name']}, seed {r['seed']}" if names.count(r["name"]) > 1 else r["name"] for r in timed]

    def draw(axes: Axes) -> None:
        for row, (run, text) in enumerate(zip(reversed(timed), reversed(labels), strict=True)):
            left = 0.0
            for name, colour in _ACTIVITIES.items():
                seconds = run["seconds_by_activity"][name]
                axes.barh(row, seconds, left=left, height=0.34, color=colour)
                left += seconds
            axes.text(0, row + 0.26, text, fontsize=7, va="bottom", color=INK)
            axes.text(left, row, f" {duration(left)}", fontsize=7, va="center", color=SOFT)
        for index, (name, colour) in enumerate(_ACTIVITIES.items()):
            place = 0.25 * index
            over = {"transform": axes.get_yaxis_transform(), "fontsize": 7, "va": "bottom"}
            axes.text(place, len(timed) - 0.1, "■", color=colour, **over)
            axes.text(place + 0.05, len(timed) - 0.1, name, color=SOFT, **over)
        axes.set_ylim(-0.4, len(timed) + 0.4)
        axes.set_yticks([])
        plain(axes, steps=False)
        axes.set_xlabel("seconds", fontsize=7, labelpad=2)

    about = [f"{text}: {_shares(run['seconds_by_activity'])}" for text, run in zip(labels, timed, strict=True)]
    panel = Panel(
        "Time by activity", "; ".join(about) + ".", draw, height=0.85 + 0.27 * len(timed), left=0.03, right=0.86
    )
    about_all = f"; the first {len(timed)} of {len(all_timed)} runs" if len(timed) < len(all_timed) else ""
    yield Chart("time", "Time by activity", "seconds of the main process" + about_all, [panel])


def _shares(split: Mapping[str, float]) -> str:
    total = sum(split.values())
    return ", ".join(f"{name} {seconds / total:.0%}" for name, seconds in split.items())

"""Charts of training curves, and quality, from the report's content; more in activities.py, positions.py, sweeps.py.

They are small multiples: the panels of a chart have the same axes, and lines are labelled at their ends. A single run
has a panel for each quantity; with several runs, there is a panel for each quantity and variant, with the other
variants in grey.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes

from .activities import by_activity
from .drawing import (
    ACCENT,
    FAINT,
    INK,
    MOST,
    MOST_ROWS,
    PAPER,
    SOFT,
    Chart,
    Panel,
    in_percent,
    label_ends,
    label_points,
    limited,
    limits_of,
    plain,
    thinned,
    with_file_names,
)
from .learning_curves import learning_curves
from .positions import by_position
from .sweeps import swept
from .text import duration, heading, interval, is_share, label, number

# A panel's title and the names, as they are logged, of what it shows; the first is drawn in the accent colour.
_GROUPS = (
    ("Loss", ("loss", "eval_loss")),
    ("Distance to the teacher, nats per token", ("reverse_kl", "forward_kl")),
    ("Entropy, nats per token", ("student_entropy", "teacher_entropy")),
    ("Response length, tokens", ("response_length", "student_length", "teacher_length")),
    ("Share of responses truncated", ("truncated",)),
    ("Implicit rewards", ("student_reward", "teacher_reward", "margin")),
    ("Response tokens per second", ("tokens_per_second",)),
    ("Learning rate", ("learning_rate",)),
    ("Gradient norm", ("grad_norm",)),
)
_ALWAYS_OPEN = ("loss", "reverse_kl")
_ON_PAPER = {"facecolor": PAPER, "edgecolor": "none", "pad": 0.6}  # the background of a text that lines cross
_GREY_POINTS, _POINTS = 40, 400  # of a grey line, of a line
_GREY_LINES = 8  # behind a variant's own


def charts(content: Mapping[str, Any]) -> dict[str, list[Chart]]:
    """The charts of each section of the page; empty where there is nothing to draw."""
    runs = content["runs"]
    several = len(runs) > 1
    sections = {
        "learning": learning_curves(content) if several else [],
        "quality": [
            *(swept(content) or _intervals(content)),
            *(_against_time(content) if several else _learning(runs[0])),
        ],
        "curves": list(_multiples(_ranked(content)) if several else _quantities(runs[0])),
        "positions": list(by_position(content)),
        "time": list(by_activity(runs)),
    }
    return with_file_names({section: list(map(limited, of)) for section, of in sections.items()})


def _ranked(content: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The runs, those of the best variants first where there is a ranking."""
    names = ((content["comparison"] or {}).get("ranking") or {"names": []})["names"]
    places = {name: place for place, name in enumerate(names)}
    return sorted(content["runs"], key=lambda run: places.get(run["name"], len(places)))


def _quantities(run: Mapping[str, Any]) -> Iterator[Chart]:
    """A panel for each quantity that a single run logged."""
    series = run["series"]
    rewards = sorted(name for name in series if name == "reward" or name.startswith("reward_"))
    groups = [*_GROUPS, *([("Reward, mean over responses", tuple(rewards))] if rewards else [])]
    grouped = {name for _, names in groups for name in names}
    groups += [(heading(name), (name,)) for name in series if name not in grouped and name[:5] != "eval_"]
    panels = []
    for title, names in groups:
        logged = [name for name in names if len(_points(series.get(name))) > 0]
        if logged:
            panels.append(_curves(title, [(name, series[name]) for name in logged]))
    if panels:
        yield Chart("curves", "Training curves", "over the steps of training", panels)


def _curves(title: str, lines: Sequence[tuple[str, Mapping[str, Any]]]) -> Panel:
    def draw(axes: Axes) -> None:
        ends = []
        for (name, series), colour in zip(lines, (ACCENT, INK, SOFT, *[FAINT] * len(lines)), strict=False):
            points = thinned(_points(series), _POINTS)
            axes.plot(*zip(*points, strict=True), color=colour, marker="o" if len(points) == 1 else None, ms=2.5)
            ends.append((points[-1][1], label(name), SOFT if colour == FAINT else colour))
        plain(axes, shares=all(is_share(name) for name, _ in lines))
        label_ends(axes, ends if len(ends) > 1 else [(ends[0][0], _short(ends[0][0], lines[0][0]), ACCENT)])

    return Panel(title, "; ".join(_description(name, series) for name, series in lines) + ".", draw)


def _multiples(runs: Sequence[Mapping[str, Any]]) -> Iterator[Chart]:
    """For each quantity a panel for each variant: its runs, with the first runs of the others in grey."""
    variants: dict[str, list[Mapping[str, Any]]] = {}
    for run in runs:
        variants.setdefault(run["name"], []).append(run)
    logged = dict.fromkeys(name for run in runs for name in run["series"] if len(_points(run["series"][name])) > 1)
    first = f"; the first {MOST} of {len(variants)} recipes" if len(variants) > MOST else ""
    variants = dict(list(variants.items())[:MOST])
    title_of = {name: title for title, names in _GROUPS for name in names[:1]}
    order = [name for _, names in _GROUPS for name in names if name in logged]
    for name in [*order, *(n for n in logged if n not in order)][:MOST]:
        series = {v: [r["series"][name] for r in group if name in r["series"]] for v, group in variants.items()}
        series = {variant: lines for variant, lines in series.items() if lines}
        if name == "truncated" and not any(v for lines in series.values() for line in lines for _, v in _points(line)):
            continue
        methods = {variant: group[0]["method"] if name == "loss" else None for variant, group in variants.items()}
        panels = []
        for variant in series:
            same_method = {other: lines for other, lines in series.items() if methods[other] == methods[variant]}
            panels.append(_variant(variant, name, same_method))
        title = title_of.get(name, heading(name))
        title = title if name not in ("reverse_kl", "response_length") else heading(name)
        about = "each method's own objective, beside runs of the same method" if name == "loss" else "over the steps"
        yield Chart(f"curves-{name}", title, about + first, panels, open=name in _ALWAYS_OPEN)


def _variant(variant: str, name: str, series: Mapping[str, Sequence[Mapping[str, Any]]]) -> Panel:
    """One variant's runs in front of the others, on shared axes."""
    limits = limits_of([value for lines in series.values() for line in lines for _, value in _points(line)])

    def draw(axes: Axes) -> None:
        for other in [other for other in series if other != variant][:_GREY_LINES]:
            if points := thinned(_points(series[other][0]), _GREY_POINTS):
                axes.plot(*zip(*points, strict=True), color=FAINT, linewidth=0.7)
        last = None
        for run_series in series[variant]:
            if points := thinned(_points(run_series), _POINTS):
                axes.plot(*zip(*points, strict=True), color=ACCENT, linewidth=1.3)
                last = points[-1][1] if last is None else last
        axes.set_ylim(limits)
        plain(axes, shares=is_share(name))
        if last is not None:
            label_ends(axes, [(last, _short(last, name), ACCENT)])

    about = "; ".join(_description(name, line) for line in series[variant]) + "; other recipes in grey."
    return Panel(variant, about, draw, right=0.86)


def _intervals(content: Mapping[str, Any]) -> Iterator[Chart]:
    """For each metric the means with their intervals, teacher and warm start as lines."""
    comparison = content["comparison"]
    for protocol, metric in comparison["quality"] if comparison else []:
        rows = [(row["name"], row["metrics"][protocol][metric]) for row in comparison["rows"] if row["metrics"]]
        references = {name: r["metrics"].get(protocol, {}).get(metric) for name, r in comparison["references"].items()}
        if rows:
            panel = _bars(f"{heading(metric)} ({protocol})", metric, rows, references)
            about = (
                "means and 95 % intervals over seeds" if any(s["low"] < s["high"] for _, s in rows) else "one seed each"
            )
            yield Chart(f"quality-{protocol}-{metric}".replace("=", ""), panel.title, about, [panel])


def _bars(title: str, metric: str, rows: Sequence[tuple[str, Any]], references: Mapping[str, float | None]) -> Panel:
    """Horizontal bars from 0, names above them, with the interval of Student's t where there are several seeds."""
    rows = sorted(rows, key=lambda row: row[1]["mean"])[-MOST_ROWS:]
    lines = {name: value for name, value in references.items() if value is not None}

    def draw(axes: Axes) -> None:
        for y, (name, spread) in enumerate(rows):
            colour = ACCENT if y == len(rows) - 1 else FAINT
            axes.barh(y, spread["mean"], height=0.3, color=colour)
            if spread["low"] < spread["high"]:
                axes.plot([spread["low"], spread["high"]], [y, y], color=INK, linewidth=1)
            axes.text(0, y + 0.22, name, fontsize=7, va="bottom", color=INK, bbox=_ON_PAPER)
            axes.text(1.02, y, number(spread["mean"], metric), transform=axes.get_yaxis_transform(), va="center")
        for name, value in lines.items():
            axes.axvline(value, color=SOFT, linewidth=0.8, linestyle=(0, (3, 2)), zorder=0.5)
            axes.text(value, len(rows) - 0.1, name, fontsize=7, color=SOFT, ha="center", va="bottom", bbox=_ON_PAPER)
        axes.set_ylim(-0.4, len(rows) + 0.3)
        axes.set_yticks([])
        plain(axes, steps=False)
        in_percent(axes.xaxis, is_share(metric))

    about = [f"{name} {number(s['mean'], metric)}{interval(s, metric)}" for name, s in reversed(rows)]
    about += [f"{name} {number(value, metric)}" for name, value in lines.items()]
    return Panel(title, "; ".join(about) + ".", draw, height=0.7 + 0.27 * len(rows), left=0.03, right=0.84)


def _against_time(content: Mapping[str, Any]) -> Iterator[Chart]:
    """Quality against seconds of training: a point for each run that was evaluated."""
    comparison = content["comparison"]
    for protocol, metric in (comparison["quality"] if comparison else [])[:1]:
        points = [
            (run["name"], run["seconds"], value)
            for run in content["runs"]
            if run["state"] == "finished" and (value := run["evaluation"].get(protocol, {}).get(metric)) is not None
        ]
        if len(points) > 1:
            start = comparison["references"].get("warm start", {}).get("metrics", {}).get(protocol, {}).get(metric)
            ranking = comparison["ranking"]
            best = ranking["names"][0] if ranking else max(points, key=lambda point: point[2])[0]
            panel = _scatter(f"{heading(metric)} against seconds of training", metric, points, start, best)
            yield Chart("quality-time", panel.title, "one point per run", [panel])


def _scatter(
    title: str, metric: str, points: Sequence[tuple[str, float, float]], start: float | None, best: str
) -> Panel:
    def draw(axes: Axes) -> None:
        for name, seconds, value in points:
            axes.plot(seconds, value, "o", ms=4, mew=0.6, color=ACCENT if name == best else SOFT, mec=PAPER)
        if start is not None:
            axes.axhline(start, color=SOFT, linewidth=0.8, linestyle=(0, (3, 2)))
            style = {"transform": axes.get_yaxis_transform(), "fontsize": 6, "color": SOFT, "va": "center"}
            axes.text(1.02, start, "warm start", **style)
        axes.set_xlim(0, 1.05 * max(seconds for _, seconds, _ in points) or 1.0)
        plain(axes, steps=False, shares=is_share(metric))
        label_points(axes, {name: (seconds, value) for name, seconds, value in reversed(points)})
        axes.set_xlabel("seconds of training", fontsize=7, labelpad=2)

    about = "; ".join(f"{name} {number(value, metric)} after {duration(s)}" for name, s, value in points)
    return Panel(title, about + ".", draw, height=2.8, right=0.83)


def _learning(run: Mapping[str, Any]) -> Iterator[Chart]:
    """A single run's held-out numbers against seconds of training."""
    held_out = {
        n: line for n, line in run["series"].items() if n.startswith("eval_") and len(_points(line, "seconds")) > 1
    }
    lengths = ("eval_response_length", "eval_truncated", "eval_greedy_", "eval_tokens")
    parts = tuple(f"{name}_" for name in held_out if name != "eval_loss")  # eval_forward_kl_dataset of eval_forward_kl
    panels = []
    for name, line in held_out.items():
        points = _points(line, "seconds")

        def draw(axes: Axes, points: Any = points, name: str = name) -> None:
            axes.plot(*zip(*points, strict=True), color=ACCENT, marker="o", ms=2.5)
            plain(axes, steps=False, shares=is_share(name))
            axes.set_xlabel("seconds of training", fontsize=7, labelpad=2)
            label_ends(axes, [(points[-1][1], _short(points[-1][1], name), ACCENT)])

        if not name.startswith(lengths + parts):
            panels.append(Panel(f"Held out: {label(name.removeprefix('eval_'))}", _description(name, line) + ".", draw))
    if panels:
        yield Chart("quality-time", "Quality against seconds of training", "on held-out data", panels)


def _points(line: Mapping[str, Any] | None, along: str = "step") -> list[tuple[float, float]]:
    """A line's points, without values that are None."""
    if line is None:
        return []
    return [(x, value) for x, value in zip(line[along], line["value"], strict=True) if value is not None]


def _description(name: str, line: Mapping[str, Any]) -> str:
    """A line described as text."""
    points = _points(line)
    if not points:
        return f"{label(name)}: no numbers"
    (first, start), (last, end) = points[0], points[-1]
    values = [value for _, value in points]
    return (
        f"{label(name)} {number(start, name)} at step {first:g}, {number(end, name)} at step {last:g}, "
        f"lowest {number(min(values), name)}, highest {number(max(values), name)}"
    )


def _short(value: float, name: str) -> str:
    return number(value, name if is_share(name) else "")

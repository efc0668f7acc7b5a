"""The page: one file of HTML that needs nothing else, from the report's content and its charts.

The one idea: everything in it came from somebody's folder. So all text is escaped by the template, what would turn
writing around or cannot be seen is shown as such, and a content policy lets nothing be fetched and no other script run.
"""

import base64
import hashlib
from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any
from unicodedata import category

from jinja2 import Environment
from markupsafe import Markup

from ..compare.statistics import with_deviation
from .drawing import Chart, svg
from .verdict import PERCENT, number, words

LEVELS = (0.5, 1, 2, 4)  # log q − log p in nats from which a token is shaded, and shaded darker
_KEPT = "\n\r\t\u200c\u200d"  # lines, and the joiners that some scripts are written with
_OWN = ("reverse_kl", "forward_kl", "student_entropy", "teacher_entropy")


def page(content: Mapping[str, Any], drawn: Mapping[str, Sequence[Chart]], again: int | None = None) -> str:
    """The page as HTML.

    Args:
        drawn: `charts(content)`.
        again: the page loads itself anew after so many seconds.
    """
    environment = Environment(autoescape=True, trim_blocks=False)
    environment.filters |= {"shown": number, "shade": _shade, "told": _told, "first_disagreement": _first_disagreement}
    content = _visible(content)
    script = _part("page.js")
    return environment.from_string(_part("page.html")).render(
        content=content,
        charts={section: [_inline(chart) for chart in of] for section, of in drawn.items()},
        comparison=_comparison(content),
        measured=list(_measured(content["runs"])),
        own_samples=_own_samples(content["runs"]),
        runs=_runs(content["runs"]),
        facts=_shared_facts(content["runs"]),
        recipes=_recipes(content["runs"]),
        coloured=any(answer.get("tokens") for prompt in content["answers"]["prompts"] for answer in prompt["answers"]),
        levels=LEVELS,
        state=_state(content["runs"]),
        again=again,
        style=Markup(_part("page.css")),
        script=Markup(script),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )


def _part(name: str) -> str:
    return (resources.files("understudy.report") / name).read_text(encoding="utf-8")


def _inline(chart: Chart) -> dict[str, Any]:
    panels = [
        {"title": _clean(panel.title), "svg": Markup(_clean(svg(panel, f"{chart.name}-{index}")))}
        for index, panel in enumerate(chart.panels)
    ]
    return {"title": _clean(chart.title), "about": chart.about, "open": chart.open, "panels": panels}


def _visible(value: Any) -> Any:
    """Texts without what a reader cannot see, or what turns the writing around it."""
    if isinstance(value, Mapping):
        return {_clean(str(key)): _visible(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_visible(part) for part in value]
    return _clean(value) if isinstance(value, str) else value


def _clean(text: str) -> str:
    return "".join(
        c if c.isprintable() or c in _KEPT or category(c) == "Zs" else "\N{REPLACEMENT CHARACTER}" for c in text
    )


Row = dict[str, Any]


def _row(name: str, cells: Sequence[tuple[Any, str]], kind: str = "") -> Row:
    """A row of cells, (value, text) each; a value that is a number is what the column is sorted by."""
    made = [{"value": v if isinstance(v, int | float) else None, "text": text} for v, text in cells]
    return {"name": name, "cells": made, "kind": kind}


def _table(heads: Sequence[str], rows: Sequence[Row], **more: Any) -> dict[str, Any]:
    """A table without the columns in which nothing stands."""
    used = [i for i in range(len(heads) - 1) if any(row["cells"][i]["text"] not in ("", "–") for row in rows)]
    for row in rows:
        row["cells"] = [row["cells"][i] for i in used]
    return {"heads": [heads[0], *(heads[i + 1] for i in used)], "rows": rows, **more}


def _comparison(content: Mapping[str, Any]) -> dict[str, Any] | None:
    """The teacher, the warm start and every contestant: mean ± standard deviation over seeds."""
    judged = content["comparison"]
    if judged is None:
        return None
    measured = [r["metrics"] for r in judged["references"].values()]
    measured += [
        {p: {m: s["mean"] for m, s in of.items()} for p, of in one["metrics"].items()} for one in judged["lines"]
    ]
    columns = [(p, m) for p, m in judged["columns"] if m != "truncated" or any(of.get(p, {}).get(m) for of in measured)]
    protocol, metric = (judged["quality"] or [("", "")])[0]
    heads = ["model", *(f"{words(m)} ({p})" for p, m in columns)]
    heads += [f"less {judged['baseline']} [95 %], p", "of the way to the teacher", "seeds"]
    heads += ["seconds", "CPU seconds", "response tokens"]
    rows = [
        _row(
            name,
            [*((v := r["metrics"].get(p, {}).get(m), number(v, m)) for p, m in columns), *[(None, "")] * 6],
            "reference",
        )
        for name, r in judged["references"].items()
    ]
    for line in sorted(judged["lines"], key=lambda one: -_mean(one, protocol, metric)):
        cells = [_spread(line["metrics"].get(p, {}).get(m), m, line["seeds"]) for p, m in columns]
        share = line["closed"].get(protocol, {}).get(metric)
        cells += [_against(line["against"].get(protocol)), (share, "" if share is None else f"{100 * share:.0f} %")]
        cells += [(line["seeds"], str(line["seeds"]))]
        cells += [_spread(line[cost], "", 1) for cost in ("seconds", "cpu_seconds", "tokens")]
        best = judged["contest"] is not None and line["name"] == judged["contest"]["best"]
        rows.append(_row(line["name"], cells, "best" if best else ""))
    asked = judged["trial"]
    rows_asked = "all rows" if asked.get("limit") is None else f"the first {asked['limit']} rows"
    how = f"on {rows_asked} of {asked.get('dataset') or 'the data'}, split {asked.get('split', '–')}"
    several = any(line["seeds"] > 1 for line in judged["lines"])
    notes = [f"All judged alike, {how}." + (" Means ± standard deviations over seeds." if several else "")]
    notes += [*judged["budget"], *(f"{line['name']}, {why}" for line in judged["lines"] for why in line["failed"])]
    return _table(heads, rows, notes=notes)


def _mean(line: Mapping[str, Any], protocol: str, metric: str) -> float:
    spread = line["metrics"].get(protocol, {}).get(metric)
    return float("-inf") if spread is None else spread["mean"]


def _spread(spread: Mapping[str, float] | None, metric: str, seeds: int) -> tuple[Any, str]:
    if spread is None:
        return None, ""
    mean, deviation = spread["mean"], spread["deviation"]
    text = f"{mean:,.0f}" if not metric else number(mean, metric)
    if seeds > 1:
        text = f"{text} ± {number(deviation, metric)}" if metric in PERCENT else with_deviation(text, deviation)
    return mean, text


def _against(found: Mapping[str, float] | None) -> tuple[Any, str]:
    """A difference in points of 100, its interval and p."""
    if found is None:
        return None, ""
    low, high, p = 100 * found["low"], 100 * found["high"], found["p"]
    return found[
        "mean"
    ], f"{100 * found['mean']:+.1f} [{low:+.1f}, {high:+.1f}], {f'{p:.3f}' if p >= 0.001 else '< 0.001'}"


def _measured(runs: Sequence[Mapping[str, Any]]) -> Any:
    """A table for each evaluation that `understudy evaluate` left in the runs' folders."""
    for kept in dict.fromkeys(name for run in runs for name in run["measured"]):
        having = [run for run in runs if kept in run["measured"]]
        names = list(dict.fromkeys(name for run in having for name in run["measured"][kept]))
        rows = [
            _row(_label(run, runs), [(v := run["measured"][kept].get(n), number(v, n)) for n in names])
            for run in having
        ]
        yield _table(["run", *map(words, names)], rows, title=f"Measured: {kept}")


def _own_samples(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    rows = []
    for run in runs:
        own = run["own_samples"]
        if own["before"]:
            pairs = [(own[when].get(name), name) for name in _OWN for when in ("before", "after")]
            rows.append(_row(_label(run, runs), [(value, number(value, name)) for value, name in pairs]))
    heads = [f"{words(name)}, {when}" for name in _OWN for when in ("before", "after")]
    return _table(["run", *heads], rows) if rows else None


def _runs(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """A row for each run, with what it cost and the facts in which it differs from others."""
    shared = {name for name, _ in _shared_facts(runs)}
    facts = [name for name in dict.fromkeys(n for run in runs for n in run["facts"]) if name not in shared]
    heads = ["run", "seed", "state", "steps", "seconds", "CPU seconds", "response tokens", "tokens per second"]
    heads += ["peak memory, MB", "held-out loss", *facts]
    rows = []
    for run in runs:
        numbers = [
            run["seconds"],
            run["cpu_seconds"],
            run["tokens"],
            run["tokens"] / run["seconds"] if run["seconds"] else None,
        ]
        cells = [
            (run["seed"], str(run["seed"])),
            (None, f"failed: {run['failed']}" if run["failed"] else run["state"]),
            (run["steps"], f"{run['steps']:,}"),
        ]
        cells += [(value, "–" if value is None else f"{value:,.0f}") for value in [*numbers, run["peak_memory_mb"]]]
        loss = run["metrics"].get("eval_loss")
        cells += [(loss, number(loss))]
        cells += [(value, number(value)) for value in map(run["facts"].get, facts)]
        rows.append(_row(_label(run, runs), cells))
    return _table(heads, rows)


def _shared_facts(runs: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """What is the same for all runs."""
    first, *others = [run["facts"] for run in runs if run["facts"]] or [{}]
    return [(name, number(value)) for name, value in first.items() if all(f.get(name) == value for f in others)]


def _recipes(runs: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """A recipe for each name; those of its other seeds differ in seed and folder only."""
    by_name: dict[str, list[Mapping[str, Any]]] = {}
    for run in runs:
        if run["recipe"]:
            by_name.setdefault(run["name"], []).append(run)
    return [
        {"name": name, "text": of[0]["recipe"], "seeds": f" (seed {of[0]['seed']} of {len(of)})" if len(of) > 1 else ""}
        for name, of in by_name.items()
    ]


def _label(run: Mapping[str, Any], runs: Sequence[Mapping[str, Any]]) -> str:
    alike = sum(other["name"] == run["name"] for other in runs)
    return f"{run['name']}, seed {run['seed']}" if alike > 1 else run["name"]


def _state(runs: Sequence[Mapping[str, Any]]) -> str:
    waiting = [run for run in runs if run["state"] == "unfinished"]
    if not waiting:
        return ""
    if len(runs) > 1:
        return f"{len(waiting)} of {len(runs)} runs are in progress or were interrupted."
    logged = waiting[0]["logged"]
    return "In progress or interrupted" + (f", last logged {logged[:19].replace('T', ' ')} UTC." if logged else ".")


def _shade(token: Mapping[str, Any]) -> str:
    """The CSS classes of a token."""
    level = sum((token["student"] or 0) - (token["teacher"] or 0) >= bound for bound in LEVELS)
    return (f" d{level}" if level else "") + ("" if token["agrees"] else " other")


def _told(token: Mapping[str, Any]) -> str:
    apart = number((token["student"] or 0) - (token["teacher"] or 0))
    text = f"log q {number(token['student'])}, log p {number(token['teacher'])}, difference {apart}; "
    text += f"KL(p‖q) {number(token['forward_kl'])}, KL(q‖p) {number(token['reverse_kl'])}"
    return (
        text
        if token["agrees"]
        else f"{text}; the teacher's choice: {token['likeliest']!r}, p {number(token['likeliest_p'])}"
    )


def _first_disagreement(tokens: Sequence[Mapping[str, Any]]) -> str:
    """In words, for whom colours or pointing say nothing."""
    mean = sum((t["student"] or 0) - (t["teacher"] or 0) for t in tokens) / len(tokens)
    text = f"Mean log q − log p {mean:.2f} nats per token; "
    first = next((i for i, token in enumerate(tokens) if not token["agrees"]), None)
    if first is None:
        return text + "the teacher would have chosen every token."
    token = tokens[first]
    return (
        f"{text}first apart at token {first + 1}, {token['text']!r}, where the teacher has {token['likeliest']!r} "
        f"(p {token['likeliest_p']:.2f})."
    )

"""Render the report's content and charts as one self-contained HTML page.

All text comes from files that anybody may have written, so the template escapes it, control characters and marks of
text direction are replaced, and a content security policy forbids requests and other scripts.
"""

import base64
import hashlib
from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any

from jinja2 import Environment
from markupsafe import Markup

from ..compare.table import p_text, with_deviation
from ..terminal import replace_control_codes
from .drawing import Chart, svg
from .text import is_share, label, number

LEVELS = (0.5, 1, 2, 4)  # log q − log p in nats from which a token is shaded, and shaded darker
_DISTANCES = ("reverse_kl", "forward_kl", "student_entropy", "teacher_entropy")


def page(content: Mapping[str, Any], drawn: Mapping[str, Sequence[Chart]], again: int | None = None) -> str:
    """The page as HTML.

    Args:
        drawn: `charts(content)`.
        again: seconds after which the page reloads itself.
    """
    environment = Environment(autoescape=True, trim_blocks=False)
    environment.filters |= {"number": number, "shade": _shade, "numbers": _numbers, "disagreement": _first_disagreement}
    content = visible(content)
    script = _part("page.js")
    return environment.from_string(_part("page.html")).render(
        content=content,
        charts={section: [_inline(chart) for chart in of] for section, of in drawn.items()},
        comparison=_comparison(content),
        measurements=list(_measurements(content["runs"])),
        student_samples=_student_samples(content["runs"]),
        runs=_runs(content["runs"]),
        facts=_shared_facts(content["runs"]),
        recipes=_recipes(content["runs"]),
        coloured=any(r.get("tokens") for prompt in content["responses"]["prompts"] for r in prompt["responses"]),
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


def visible(value: Any) -> Any:
    """Texts without invisible characters and without marks that change the direction of text."""
    if isinstance(value, Mapping):
        return {_clean(str(key)): visible(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [visible(part) for part in value]
    return _clean(value) if isinstance(value, str) else value


def _clean(text: str) -> str:
    return replace_control_codes(text, "\n\r\t")


Row = dict[str, Any]


def _row(name: str, cells: Sequence[tuple[Any, str]], kind: str = "") -> Row:
    """A row of cells, (value, text) each; the column is sorted by values that are numbers."""
    texts = [{"value": v if isinstance(v, int | float) else None, "text": text} for v, text in cells]
    return {"name": name, "cells": texts, "kind": kind}


def _table(heads: Sequence[str], rows: Sequence[Row], **more: Any) -> dict[str, Any]:
    """A table without its empty columns."""
    used = [i for i in range(len(heads) - 1) if any(row["cells"][i]["text"] not in ("", "–") for row in rows)]
    for row in rows:
        row["cells"] = [row["cells"][i] for i in used]
    return {"heads": [heads[0], *(heads[i + 1] for i in used)], "rows": rows, **more}


def _comparison(content: Mapping[str, Any]) -> dict[str, Any] | None:
    """The teacher, the warm start and every variant: mean ± standard deviation over seeds."""
    comparison = content["comparison"]
    if comparison is None:
        return None
    values = [r["metrics"] for r in comparison["references"].values()]
    values += [
        {p: {m: s["mean"] for m, s in of.items()} for p, of in row["metrics"].items()} for row in comparison["rows"]
    ]
    columns = [(p, m) for p, m in comparison["columns"] if m != "truncated" or any(v.get(p, {}).get(m) for v in values)]
    first = tuple((comparison["quality"] or [("", "")])[0])
    heads = ["model", *(f"{label(m)} ({p})" for p, m in columns)]
    heads += ["gain over the warm start [95 %], p", f"difference from {comparison['baseline']} [95 %], p"]
    heads += ["gap to the teacher closed", "seeds", "seconds", "CPU seconds", "response tokens"]
    rows = [
        _row(
            name,
            [*((v := r["metrics"].get(p, {}).get(m), number(v, m)) for p, m in columns), *[(None, "")] * 7],
            "reference",
        )
        for name, r in comparison["references"].items()
    ]
    best = (comparison["ranking"] or {"names": [None]})["names"][0]
    for row in sorted(comparison["rows"], key=lambda row: -_mean(row, *first)):
        rows.append(_row(row["name"], _variant(row, columns, *first), "best" if row["name"] == best else ""))
    return _table(heads, rows, notes=_notes(comparison))


def _variant(row: Mapping[str, Any], columns: Sequence[tuple[str, str]], protocol: str, metric: str) -> list[Any]:
    """A variant's cells: metrics, gain, difference and gap in the first metric, seeds, costs."""
    cells = [_spread(row["metrics"].get(p, {}).get(m), m, row["seeds"]) for p, m in columns]
    share = row["gap_closed"].get(protocol, {}).get(metric)
    cells += [_difference(row[name].get(protocol, {}).get(metric), metric) for name in ("gain", "difference")]
    cells += [(share, "" if share is None else f"{100 * share:.0f} %")]
    cells += [(row["seeds"], str(row["seeds"]))]
    return cells + [_spread(row[cost], "", 1) for cost in ("seconds", "cpu_seconds", "tokens")]


def _notes(comparison: Mapping[str, Any]) -> list[str]:
    """Notes below the table: evaluation settings, budgets, and errors of failed runs."""
    settings = next(iter(comparison["settings"].values()), {})
    data = settings.get("data") or {}
    rows = "all rows" if data.get("limit") is None else f"the first {data['limit']} rows"
    several = any(row["seeds"] > 1 for row in comparison["rows"])
    note = f"All evaluated with the same settings, on {rows} of {data.get('dataset') or 'the data'}, "
    note += f"split {data.get('split', '–')}." + (" Means ± standard deviations over seeds." if several else "")
    failed = [f"{row['name']}, {reason}" for row in comparison["rows"] for reason in row["failed"]]
    return [note, *comparison["notes"], *failed]


def _mean(row: Mapping[str, Any], protocol: str, metric: str) -> float:
    spread = row["metrics"].get(protocol, {}).get(metric)
    return float("-inf") if spread is None else spread["mean"]


def _spread(spread: Mapping[str, float] | None, metric: str, seeds: int) -> tuple[Any, str]:
    if spread is None:
        return None, ""
    mean, deviation = spread["mean"], spread["deviation"]
    text = f"{mean:,.0f}" if not metric else number(mean, metric)
    if seeds > 1:
        text = f"{text} ± {number(deviation, metric)}" if is_share(metric) else with_deviation(text, deviation)
    return mean, text


def _difference(difference: Mapping[str, float] | None, metric: str) -> tuple[Any, str]:
    """A difference in points of 100, its interval and p."""
    if difference is None:
        return None, ""
    scale = 100 if is_share(metric) else 1
    mean, low, high = (scale * difference[name] for name in ("mean", "low", "high"))
    text = f"{mean:+.1f} [{low:+.1f}, {high:+.1f}]"
    if difference["p"] is not None:
        return difference["mean"], f"{text}, {p_text(difference['p'])}"
    return difference["mean"], text + (" over prompts" if difference["seeds"] < 2 else "")


def _measurements(runs: Sequence[Mapping[str, Any]]) -> Any:
    """A table for each evaluation that `understudy evaluate` wrote into the runs' folders."""
    for title in dict.fromkeys(name for run in runs for name in run["measurements"]):
        evaluated = [run for run in runs if title in run["measurements"]]
        names = list(dict.fromkeys(name for run in evaluated for name in run["measurements"][title]))
        rows = [
            _row(_name(run, runs), [(v := run["measurements"][title].get(n), number(v, n)) for n in names])
            for run in evaluated
        ]
        yield _table(["run", *map(label, names)], rows, title=f"Evaluation: {title}")


def _student_samples(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    rows = []
    for run in runs:
        distance = run["student_samples"]
        if distance["before"]:
            pairs = [(distance[when].get(name), name) for name in _DISTANCES for when in ("before", "after")]
            rows.append(_row(_name(run, runs), [(value, number(value, name)) for value, name in pairs]))
    heads = [f"{label(name)}, {when}" for name in _DISTANCES for when in ("before", "after")]
    return _table(["run", *heads], rows) if rows else None


def _runs(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """A row for each run: its costs, and the facts in which it differs from others."""
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
        rows.append(_row(_name(run, runs), cells))
    return _table(heads, rows)


def _shared_facts(runs: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """The facts that are the same for all runs."""
    first, *other_facts = [run["facts"] for run in runs if run["facts"]] or [{}]
    return [(name, number(value)) for name, value in first.items() if all(f.get(name) == value for f in other_facts)]


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


def _name(run: Mapping[str, Any], runs: Sequence[Mapping[str, Any]]) -> str:
    seeds = sum(other["name"] == run["name"] for other in runs)
    return f"{run['name']}, seed {run['seed']}" if seeds > 1 else run["name"]


def _state(runs: Sequence[Mapping[str, Any]]) -> str:
    unfinished = [run for run in runs if run["state"] == "unfinished"]
    if not unfinished:
        return ""
    if len(runs) > 1:
        return f"{len(unfinished)} of {len(runs)} runs are in progress or were interrupted."
    logged = unfinished[0]["logged"]
    return "In progress or interrupted" + (f", last logged {logged[:19].replace('T', ' ')} UTC." if logged else ".")


def _shade(token: Mapping[str, Any]) -> str:
    """The CSS classes of a token."""
    level = sum((token["student"] or 0) - (token["teacher"] or 0) >= bound for bound in LEVELS)
    return (f" d{level}" if level else "") + ("" if token["agrees"] else " other")


def _numbers(token: Mapping[str, Any]) -> str:
    difference = number((token["student"] or 0) - (token["teacher"] or 0))
    text = f"log q {number(token['student'])}, log p {number(token['teacher'])}, difference {difference}; "
    text += f"KL(p‖q) {number(token['forward_kl'])}, KL(q‖p) {number(token['reverse_kl'])}"
    return (
        text
        if token["agrees"]
        else f"{text}; the teacher's choice: {token['likeliest']!r}, p {number(token['likeliest_p'])}"
    )


def _first_disagreement(tokens: Sequence[Mapping[str, Any]]) -> str:
    """The disagreement as text, for readers who do not see colours or tooltips."""
    mean = sum((t["student"] or 0) - (t["teacher"] or 0) for t in tokens) / len(tokens)
    text = f"Mean log q − log p {mean:.2f} nats per token; "
    first = next((i for i, token in enumerate(tokens) if not token["agrees"]), None)
    if first is None:
        return text + "every token is the teacher's most likely one."
    token = tokens[first]
    return (
        f"{text}first disagreement at token {first + 1}, {token['text']!r}, where the teacher has "
        f"{token['likeliest']!r} (p {token['likeliest_p']:.2f})."
    )

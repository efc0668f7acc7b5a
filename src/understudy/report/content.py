"""Collect everything that a report shows in one dictionary: the content of report.json.

Charts and page are drawn only from this dictionary, so that every number that is shown is in the file, and none is
computed twice.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ..compare import statistics
from ..compare.evaluations import EXPOSURE, reference_folder, result_of
from ..compare.statistics import Result
from ..evaluation.response_metrics import with_buckets
from ..run.folder import RunFolder
from .curves import distance, exposure_bias, sweep
from .folders import RunRecord, dig, read_comparison
from .text import summary

_ACTIVITIES = ("generate", "score", "learn", "other")
_TOTALS = ("train_", "total_flos", "seconds_", "epoch", "step", "tokens")  # logged, but not drawn as curves
_CURVES = {"exposure_bias": "percent", "distance": "alive"}  # each with what it has at every position
_EXPOSURE_BIAS = (EXPOSURE, "exposure_bias")


def content(records: Sequence[RunRecord], places: Sequence[Path]) -> dict[str, Any]:
    """The content of the report about runs in `places`, except the responses (`responses.side_by_side`)."""
    runs = [_run(record) for record in records]
    names = dict.fromkeys(run["name"] for run in runs)
    content: dict[str, Any] = {
        "title": runs[0]["name"] if len(names) == 1 else f"{len(names)} recipes compared",
        "written": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "understudy": version("understudy"),
        "unfinished": any(run["state"] == "unfinished" for run in runs),
        "runs": runs,
        "comparison": _comparison(records, places),
        "exposure_bias": exposure_bias(runs),
        "distance": distance(runs),
    }
    return finite({**content, "summary": summary(content)})


def _run(run: RunRecord) -> dict[str, Any]:
    """One run: its recipe, its progress, its logs and its results."""
    ended = run.summary or {}
    series = _series(run.lines)
    last = max((line.get("step", 0) for line in run.lines), default=0)
    split = {name: _sum(run.lines, f"seconds_{name}") for name in _ACTIVITIES}
    return {
        "name": run.name,
        "seed": run.seed,
        "folder": str(run.folder.path),
        "method": next(iter(dig(run.recipe, "method") or []), None),
        "state": "failed" if run.failed else "finished" if run.summary else "unfinished",
        "failed": run.failed,
        "logged": datetime.fromtimestamp(run.changed, timezone.utc).isoformat(timespec="seconds")
        if run.lines
        else None,
        "steps": _first(ended.get("steps"), last),
        "max_steps": ended.get("steps") or dig(run.recipe, "training", "max_steps"),
        "seconds": _first(ended.get("seconds"), sum(split.values())),
        "cpu_seconds": ended.get("cpu_seconds"),
        "tokens": _first(ended.get("tokens"), _sum(run.lines, "tokens")),
        "seconds_by_activity": split if any(split.values()) else {},
        "peak_memory_mb": _peak(ended, run.lines),
        "facts": _facts(ended, run),
        "student_samples": {"before": run.before, "after": dig(ended, "student_samples", "after") or {}},
        "metrics": ended.get("metrics", {}),
        "evaluation": {name: part["metrics"] for name, part in (dig(run.evaluation, "results") or {}).items()},
        "measurements": {name: dig(part, "metrics") or {} for name, part in run.measurements.items()},
        "series": series,
        "positions": _positions(run),
        "recipe": run.recipe_text,
    }


def _first(value: Any, default: Any) -> Any:
    return default if value is None or not math.isfinite(value) else value


def _sum(lines: Sequence[Mapping[str, Any]], *names: str) -> float:
    """The sum of logged numbers, as far as they are finite."""
    values = [line[name] for line in lines for name in names if name in line]
    return sum(value for value in values if math.isfinite(value))


def _facts(summary: Mapping[str, Any], run: RunRecord) -> dict[str, Any]:
    """Facts for repeating the run and assessing its cost: models, data, hardware, versions."""
    names = {
        "student_parameters": "student parameters",
        "trained_parameters": "trained parameters",
        "teacher_parameters": "teacher parameters",
        "examples": "training examples",
        "fingerprint": "data fingerprint",
        "cut_prompts": "prompts cut",
        "cut_responses": "responses cut",
        "skipped": "rows skipped",
        "processes": "processes",
        "device": "device",
        "machine": "machine",
    }
    start = dig(run.recipe, "student", "model")
    facts = {
        "teacher": next((dig(fields, "model") for fields in (dig(run.recipe, "teacher") or {}).values()), None),
        "student starts from": start or next(iter(dig(run.recipe, "student") or []), None),
        "data": " ".join(str(dig(run.recipe, "data", key) or "") for key in ("dataset", "split")).strip(),
    }
    facts |= {label: summary.get(name) for name, label in names.items()}
    versions = summary.get("versions", {})
    facts |= {name: versions[name] for name in versions}
    return {name: value for name, value in facts.items() if value is not None and value != ""}


def _peak(summary: Mapping[str, Any], lines: Sequence[Mapping[str, Any]]) -> float | None:
    peaks = [line["peak_memory_mb"] for line in [summary, *lines] if line.get("peak_memory_mb") is not None]
    return max(peaks, default=None)


def _series(lines: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, list[float]]]:
    """The logged numbers: name → steps, seconds of training and response tokens until then, values."""
    series: dict[str, dict[str, list[float]]] = {}
    elapsed = tokens = 0.0
    for line in lines:
        elapsed += _sum([line], *(f"seconds_{name}" for name in _ACTIVITIES))
        tokens += _sum([line], "tokens")
        for name, value in line.items():
            is_curve = name == "tokens_per_second" or not name.startswith(_TOTALS)
            if is_curve and isinstance(value, int | float) and "step" in line:
                points = series.setdefault(name, {"step": [], "seconds": [], "tokens": [], "value": []})
                points["step"].append(line["step"])
                points["seconds"].append(elapsed)
                points["tokens"].append(tokens)
                points["value"].append(value)
    return series


def _positions(run: RunRecord) -> dict[str, dict[str, Any]]:
    """Curves by position in the response, by kind, of the first evaluation that has them."""
    parts = [*run.measurements.values(), *(dig(run.evaluation, "results") or {}).values()]
    curves = {kind: [dig(part, "curves", kind) or {} for part in parts] for kind in _CURVES}
    complete = {kind: [curve for curve in of if curve.get(_CURVES[kind])] for kind, of in curves.items()}
    return {kind: of[0] for kind, of in complete.items() if of}


def _comparison(runs: Sequence[RunRecord], places: Sequence[Path]) -> dict[str, Any] | None:
    """The table over runs evaluated with the same settings, as `understudy compare` computes it; None without any."""
    evaluations = [run.evaluation for run in runs if run.evaluation]
    if not evaluations:
        return None
    settings = evaluations[0].get("settings") or {}
    results: dict[str, dict[int, Result | str]] = {}
    for run in runs:
        if run.failed or run.evaluation:
            results.setdefault(run.name, {})[run.seed] = run.failed or _result(run, settings)
    finished = [r for by_seed in results.values() for r in by_seed.values() if isinstance(r, Result)]
    if not finished:
        return None
    common = {p: set.intersection(*(set(r.metrics.get(p, {})) for r in finished)) for p in finished[0].metrics}
    results = {
        name: {seed: _only(r, common) if isinstance(r, Result) else r for seed, r in by_seed.items()}
        for name, by_seed in results.items()
    }
    references = {name: _only(r, common) for name, r in _references(runs, places, settings).items()}
    record = next((record for place in places if (record := read_comparison(place))), {})
    baseline = record["baseline"] if record.get("baseline") in results else None
    table = statistics.table_rows(results, baseline, references.get("teacher"), references.get("warm start"))
    protocols = [protocol for protocol in common if protocol != EXPOSURE]
    named = [with_buckets(each.get("metrics", ()), each.get("length_buckets", ())) for each in settings.values()]
    metrics = dict.fromkeys(metric for names in named for metric in names)
    quality = [(p, m) for p in protocols for m in ("accuracy", *metrics) if m in common[p]]
    columns = [*quality, *((p, m) for p in protocols for m in ("response_length", "truncated") if m in common[p])]
    columns += [_EXPOSURE_BIAS] if _EXPOSURE_BIAS[1] in common.get(EXPOSURE, ()) else []
    return {
        "settings": settings,
        "baseline": baseline,
        "quality": quality,
        "columns": columns,
        "references": {name: asdict(r) for name, r in references.items()},
        "rows": [asdict(row) for row in table],
        "ranking": _ranking(results, quality, table),
        "sweep": sweep(record, list(results)),
        "notes": [*statistics.difference_notes(table), *statistics.budget_notes(table)],
    }


def _result(run: RunRecord, settings: Mapping[str, Any]) -> Result | str:
    assert run.evaluation is not None
    if _comparable(run.evaluation.get("settings") or {}) != _comparable(settings):
        return "evaluated with other settings"
    return result_of(run.evaluation["results"], run.summary)


def _comparable(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings without the options for reading a row, which each recipe has of its own."""
    rows = ("dataset", "split", "limit", "seed")
    return {
        name: {**each, "data": {key: value for key, value in (dig(each, "data") or {}).items() if key in rows}}
        for name, each in settings.items()
    }


def _only(result: Result, common: Mapping[str, set[str]]) -> Result:
    """The result with the metrics that all students have; responses resumed from a file have no speed, for instance."""
    metrics = result.metrics
    return replace(result, metrics={p: {n: v for n, v in metrics.get(p, {}).items() if n in common[p]} for p in common})


def _references(runs: Sequence[RunRecord], places: Sequence[Path], settings: Mapping[str, Any]) -> dict[str, Result]:
    """The results of teacher and warm start, where all runs share them and they were evaluated with these settings."""
    evaluations = {name: folder.read_evaluation() or {} for name, folder in reference_folders(runs, places).items()}
    return {
        name: result_of(evaluation["results"], None)
        for name, evaluation in evaluations.items()
        if _comparable(evaluation.get("settings") or {}) == _comparable(settings)
    }


def reference_folders(runs: Sequence[RunRecord], places: Sequence[Path]) -> dict[str, RunFolder]:
    """The folders with a comparison's evaluations of teacher and warm start: in one of the places, or above a run."""
    homes = dict.fromkeys([*places, *(parent for run in runs for parent in run.folder.path.resolve().parents[:3])])
    folders = {}
    for name, model in reference_models(runs).items():
        existing = [folder for home in homes if (folder := reference_folder(home, model)).evaluation.is_file()]
        folders |= {name: existing[0]} if existing else {}
    return folders


def reference_models(runs: Sequence[RunRecord]) -> dict[str, str]:
    """The names or folders of the teacher and of the warm start, where all runs share one."""
    recipes = [run.recipe for run in runs if run.recipe]
    named = [dig(fields, "model") for recipe in recipes for fields in (dig(recipe, "teacher") or {}).values()]
    teachers = {name for name in named if isinstance(name, str)}
    starts = {dig(recipe, "student", "model") for recipe in recipes}
    models = {"teacher": teachers, "warm start": starts}
    return {name: str(next(iter(paths))) for name, paths in models.items() if len(paths) == 1 and None not in paths}


def _ranking(
    results: Mapping[str, Mapping[int, Result | str]],
    quality: Sequence[tuple[str, str]],
    table: Sequence[statistics.TableRow],
) -> dict[str, Any] | None:
    """The variants' names by the first metric, and the difference of the best one and the second."""
    if not quality:
        return None
    protocol, metric = quality[0]
    ranked = [row for row in table if metric in row.metrics.get(protocol, {})]
    ranked.sort(key=lambda row: row.metrics[protocol][metric].mean, reverse=True)
    if len(ranked) < 2:
        return None
    names = [row.name for row in ranked]
    best, second = ({s: r for s, r in results[name].items() if isinstance(r, Result)} for name in names[:2])
    seeds = sorted(set(best) & set(second))
    difference = statistics.difference_of([(best[s], second[s]) for s in seeds], protocol, metric) if seeds else None
    return {"names": names, "difference": None if difference is None else asdict(difference)}


def finite(value: Any) -> Any:
    """The value with None in place of NaN and infinities, which JSON does not have; texts without lone surrogates."""
    if isinstance(value, Mapping):
        return {finite(str(key)): finite(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [finite(part) for part in value]
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode("utf-8")
    return None if isinstance(value, float) and not math.isfinite(value) else value

"""Everything that a report shows, as one dictionary: the content of report.json.

The one idea: charts and page are drawn from this dictionary and from nothing else, so that no number is shown that is
not in the file, and none is computed twice.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ..compare import statistics as comparison
from ..compare.experiment import reference_folder
from ..compare.statistics import Result
from .curves import distance, exposure_bias, sweep
from .folders import RunFolder, dig, read_json
from .verdict import verdict

_ACTIVITIES = ("generate", "score", "learn", "other")
_TOTALS = ("train_", "total_flos", "seconds_", "epoch", "step", "tokens")  # what has no curve of its own
_CURVES = ("exposure_bias", "distance")
_EXPOSURE = ("exposure", "exposure_bias")  # what a comparison measures beside its samplings, and the number in it


def content(runs: Sequence[RunFolder], places: Sequence[Path]) -> dict[str, Any]:
    """What `runs`, found in `places`, have come to.

    The answers are missing still: they may need models (`answers.side_by_side`).
    """
    made = [_run(run) for run in runs]
    judged = _comparison(runs, places)
    names = dict.fromkeys(run["name"] for run in made)
    found: dict[str, Any] = {
        "title": made[0]["name"] if len(names) == 1 else f"{len(names)} recipes compared",
        "made": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "understudy": version("understudy"),
        "unfinished": any(run["state"] == "unfinished" for run in made),
        "runs": made,
        "comparison": judged,
        "exposure_bias": exposure_bias(made),
        "distance": distance(made),
    }
    return finite({**found, "verdict": verdict(found)})


def _run(run: RunFolder) -> dict[str, Any]:
    """One run: what it was, how far it is, what it logged and what it came to."""
    summary = run.summary or {}
    series = _series(run.lines)
    last = max((line.get("step", 0) for line in run.lines), default=0)
    split = {name: sum(line.get(f"seconds_{name}", 0.0) for line in run.lines) for name in _ACTIVITIES}
    return {
        "name": run.name,
        "seed": run.seed,
        "folder": str(run.path),
        "method": next(iter(dig(run.recipe, "method") or []), None) if run.recipe else None,
        "state": "failed" if run.failed else "finished" if run.summary else "unfinished",
        "failed": run.failed,
        "logged": datetime.fromtimestamp(run.changed, timezone.utc).isoformat(timespec="seconds")
        if run.lines
        else None,
        "steps": summary.get("steps", last),
        "max_steps": summary.get("steps") or dig(run.recipe, "training", "max_steps"),
        "seconds": summary.get("seconds", sum(split.values())),
        "cpu_seconds": summary.get("cpu_seconds"),
        "tokens": summary.get("tokens", sum(line.get("tokens", 0) for line in run.lines)),
        "seconds_by_activity": split if any(split.values()) else {},
        "peak_memory_mb": _peak(summary, run.lines),
        "facts": _facts(summary, run),
        "own_samples": {"before": run.before, "after": dig(summary, "own_samples", "after") or {}},
        "metrics": summary.get("metrics", {}),
        "evaluation": {name: part["metrics"] for name, part in (dig(run.evaluation, "found") or {}).items()},
        "measured": {name: dig(part, "metrics") or {} for name, part in run.measured.items()},
        "series": series,
        "positions": _positions(run),
        "recipe": run.recipe_text,
    }


def _facts(summary: Mapping[str, Any], run: RunFolder) -> dict[str, Any]:
    """What a stranger needs to know to repeat the run and to judge its cost."""
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
    found = [line["peak_memory_mb"] for line in [summary, *lines] if line.get("peak_memory_mb") is not None]
    return max(found, default=None)


def _series(lines: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, list[float]]]:
    """What was logged: name → its steps, the seconds of training until then, and its values."""
    series: dict[str, dict[str, list[float]]] = {}
    elapsed = 0.0
    for line in lines:
        elapsed += sum(line.get(f"seconds_{name}", 0.0) for name in _ACTIVITIES)
        for name, value in line.items():
            shown = name == "tokens_per_second" or not name.startswith(_TOTALS)
            if shown and isinstance(value, int | float) and "step" in line:
                one = series.setdefault(name, {"step": [], "seconds": [], "value": []})
                one["step"].append(line["step"])
                one["seconds"].append(elapsed)
                one["value"].append(value)
    return series


def _positions(run: RunFolder) -> dict[str, dict[str, Any]]:
    """Curves by position in an answer, by kind, of the first evaluation that `understudy evaluate` left with them."""
    parts = [*run.measured.values(), *(dig(run.evaluation, "found") or {}).values()]
    found = {kind: next((c for part in parts if (c := dig(part, "curves", kind))), None) for kind in _CURVES}
    return {kind: curve for kind, curve in found.items() if curve}


def _comparison(runs: Sequence[RunFolder], places: Sequence[Path]) -> dict[str, Any] | None:
    """The table over the runs that were judged alike, as `understudy compare` computes it; None if none was judged."""
    judged = [run.evaluation for run in runs if run.evaluation]
    if not judged:
        return None
    trial = judged[0].get("trial") or {}
    results: dict[str, dict[int, Result | str]] = {}
    for run in runs:
        if run.failed or run.evaluation:
            results.setdefault(run.name, {})[run.seed] = run.failed or _result(run, trial)
    everything = [r for of in results.values() for r in of.values() if isinstance(r, Result)]
    if not everything:
        return None
    common = {p: set.intersection(*(set(r.metrics.get(p, {})) for r in everything)) for p in everything[0].metrics}
    results = {
        n: {s: _only(r, common) if isinstance(r, Result) else r for s, r in of.items()} for n, of in results.items()
    }
    references = {name: _only(r, common) for name, r in _references(runs, places, trial).items()}
    written = next((found for place in places if (found := _written(place))), {})
    baseline = written["baseline"] if written.get("baseline") in results else None
    table = comparison.lines(results, baseline, references.get("teacher"), references.get("warm start"))
    samplings = [protocol for protocol in common if protocol != _EXPOSURE[0]]
    quality = [(p, m) for p in samplings for m in ("accuracy", *trial.get("metrics", ())) if m in common[p]]
    further = [(p, m) for p in samplings for m in ("response_length", "truncated") if m in common[p]]
    further += [_EXPOSURE] if _EXPOSURE[1] in common.get(_EXPOSURE[0], ()) else []
    return {
        "trial": trial,
        "baseline": baseline,
        "quality": quality,
        "columns": [*quality, *further],
        "references": {name: asdict(r) for name, r in references.items()},
        "lines": [asdict(line) for line in table],
        "contest": _contest(results, quality, table),
        "sweep": sweep(written, list(results)),
        "budget": comparison.budget_notes(table),
    }


def _written(place: Path) -> dict[str, Any]:
    """A comparison's own record, if there is one yet."""
    return read_json(place / "comparison.json") if (place / "comparison.json").is_file() else {}


def _result(run: RunFolder, trial: Mapping[str, Any]) -> Result | str:
    assert run.evaluation is not None
    if run.evaluation.get("trial") != trial:
        return "judged in another trial"
    summary = run.summary or {}
    return _parts(run.evaluation["found"], {n: summary.get(n) for n in ("seconds", "cpu_seconds", "tokens", "budget")})


def _parts(found: Mapping[str, Any], cost: Mapping[str, Any]) -> Result:
    scores = {name: part["scores"] for name, part in found.items() if part.get("scores") is not None}
    return Result({name: dict(part["metrics"]) for name, part in found.items()}, scores, **cost)


def _only(result: Result, common: Mapping[str, set[str]]) -> Result:
    """With the metrics that all students have: answers that were taken up again lack a speed, for instance."""
    known = result.metrics
    return replace(result, metrics={p: {n: v for n, v in known.get(p, {}).items() if n in common[p]} for p in common})


def _references(runs: Sequence[RunFolder], places: Sequence[Path], trial: Mapping[str, Any]) -> dict[str, Result]:
    """The teacher and the warm start, where all runs share them and a comparison has judged them alike."""
    judged = {name: read_json(folder / "evaluation.json") for name, folder in reference_folders(runs, places).items()}
    return {name: _parts(part["found"], {}) for name, part in judged.items() if part.get("trial") == trial}


def reference_folders(runs: Sequence[RunFolder], places: Sequence[Path]) -> dict[str, Path]:
    """Where a comparison keeps what teacher and warm start answered: in one of the places, or above a run in one."""
    homes = dict.fromkeys([*places, *(parent for run in runs for parent in run.path.resolve().parents[:3])])
    found = {}
    for name, model in reference_models(runs).items():
        folders = [
            folder for home in homes if ((folder := reference_folder(home, model)) / "evaluation.json").is_file()
        ]
        found |= {name: folders[0]} if folders else {}
    return found


def reference_models(runs: Sequence[RunFolder]) -> dict[str, str]:
    """The names or folders of the teacher and of the warm start, if all runs share one."""
    recipes = [run.recipe for run in runs if run.recipe]
    teachers = {dig(fields, "model") for recipe in recipes for fields in (dig(recipe, "teacher") or {}).values()}
    found = {"teacher": teachers - {None}, "warm start": {dig(recipe, "student", "model") for recipe in recipes}}
    return {name: str(next(iter(m))) for name, m in found.items() if len(m) == 1 and None not in m}


def _contest(
    results: Mapping[str, Mapping[int, Result | str]],
    quality: Sequence[tuple[str, str]],
    table: Sequence[comparison.Line],
) -> dict[str, Any] | None:
    """The best contestant and the next one by the first metric, and what a paired bootstrap says of the two."""
    if not quality:
        return None
    protocol, metric = quality[0]
    ranked = [line for line in table if metric in line.metrics.get(protocol, {})]
    ranked.sort(key=lambda line: line.metrics[protocol][metric].mean, reverse=True)
    if len(ranked) < 2:
        return None
    names = [line.name for line in ranked]
    best, following = ranked[0], ranked[1]
    ours, theirs = ({s: r for s, r in results[line.name].items() if isinstance(r, Result)} for line in ranked[:2])
    seeds = sorted(set(ours) & set(theirs))
    pairs = [(ours[s].scores.get(protocol), theirs[s].scores.get(protocol)) for s in seeds]
    paired = metric == "accuracy" and bool(pairs) and all(a and b and len(a) == len(b) for a, b in pairs)
    found = comparison.difference([a or () for a, _ in pairs], [b or () for _, b in pairs]) if paired else None
    return {"best": best.name, "next": following.name, "ranking": names, "difference": asdict(found) if found else None}


def finite(value: Any) -> Any:
    """The same with None for numbers that JSON has no word for."""
    if isinstance(value, Mapping):
        return {str(key): finite(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value

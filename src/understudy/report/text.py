"""Numbers, durations and names as text, and a summary of the runs in one sentence."""

from collections.abc import Mapping
from typing import Any

from ..compare.statistics import SHARES
from ..compare.table import p_text


def summary(content: Mapping[str, Any]) -> str:
    """A sentence about one run or several, with the significance of differences."""
    runs = content["runs"]
    comparison = content["comparison"]
    if len(runs) == 1:
        return _of_one(runs[0], comparison)
    if comparison and comparison["ranking"]:
        return _of_ranking(comparison) + _unfinished(runs)
    distances = [r for r in runs if r["student_samples"]["after"].get("reverse_kl") is not None]
    if distances:
        best = min(distances, key=lambda r: r["student_samples"]["after"]["reverse_kl"])
        value = best["student_samples"]["after"]["reverse_kl"]
        return (
            f"Of {len(runs)} runs, {best['name']} is nearest to the teacher on student samples, with a reverse KL of "
            f"{value:.4g} nats per token; no responses were evaluated" + _unfinished(runs)
        )
    text = f"{len(runs)} runs, of which no responses were evaluated and no distance to a teacher is known"
    return text + _unfinished(runs)


def number(value: Any, metric: str = "") -> str:
    """A metric's value as text: shares in percent, other numbers with four digits, counts in full."""
    if value is None:
        return "–"
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if is_share(metric):
        return f"{100 * value:.1f} %"
    if isinstance(value, int) or (value.is_integer() and abs(value) >= 1000):
        return f"{int(value):,}"
    if abs(value) >= 10_000:
        return f"{value:,.0f}"
    return f"{value:#.4g}" if metric else f"{value:.4g}"  # metrics are aligned in columns


def is_share(metric: str) -> bool:
    """Is the metric written in percent? It may have the prefix `eval_`."""
    return metric.removeprefix("eval_") in SHARES


def interval(spread: Mapping[str, float], metric: str) -> str:
    """The ends of a spread's interval in brackets, where there are several seeds."""
    if spread["low"] == spread["high"]:
        return ""
    return f" ({number(spread['low'], metric)} to {number(spread['high'], metric)})"


def duration(seconds: float | None) -> str:
    """Seconds as text, in seconds, minutes or hours."""
    if seconds is None:
        return "–"
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes, hours = seconds / 60, seconds / 3600
    return f"{minutes:.0f} min" if minutes < 100 else f"{hours:.1f} h"


def label(metric: str) -> str:
    """A metric's name as text."""
    return metric.replace("_", " ").replace(" kl", " KL")


def heading(metric: str) -> str:
    """A metric's name at the beginning of a line."""
    text = label(metric)
    return text[:1].upper() + text[1:]


def _of_one(run: Mapping[str, Any], comparison: Mapping[str, Any] | None) -> str:
    if run["state"] == "failed":
        return f"The run failed: {run['failed'].rstrip('.')}."
    of = f" of {run['max_steps']}" if run["state"] == "unfinished" and run["max_steps"] else ""
    method = run["method"] or "The run"
    text = f"{method} trained for {run['steps']:,}{of} steps, {run['tokens']:,.0f} response tokens and "
    text += f"{duration(run['seconds'])}" + (" so far" if run["state"] == "unfinished" else "")
    result = _quality(run, comparison) or _distance(run) or _loss(run)
    return text + (f": {result}." if result else ", and nothing was logged yet.")


def _quality(run: Mapping[str, Any], comparison: Mapping[str, Any] | None) -> str:
    if not comparison or not comparison["quality"]:
        return ""
    protocol, metric = comparison["quality"][0]
    value = run["evaluation"].get(protocol, {}).get(metric)
    return f"its {label(metric)} ({protocol}) is {number(value, metric)}{_references(comparison)}"


def _references(comparison: Mapping[str, Any]) -> str:
    """The teacher's and the warm start's values in brackets, where they are known."""
    protocol, metric = comparison["quality"][0]
    values = {name: r["metrics"].get(protocol, {}).get(metric) for name, r in comparison["references"].items()}
    text = ", ".join(f"{name} {number(value, metric)}" for name, value in values.items() if value is not None)
    return f" ({text})" if text else ""


def _distance(run: Mapping[str, Any]) -> str:
    before, after = (run["student_samples"][when].get("reverse_kl") for when in ("before", "after"))
    if before is None or after is None:
        return ""
    change = "fell" if after < before else "rose"
    return f"the reverse KL to the teacher on student samples {change} from {before:.4g} to {after:.4g} nats per token"


def _loss(run: Mapping[str, Any]) -> str:
    values = run["series"].get("loss", {}).get("value", [])
    return f"the logged loss went from {values[0]:.4g} to {values[-1]:.4g}" if len(values) > 1 else ""


def _of_ranking(comparison: Mapping[str, Any]) -> str:
    protocol, metric = comparison["quality"][0]
    ranking, by_name = comparison["ranking"], {row["name"]: row for row in comparison["rows"]}
    best, second = (by_name[name] for name in ranking["names"][:2])
    spread, following = (row["metrics"][protocol][metric] for row in (best, second))
    text = f"{best['name']} is first of {len(by_name)} in {label(metric)} ({protocol}) "
    text += f"with {number(spread['mean'], metric)}"
    if best["seeds"] > 1:
        text += f", 95 % interval {number(spread['low'], metric)} to {number(spread['high'], metric)}"
        text += f" over {best['seeds']} seeds"
    text += f"{_references(comparison)}, before {second['name']} with {number(following['mean'], metric)}"
    difference = ranking["difference"]
    if difference and difference["p"] is not None:
        significant = "not a significant difference" if difference["p"] >= 0.05 else "a significant difference"
        sign = "" if difference["p"] < 0.001 else "= "
        text += f", {significant} (over seeds and prompts, p {sign}{p_text(difference['p'])})"
    if (difference["seeds"] if difference else min(best["seeds"], second["seeds"])) < 2:
        text += "; with one seed, what another seed would change is unknown"
    return text


def _unfinished(runs: list[Mapping[str, Any]]) -> str:
    """The end of the sentence, with the number of runs that are left out."""
    states = [run["state"] for run in runs]
    unfinished, failed = states.count("unfinished"), states.count("failed")
    parts = [f"{unfinished} not finished yet"] * bool(unfinished) + [f"{failed} failed"] * bool(failed)
    return (f" ({' and '.join(parts)} of {len(runs)} runs)" if parts else "") + "."

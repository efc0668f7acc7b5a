"""The verdict: one sentence on what came of it, and no more than the numbers carry."""

from collections.abc import Mapping
from typing import Any

PERCENT = ("accuracy", "truncated", "agreement", "top_10_overlap")  # metrics that are shares


def verdict(content: Mapping[str, Any]) -> str:
    """One sentence about one run or about several."""
    runs = content["runs"]
    judged = content["comparison"]
    if len(runs) == 1:
        return _of_one(runs[0], judged)
    if judged and judged["contest"]:
        return _of_a_contest(judged) + _unfinished(runs)
    distances = [r for r in runs if r["own_samples"]["after"].get("reverse_kl") is not None]
    if distances:
        best = min(distances, key=lambda r: r["own_samples"]["after"]["reverse_kl"])
        value = best["own_samples"]["after"]["reverse_kl"]
        return (
            f"Of {len(runs)} runs, {best['name']} came nearest to the teacher on its own samples, with a reverse KL of "
            f"{value:.4g} nats per token; no answers were judged" + _unfinished(runs)
        )
    return f"{len(runs)} runs, of which no answers were judged and no distance to a teacher is known" + _unfinished(
        runs
    )


def number(value: Any, metric: str = "") -> str:
    """A metric's value for people: shares in percent, other numbers with four digits, counts in full."""
    if value is None:
        return "–"
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if metric.removeprefix("eval_") in PERCENT:
        return f"{100 * value:.1f} %"
    if float(value).is_integer() and (isinstance(value, int) or abs(value) >= 1000):
        return f"{int(value):,}"
    if abs(value) >= 10_000:
        return f"{value:,.0f}"
    return f"{value:#.4g}" if metric else f"{value:.4g}"  # metrics stand below each other


def interval(spread: Mapping[str, float], metric: str) -> str:
    """A spread's ends in brackets, where there are several seeds."""
    if spread["low"] == spread["high"]:
        return ""
    return f" ({number(spread['low'], metric)} to {number(spread['high'], metric)})"


def duration(seconds: float | None) -> str:
    """Seconds for people."""
    if seconds is None:
        return "–"
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes, hours = seconds / 60, seconds / 3600
    return f"{minutes:.0f} min" if minutes < 100 else f"{hours:.1f} h"


def words(metric: str) -> str:
    """A metric's name for people."""
    return metric.replace("_", " ").replace(" kl", " KL")


def heading(metric: str) -> str:
    """The same at the beginning of a line."""
    text = words(metric)
    return text[:1].upper() + text[1:]


def _of_one(run: Mapping[str, Any], judged: Mapping[str, Any] | None) -> str:
    if run["state"] == "failed":
        return f"The run failed: {run['failed'].rstrip('.')}."
    of = f" of {run['max_steps']}" if run["state"] == "unfinished" and run["max_steps"] else ""
    method = run["method"] or "The run"
    text = f"{method} trained for {run['steps']:,}{of} steps, {run['tokens']:,.0f} response tokens and "
    text += f"{duration(run['seconds'])}" + (" so far" if run["state"] == "unfinished" else "")
    found = _quality(run, judged) or _distance(run) or _loss(run)
    return text + (f": {found}." if found else ", and nothing was logged yet.")


def _quality(run: Mapping[str, Any], judged: Mapping[str, Any] | None) -> str:
    if not judged or not judged["quality"]:
        return ""
    protocol, metric = judged["quality"][0]
    value = run["evaluation"].get(protocol, {}).get(metric)
    return f"its {words(metric)} ({protocol}) is {number(value, metric)}{_beside(judged)}"


def _beside(judged: Mapping[str, Any]) -> str:
    """What teacher and warm start reach, where that is known."""
    protocol, metric = judged["quality"][0]
    known = {name: r["metrics"].get(protocol, {}).get(metric) for name, r in judged["references"].items()}
    found = ", ".join(f"{name} {number(value, metric)}" for name, value in known.items() if value is not None)
    return f" ({found})" if found else ""


def _distance(run: Mapping[str, Any]) -> str:
    before, after = (run["own_samples"][when].get("reverse_kl") for when in ("before", "after"))
    if before is None or after is None:
        return ""
    went = "fell" if after < before else "rose"
    return f"the reverse KL to the teacher on its own samples {went} from {before:.4g} to {after:.4g} nats per token"


def _loss(run: Mapping[str, Any]) -> str:
    values = run["series"].get("loss", {}).get("value", [])
    return f"the logged loss went from {values[0]:.4g} to {values[-1]:.4g}" if len(values) > 1 else ""


def _of_a_contest(judged: Mapping[str, Any]) -> str:
    protocol, metric = judged["quality"][0]
    contest, by_name = judged["contest"], {line["name"]: line for line in judged["lines"]}
    best, other = by_name[contest["best"]], by_name[contest["next"]]
    spread, following = (line["metrics"][protocol][metric] for line in (best, other))
    text = f"{best['name']} is first of {len(by_name)} in {words(metric)} ({protocol}) "
    text += f"with {number(spread['mean'], metric)}"
    if best["seeds"] > 1:
        text += f", 95 % interval {number(spread['low'], metric)} to {number(spread['high'], metric)}"
        text += f" over {best['seeds']} seeds"
    text += f"{_beside(judged)}, before {other['name']} with {number(following['mean'], metric)}"
    found = contest["difference"]
    if found:
        alike = "a difference that chance explains as well" if found["p"] >= 0.05 else "more than chance explains"
        text += f", {alike} (paired bootstrap, p {_p(found['p'])})"
    if min(best["seeds"], other["seeds"]) < 2:
        text += "; with one seed each, another seed may turn the order round"
    return text


def _unfinished(runs: list[Mapping[str, Any]]) -> str:
    """The sentence's end, with how many runs are left out."""
    states = [run["state"] for run in runs]
    waiting, failed = states.count("unfinished"), states.count("failed")
    parts = [f"{waiting} not finished yet"] * bool(waiting) + [f"{failed} failed"] * bool(failed)
    return (f" ({' and '.join(parts)} of {len(runs)} runs)" if parts else "") + "."


def _p(value: float) -> str:
    return f"= {value:.3f}" if value >= 0.001 else "< 0.001"

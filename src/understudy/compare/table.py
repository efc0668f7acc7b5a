"""The table of a comparison in Markdown.

Names come from recipes, metrics and errors that anybody may have written, so they are escaped: control codes, the bar
that ends a cell, and what Markdown or HTML would take for markup.
"""

import re
from collections.abc import Mapping, Sequence

from ..terminal import escape
from .differences import Difference
from .statistics import SHARES, Result, Spread, TableRow, budget_notes, difference_notes

_MARKUP = re.compile(r"[\\`*|<>&\[\]~$]")


def markdown(
    table: Sequence[TableRow],
    columns: Sequence[tuple[str, str]],
    references: Mapping[str, Result],
    failed: Sequence[str] = (),
) -> str:
    """The table in Markdown.

    Args:
        columns: (protocol, metric) pairs.
        references: models above the variants, such as the teacher.
        failed: which of these could not be evaluated, and why.
    """
    heads = ["model", *(plain(f"{metric} ({protocol})") for protocol, metric in columns)]
    heads += ["over warm start", "difference", "gap closed", "seconds", "CPU seconds", "response tokens"]
    rows = [
        [plain(name), *(_number(r.metrics.get(p, {}).get(m), m) for p, m in columns), *[""] * 6]
        for name, r in references.items()
    ]
    rows += [_cells(row, columns) for row in table]
    used = [i for i in range(len(heads)) if i == 0 or any(row[i] for row in rows)]
    text = ["| " + " | ".join(row[i] for i in used) + " |" for row in [heads, *rows]]
    text.insert(1, "|---" * len(used) + "|")
    reasons = [*failed, *(f"{row.name}, {reason}" for row in table for reason in row.failed)]
    notes = [f"- {plain(note)}" for note in (*reasons, *difference_notes(table), *budget_notes(table))]
    return "\n".join([*text, *([""] if notes else []), *notes]) + "\n"


def plain(text: str) -> str:
    """Foreign text in one line of Markdown, without any effect as markup."""
    return _MARKUP.sub(r"\\\g<0>", " ".join(escape(text).split()))


def _cells(row: TableRow, columns: Sequence[tuple[str, str]]) -> list[str]:
    """A variant's cells: metrics; in the first the gain, the difference from the baseline, the gap closed; costs."""
    cells = [plain(row.name) + (f" ({len(row.failed)} failed)" if row.failed else "")]
    for protocol, metric in columns:
        spread = row.metrics.get(protocol, {}).get(metric)
        cells.append("" if spread is None else _plus_minus(spread, metric, row.seeds))
    protocol, metric = columns[0]
    for difference in (row.gain.get(protocol, {}).get(metric), row.difference.get(protocol, {}).get(metric)):
        cells.append("" if difference is None else _difference(difference, metric))
    gap = row.gap_closed.get(protocol, {}).get(metric)
    cells.append("" if gap is None else f"{gap:.0%}")
    return cells + ["" if s is None else f"{s.mean:,.0f}" for s in (row.seconds, row.cpu_seconds, row.tokens)]


def _plus_minus(spread: Spread, metric: str, seeds: int) -> str:
    text = _number(spread.mean, metric)
    scale = 100 if metric in SHARES else 1
    return text if seeds < 2 else with_deviation(text, scale * spread.deviation)


def _number(value: float | None, metric: str) -> str:
    if value is None:
        return ""
    return f"{100 * value:.1f}" if metric in SHARES else f"{value:#.4g}".rstrip(".")


def with_deviation(mean: str, deviation: float) -> str:
    """A mean as it is written, and its deviation to the same digit."""
    return f"{mean} ± {deviation:.{len(mean.partition('.')[2])}f}"


def in_points(difference: Difference, metric: str) -> tuple[float, float, float]:
    """The mean, low and high of a difference in points of 100."""
    scale = 100 if metric in SHARES else 1
    return scale * difference.mean, scale * difference.low, scale * difference.high


def _difference(difference: Difference, metric: str) -> str:
    """In points of 100, with the p value, or the interval where there is none."""
    mean, low, high = in_points(difference, metric)
    if difference.p is not None:
        return f"{mean:+.1f} (p {p_text(difference.p)})"
    return f"{mean:+.1f} ({low:+.1f} to {high:+.1f}" + (" over prompts)" if difference.seeds < 2 else ")")


def p_text(value: float) -> str:
    """A p value with three digits."""
    return f"{value:.3f}" if value >= 0.001 else "< 0.001"

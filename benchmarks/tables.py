"""Write the tables of docs from benchmarks/results: `python -m benchmarks.tables`, the end of `make bench`.

A table stands between `<!-- table: NAME -->` and `<!-- end -->` in a page; what is between them is replaced. Nothing is
measured here, and no figure is typed by hand.
"""

import argparse
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .measure import RESULTS

ROOT = Path(__file__).parents[1]
PAGES = ("README.md", "docs/performance.md", "docs/measurements/performance.md")
PARTS = ("loss", "rollouts", "step", "quality_per_second")

OURS, EAGER, BF16, FLOOR, BF16_FLOOR = (
    "understudy, compiled",
    "understudy",
    "understudy, bf16 products",
    "floor: matrix products",
    "floor: bf16 products",
)
LIGER, TRL = "Liger, compiled", "TRL chunked"
DIVERGENCES = ("forward KL", "reverse KL", "JSD(0.5)")
ROWS, VOCABULARY = 4096, 50_257  # of the table of losses
LARGE_STEP, SMALL_STEP = "V = 50,257, 8 × 256 tokens", "V = 4,096, 8 × 64 tokens"
LARGE_ROLLOUT, VARIED_ROLLOUT = "V = 50,257, 128 tokens each", "V = 4,096, lengths varied (mean 48, at most 192)"
LABELS = {EAGER: "understudy, not compiled", "Liger": "Liger, not compiled", TRL: "TRL, chunked"}

Results = Mapping[str, Any]  # the content of each part's file, by the part's name


@dataclass(frozen=True)
class Aim:
    """What a figure should be at most, or at least."""

    text: str
    measure: Callable[[Results], float | None]  # None: not measured on this machine
    limit: float
    most: bool = True

    def row(self, results: Results) -> list[str]:
        sign, value = "≤" if self.most else "≥", self.measure(results)
        if value is None:
            return [self.text, f"{sign} {self.limit:g}", "", "not measured: no bf16 instructions here"]
        miss = value / self.limit - 1 if self.most else 1 - value / self.limit
        return [
            self.text,
            f"{sign} {self.limit:g}",
            f"{value:.2f}",
            "met" if miss <= 0 else f"**missed by {miss:.0%}**",
        ]


def times(results: Results, divergence: str) -> dict[str, dict[str, float]]:
    return results["loss"]["times"][f"{divergence}, N = {ROWS}"]


def compared(one: str, other: str, column: str = "ratio") -> Callable[[str], Callable[[Results], float | None]]:
    """For a divergence: how many times one implementation takes what another does."""

    def of(divergence: str) -> Callable[[Results], float | None]:
        def value(results: Results) -> float | None:
            rows = times(results, divergence)
            return rows[one][column] / rows[other][column] if one in rows and other in rows else None

        return value

    return of


def of_step(title: str, name: str, column: str) -> Callable[[Results], float]:
    return lambda results: results["step"]["steps"][title][name][column]


def of_rollout(title: str) -> Callable[[Results], float]:
    return lambda results: results["rollouts"]["rates"][title][OURS]["ratio"]


AIMS = (
    *(Aim(f"{d}, compiled: times the floor", compared(OURS, FLOOR)(d), 1.25) for d in DIVERGENCES),
    *(Aim(f"{d}, bf16 products: times the bf16 floor", compared(BF16, BF16_FLOOR)(d), 1.6) for d in DIVERGENCES),
    *(Aim(f"{d}: times faster than TRL, chunked", compared(TRL, OURS)(d), 5, most=False) for d in DIVERGENCES),
    *(Aim(f"{d}: times faster than Liger, compiled", compared(LIGER, OURS)(d), 1, most=False) for d in DIVERGENCES),
    *(
        Aim(f"step, {title}: times faster than {name}", of_step(title, name, "ratio"), limit, most=False)
        for title, limit in ((LARGE_STEP, 5), (SMALL_STEP, 2.5))
        for name in ("TRL DistillationTrainer", "TRL GKDTrainer")
    ),
    Aim(f"step, {LARGE_STEP}: memory in MB", of_step(LARGE_STEP, OURS, "peak_mb"), 1536),
    Aim(f"rollout, {VARIED_ROLLOUT}: times faster than transformers", of_rollout(VARIED_ROLLOUT), 6, most=False),
    Aim(f"rollout, {LARGE_ROLLOUT}: times faster than transformers", of_rollout(LARGE_ROLLOUT), 4, most=False),
)


def markdown(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *rows])


def conditions(results: Results) -> str:
    """The machines and versions, a line for every part that was measured elsewhere or with others."""
    lines: dict[str, list[str]] = {}
    for part in PARTS:
        machine, versions = results[part]["machine"], results[part]["versions"]
        bf16 = "with" if machine["bf16_instructions"] else "without"
        line = (
            f"{machine['cores']} cores of {machine['processor']} ({machine['instructions']}, "
            f"{bf16} bf16 instructions), {machine['threads']} threads; "
            + ", ".join(f"{package} {version}" for package, version in versions.items() if package != "understudy")
        )
        lines.setdefault(line, []).append(part)
    return "\n".join(f"- {', '.join(parts)}: {line}." for line, parts in lines.items())


def loss(results: Results) -> str:
    names = dict.fromkeys(name for divergence in DIVERGENCES for name in times(results, divergence))
    rows = []
    for name in names:
        cells = [times(results, divergence).get(name) for divergence in DIVERGENCES]
        texts = ["" if cell is None else f"{cell['ratio']:.2f} ({cell['median']:.2f})" for cell in cells]
        rows.append([LABELS.get(name, name), *texts])
    return markdown(["× floor (seconds)", *DIVERGENCES], rows)


def short_loss(results: Results) -> str:
    rows = []
    for name in (OURS, EAGER, LIGER, TRL, "TRL plain"):
        cells = [times(results, divergence).get(name) for divergence in DIVERGENCES]
        peak = results["loss"]["memory"][f"{name}, N = {ROWS}, V = {VOCABULARY}"]["peak_mb"]
        ratios = ["" if cell is None else _bold(f"{cell['ratio']:.2f}", name == OURS) for cell in cells]
        rows.append([LABELS.get(name, name), *ratios, f"{peak:,.0f} MB"])
    return markdown(["", *DIVERGENCES, "memory, JSD(0.5)"], rows)


def memory(results: Results) -> str:
    rows = [[LABELS.get(name, name), f"{row['peak_mb']:,.0f}"] for name, row in results["loss"]["memory"].items()]
    return markdown(["", "MB"], rows)


def steps(results: Results) -> str:
    cases = results["step"]["steps"]
    rows = []
    for name in cases[LARGE_STEP]:
        cells = [cases[title][name] for title in (LARGE_STEP, SMALL_STEP)]
        faster = ["" if name in (OURS, EAGER) else f" ({cell['ratio']:.1f} ×)" for cell in cells]
        texts = [f"{c['median']:.3g} s{f}, {c['peak_mb']:,.0f} MB" for c, f in zip(cells, faster, strict=True)]
        rows.append([LABELS.get(name, name), *(_bold(text, name == OURS) for text in texts)])
    return markdown(["one on-policy step", LARGE_STEP, SMALL_STEP], rows)


def rollouts(results: Results) -> str:
    cases = results["rollouts"]["rates"]
    rows = []
    for name in cases[LARGE_ROLLOUT]:
        cells = [cases[title][name] for title in (LARGE_ROLLOUT, VARIED_ROLLOUT)]
        texts = [_bold(f"{cell['tokens/s']:,.0f} ({cell['ratio']:.1f} ×)", name == OURS) for cell in cells]
        rows.append([LABELS.get(name, name), *texts])
    return markdown(["tokens per second", LARGE_ROLLOUT, VARIED_ROLLOUT], rows)


def quality(results: Results) -> str:
    runs = results["quality_per_second"]["runs"]
    rows = [[name, f"{run['seconds']:.1f}", f"{run['accuracy']:.1%}"] for name, run in runs.items()]
    return markdown(["", "seconds of training", "accuracy"], rows)


def aims(results: Results) -> str:
    return markdown(["", "aim", "measured", ""], [aim.row(results) for aim in AIMS])


TABLES: dict[str, Callable[[Results], str]] = {
    table.__name__.replace("_", " "): table
    for table in (conditions, loss, short_loss, memory, steps, rollouts, quality, aims)
}


def _bold(text: str, bold: bool) -> str:
    return f"**{text}**" if bold else text


def written(page: str, results: Results) -> str:
    """The page with its tables written anew.

    Raises:
        ValueError: for a name of which there is no table.
    """

    def table(match: re.Match[str]) -> str:
        if match[1] not in TABLES:
            raise ValueError(f"there is no table {match[1]!r}, only {', '.join(TABLES)}")
        return f"<!-- table: {match[1]} -->\n\n{TABLES[match[1]](results)}\n\n<!-- end -->"

    return re.sub(r"<!-- table: ([^>]*) -->\n.*?<!-- end -->", table, page, flags=re.DOTALL)


def load(folder: Path = RESULTS) -> Results:
    return {part: json.loads((folder / f"{part}.json").read_text("utf-8")) for part in PARTS}


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    results = load()
    for name, table in TABLES.items():
        print(f"\n{name}\n\n{table(results)}")
    for page in PAGES:
        text = (ROOT / page).read_text("utf-8")
        (ROOT / page).write_text(written(text, results), "utf-8")


if __name__ == "__main__":
    main()

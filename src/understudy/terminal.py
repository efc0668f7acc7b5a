"""What the command line prints of results: tables for people."""

import json
import math
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from .budget import spent
from .evaluation.evaluate import Evaluation
from .run.folder import write

_MEASURED = {"title", "metrics", "signatures", "curves"}  # what an evaluation's JSON file has


def show_run(summary: dict[str, Any], console: Console | None = None) -> None:
    """What a run came to, and where it is."""
    console = console or Console()
    own = summary["own_samples"]
    if own["before"]:
        table = Table(
            "on the student's own samples", "before", "after", title="distance to the teacher, nats per token"
        )
        for name in ("reverse_kl", "forward_kl", "student_entropy", "teacher_entropy"):
            table.add_row(name, f"{own['before'][name]:.4g}", f"{own['after'][name]:.4g}")
        console.print(table)
    found = "".join(f", {name} {value:.4g}" for name, value in summary["metrics"].items() if name == "eval_loss")
    console.print(f"{summary['steps']} steps, {summary['tokens']} response tokens, {summary['seconds']:.1f} s{found}")
    if budget := summary.get("budget"):
        console.print(f"spent {spent(budget)}; ended by {budget['ended_by']}")
    console.print(f"student: {summary['folder']}/student   everything else: {summary['folder']}", soft_wrap=True)


def show_evaluation(result: Evaluation, title: str, output: Path | None, console: Console | None = None) -> None:
    """The metrics as a table. Beside `output`, which keeps the answers, everything measured goes to a JSON file."""
    console = console or Console()
    several = any(name.endswith("_std") for name in result.metrics)
    table = Table("metric", "value", *(["± over seeds"] if several else []))
    for name, value in result.metrics.items():
        if not name.endswith("_std"):
            spread = result.metrics.get(f"{name}_std")
            table.add_row(name, f"{value:.4g}", *([] if spread is None else [f"{spread:.2g}"]))
    console.print(title, soft_wrap=True, highlight=False)
    console.print(table)
    for name, signature in result.signatures.items():
        console.print(f"{name}: {signature}", soft_wrap=True, highlight=False)
    if output is not None:
        measured = _measured(output)
        numbers = {name: value if math.isfinite(value) else None for name, value in result.metrics.items()}
        found = {"title": title, "metrics": numbers, "signatures": result.signatures, "curves": result.curves}
        output.parent.mkdir(parents=True, exist_ok=True)
        write(measured, json.dumps(found, ensure_ascii=False, indent=1) + "\n")
        console.print(f"{f'answers: {output}   ' if result.answers else ''}all numbers: {measured}", soft_wrap=True)


def check_measured(output: Path) -> None:
    """Change nothing, and refuse an `output` beside which lies a file of the name of its JSON file that is none.

    Raises:
        ValueError: naming the file, with the remedy.
    """
    file = _measured(output)
    for path in (file, file.with_name(f"{file.name}.partial")):
        try:
            ours = path == file and json.loads(file.read_bytes()).keys() == _MEASURED
        except FileNotFoundError:
            continue
        except (OSError, ValueError, AttributeError):
            ours = False
        if not ours and path.exists():
            message = f"{path} exists already and was not written by an evaluation"
            raise ValueError(f"{message}: give another --output, or move that file")


def _measured(output: Path) -> Path:
    return output.with_name(f"{output.stem}.metrics.json")


def progress() -> Progress:
    """A bar for every long task, on a terminal."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=Console(stderr=True), disable=not sys.stderr.isatty())

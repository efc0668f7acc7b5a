"""What the command line prints of results: tables for people."""

import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from .evaluate import Evaluation


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
    console.print(f"student: {summary['folder']}/student   everything else: {summary['folder']}", soft_wrap=True)


def show_evaluation(result: Evaluation, title: str, output: Path | None, console: Console | None = None) -> None:
    """The metrics as a table; the answers go to `output`, as JSONL, if that is given."""
    console = console or Console()
    table = Table("metric", "value", title=title)
    for name, value in result.metrics.items():
        table.add_row(name, f"{value:.4g}")
    console.print(table)
    for name, signature in result.signatures.items():
        console.print(f"{name}: {signature}", soft_wrap=True, highlight=False)
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text("".join(json.dumps(a, ensure_ascii=False) + "\n" for a in result.answers), encoding="utf-8")
        console.print(f"answers: {output}", soft_wrap=True)

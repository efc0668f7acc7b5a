"""The results that the commands print: tables of a run and of an evaluation, and the file of all numbers beside."""

import json
import math
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich import box, get_console
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from ..budget import spent
from ..files import write_atomic
from ..terminal import counted, escape, show

if TYPE_CHECKING:
    from ..evaluation.evaluate import Evaluation
    from ..run.cache import CacheSummary

_METRICS_FILE_KEYS = {"title", "metrics", "signatures", "curves"}
_ESCAPED = re.compile(r"\\(.)")  # in Markdown


def show_run(summary: dict[str, Any], console: Console | None = None) -> None:
    """Print a run's results, and where its student is saved."""
    console = console or get_console()
    distance = summary["student_samples"]
    if distance["before"] and distance["after"]:
        table = Table("on student samples", "before", "after", title="distance to the teacher, nats per token")
        for name in ("reverse_kl", "forward_kl", "student_entropy", "teacher_entropy"):
            table.add_row(name, f"{distance['before'][name]:.4g}", f"{distance['after'][name]:.4g}")
        console.print(table)
    loss = "".join(f", {name} {value:.4g}" for name, value in summary["metrics"].items() if name == "eval_loss")
    steps = counted(summary["steps"], "step", "steps")
    show(f"{steps}, {summary['tokens']:,} response tokens, {summary['seconds']:.1f} s{loss}", console)
    if budget := summary.get("budget"):
        show(f"spent {spent(budget)}; ended by {budget['ended_by']}", console)
    show(f"student: {summary['folder']}/student   everything else: {summary['folder']}", console)


def show_cache(summary: "CacheSummary", folder: Path, console: Console | None = None) -> None:
    """Print what a cache of a teacher's scores holds, and how it is used."""
    examples = counted(summary.examples, "example", "examples")
    size = f"{summary.bytes / 2**20:.1f} MB, {summary.bytes / max(summary.tokens, 1):.0f} bytes per token"
    show(f"{examples} with {summary.tokens:,} response tokens: {size}", console)
    show(f"{summary.added:,} of them scored now, in {summary.seconds:.1f} s", console)
    if summary.without_held_out:
        show("the held-out data is not among them: some of its rows have no response", console)
    if (folder / "responses.jsonl").is_file():
        show(f"responses, for data.dataset: {folder}/responses.jsonl", console)
    show(f"teacher: {{cached: {{folder: {folder}}}}}", console)


def show_evaluation(result: "Evaluation", title: str, output: Path | None, console: Console | None = None) -> None:
    """Print the metrics as a table. All numbers go to a JSON file beside `output`, the file of responses."""
    console = console or get_console()
    several = any(name.endswith("_std") for name in result.metrics)
    table = Table("metric", "value", *(["± over seeds"] if several else []))
    for name, value in result.metrics.items():
        if not name.endswith("_std"):
            spread = result.metrics.get(f"{name}_std")
            table.add_row(Text(escape(name)), f"{value:.4g}", *([] if spread is None else [f"{spread:.2g}"]))
    show(title, console)
    console.print(table)
    for name, signature in result.signatures.items():
        show(f"{name}: {signature}", console)
    if output is not None:
        metrics_file = _metrics_file(output)
        numbers = {name: value if math.isfinite(value) else None for name, value in result.metrics.items()}
        content = {"title": title, "metrics": numbers, "signatures": result.signatures, "curves": result.curves}
        output.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(metrics_file, json.dumps(content, ensure_ascii=False, indent=1) + "\n")
        responses = f"responses: {output}   " if result.responses else ""
        show(f"{responses}all numbers: {metrics_file}", console)


def show_comparison(markdown: str, console: Console | None = None) -> None:
    """Print the table of a comparison: as columns that fit a terminal, elsewhere as the Markdown that it is."""
    console = console or get_console()
    if not console.is_terminal:
        return show(markdown, console)
    lines = markdown.splitlines()
    heads, _, *rows = (_cells(line) for line in lines if line.startswith("|"))
    table = Table(Column(heads[0], overflow="fold"), box=box.SIMPLE_HEAD, padding=0, pad_edge=False)
    for head in heads[1:]:
        table.add_column(head, justify="right", overflow="fold")
    for row in rows:
        table.add_row(*row)
    console.print(table)
    for line in lines[2 + len(rows) :]:
        show(_ESCAPED.sub(r"\1", line), console)


def _cells(line: str) -> list[Text]:
    """The cells of a line of a Markdown table, in which a bar that ends no cell has a backslash before it."""
    cells = line.removeprefix("| ").removesuffix(" |").split(" | ")
    return [Text(escape(_ESCAPED.sub(r"\1", cell))) for cell in cells]


def check_measured(output: Path) -> None:
    """Refuse an `output` that is no file, or whose metrics file would overwrite a file that no evaluation wrote.

    Raises:
        ValueError: naming the file, with the remedy.
    """
    if output.exists() and not output.is_file():
        kind = "a folder" if output.is_dir() else "a device or pipe"
        raise ValueError(
            f"--output {output} is {kind}: name a file for the responses, such as responses.jsonl, beside which the "
            "numbers are written, or leave it out"
        )
    file = _metrics_file(output)
    for path in (file, file.with_name(f"{file.name}.partial")):
        try:
            is_own = path == file and json.loads(file.read_bytes()).keys() == _METRICS_FILE_KEYS
        except FileNotFoundError:
            continue
        except (OSError, ValueError, AttributeError):
            is_own = False
        if not is_own and path.exists():
            message = f"{path} exists already and was not written by an evaluation"
            raise ValueError(f"{message}: give another --output, or move that file")


def _metrics_file(output: Path) -> Path:
    return output.with_name(f"{output.stem}.metrics.json")

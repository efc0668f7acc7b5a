"""The demo: a student with few worked examples learns arithmetic by SFT, by supervised KD and by GKD.

All three begin at the warm start that ships with the package, which was fine-tuned on the same 1,000 worked problems
that they train on, and take the same number of steps. It is the comparison of recipes/playground/sft, kd and gkd, with
a table of its own.
"""

import os
import time
from pathlib import Path

from rich import get_console
from rich.console import Console
from rich.table import Table

from .compare.differences import Difference
from .compare.experiment import Comparison, compare
from .compare.table import in_points
from .compare.variants import variants
from .evaluation.settings import EvalSettings
from .recipe import Data, locate
from .report import write_report
from .run.folder import RunFolder
from .terminal import show

TEACHER = "playground:arithmetic"
METHODS = {"sft": "SFT", "kd": "supervised KD", "gkd": "GKD (on-policy)"}
PROBLEMS = 1000  # held out
_QUICK = ["training.max_steps=4", "training.logging_steps=2", "training.eval_steps=2", "evaluate.limit=20"]
_SAMPLES = 3  # of every student


def run_demo(
    folder: Path, quick: bool = False, seed: int = 0, samples: bool = False, console: Console | None = None
) -> Comparison:
    """Run the demo, and print its table and the report's path.

    Args:
        quick: only a few steps and problems.
        seed: of the students' training and sampling.
        samples: print responses of every student.
    """
    console = console or get_console()
    start = time.perf_counter()
    problems = 20 if quick else PROBLEMS
    console.rule("[bold]understudy[/]: distil a large model into a small one")
    console.print(
        "The task: word problems with written-out working. The teacher, 2.4 million\n"
        "parameters, solves nearly all of them. The student, 0.16 million, has learned\n"
        "1,000 worked problems by SFT and solves few new ones. It goes on in three ways:\n"
        "  SFT             with the worked solutions again\n"
        "  supervised KD   with the teacher's distributions over the worked solutions\n"
        "  GKD             with the teacher's distributions over the student's own\n"
        "                  attempts at the same 1,000 problems\n"
    )
    comparison = compare(
        variants([locate(f"playground/{name}") for name in reversed(METHODS)], _QUICK if quick else []),
        folder,
        EvalSettings(Data(dataset=TEACHER, split="test", limit=problems), dtype="float32"),  # bfloat16 is slow on CPUs
        seeds=[seed],
        parallel=max(1, min(len(METHODS), os.cpu_count() or 1)),
        baseline="kd",
        console=console,
    )
    if comparison.failed:
        show(comparison.table, console)
        return comparison
    _show_table(comparison, problems, console)
    if samples:
        _show_samples(folder, seed, console)
    page, _ = write_report([folder], models=False)  # with the models it would take as long as a method's evaluation
    show(f"report: {page}   runs: {folder}   in all {time.perf_counter() - start:.0f} s", console)
    return comparison


def _show_table(comparison: Comparison, problems: int, console: Console) -> None:
    caption = "gain: over the warm start, in points, and its 95 % interval over the problems; tokens: of responses"
    table = Table("model", title=f"accuracy on {problems:,} held-out problems", caption=caption)
    for name in ("accuracy", "gain", "tokens", "CPU s"):
        table.add_column(name, justify="right")
    for name in ("teacher", "warm start"):
        table.add_row(name, f"{comparison.references[name].metrics['greedy']['accuracy']:.1%}", "", "", "")
    rows = {row.name: row for row in comparison.rows}
    for name, title in METHODS.items():
        row = rows[name]
        accuracy = f"{row.metrics['greedy']['accuracy'].mean:.1%}"
        costs = [f"{spread.mean:,.0f}" if spread else "" for spread in (row.tokens, row.cpu_seconds)]
        table.add_row(title, accuracy, _points(row.gain["greedy"]["accuracy"]), *costs)
    console.print(table)
    kd, gkd = (100 * rows[name].gain["greedy"]["accuracy"].mean for name in ("kd", "gkd"))
    difference = _points(rows["gkd"].difference["greedy"]["accuracy"])
    show(f"GKD gains {gkd:.1f} points, supervised KD {kd:.1f}; the difference is {difference}.", console)


def _show_samples(folder: Path, seed: int, console: Console) -> None:
    """Print the responses of every student to the same problems."""
    responses = {
        title: RunFolder(folder / name / f"seed-{seed}").read_responses()["greedy"][:_SAMPLES]
        for name, title in METHODS.items()
    }
    for problem in zip(*responses.values(), strict=True):
        show(problem[0]["prompt"].strip(), console)
        for title, line in zip(responses, problem, strict=True):
            working = line["response"].replace("\n", "  ")
            show(f"  {title:<15} {working}  {'right' if line['correct'] else 'wrong'}", console)


def _points(difference: Difference) -> str:
    mean, low, high = in_points(difference, "accuracy")
    return f"{mean:+.1f} [{low:+.1f}, {high:+.1f}]"

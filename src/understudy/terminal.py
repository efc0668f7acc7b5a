"""What the command line prints: tables of a run and of an evaluation, progress bars, and an error as one sentence.

Nothing heavy is imported: an error in the arguments is reported at once.
"""

import errno
import json
import linecache
import math
import sys
import sysconfig
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from .budget import spent
from .files import write_atomic

if TYPE_CHECKING:
    from .evaluation.evaluate import Evaluation

INTERRUPTED = 130  # exit code after Ctrl-C

_METRICS_FILE_KEYS = {"title", "metrics", "signatures", "curves"}


def show_run(summary: dict[str, Any], console: Console | None = None) -> None:
    """Print a run's results, and where its student is saved."""
    console = console or Console()
    distance = summary["student_samples"]
    if distance["before"]:
        table = Table("on student samples", "before", "after", title="distance to the teacher, nats per token")
        for name in ("reverse_kl", "forward_kl", "student_entropy", "teacher_entropy"):
            table.add_row(name, f"{distance['before'][name]:.4g}", f"{distance['after'][name]:.4g}")
        console.print(table)
    loss = "".join(f", {name} {value:.4g}" for name, value in summary["metrics"].items() if name == "eval_loss")
    console.print(f"{summary['steps']} steps, {summary['tokens']} response tokens, {summary['seconds']:.1f} s{loss}")
    if budget := summary.get("budget"):
        console.print(f"spent {spent(budget)}; ended by {budget['ended_by']}")
    console.print(f"student: {summary['folder']}/student   everything else: {summary['folder']}", soft_wrap=True)


def show_evaluation(result: "Evaluation", title: str, output: Path | None, console: Console | None = None) -> None:
    """Print the metrics as a table. All numbers go to a JSON file beside `output`, the file of responses."""
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
        metrics_file = _metrics_file(output)
        numbers = {name: value if math.isfinite(value) else None for name, value in result.metrics.items()}
        content = {"title": title, "metrics": numbers, "signatures": result.signatures, "curves": result.curves}
        output.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(metrics_file, json.dumps(content, ensure_ascii=False, indent=1) + "\n")
        responses = f"responses: {output}   " if result.responses else ""
        console.print(f"{responses}all numbers: {metrics_file}", soft_wrap=True)


def check_measured(output: Path) -> None:
    """Refuse an `output` whose metrics file would overwrite a file that no evaluation wrote; changes nothing.

    Raises:
        ValueError: naming the file, with the remedy.
    """
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


def progress() -> Progress:
    """Progress bars for long tasks, on a terminal."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=Console(stderr=True), disable=not sys.stderr.isatty())


def explain(error: Exception) -> int:
    """Print an error as one sentence and return the exit code."""
    name = type(error).__name__
    # Errors of the argument parser name the option in format_message only.
    message = " ".join(str(error.format_message() if hasattr(error, "format_message") else error).split())  # type: ignore
    if name == "Interrupted":
        sys.stderr.write(f"{message}\n")
        return INTERRUPTED
    if getattr(error, "errno", None) == errno.ENOSPC or f"os error {errno.ENOSPC}" in message:
        message = (
            "the disk is full: free some space and run the same command again; it resumes from the last checkpoint"
        )
    elif name == "OutOfMemoryError":
        message = "the GPU's memory is full: lower training.per_device_train_batch_size or the rollout's batch_size"
    elif (own_class := _raised_by(error)) is not None:
        message = f"{own_class[0]} raised {name}: {message} ({own_class[1]}; --debug shows how it was called)"
    elif not _is_for_users(error):
        message = f"unexpected {name}: {message} (probably a bug; --debug shows where)"
    sys.stderr.write(f"error: {message}\n")
    return 2


def _is_for_users(error: Exception) -> bool:
    """Was this error raised for users, by the command line, the system or this package, or is it a bug?"""
    is_own = type(error).__module__.startswith("understudy.")
    if is_own or hasattr(error, "format_message") or isinstance(error, OSError | ImportError):
        return True
    if not isinstance(error, ValueError | ArithmeticError):
        return False
    *_, (frame, line) = traceback.walk_tb(error.__traceback__)
    source_line = linecache.getline(frame.f_code.co_filename, line)
    return frame.f_globals.get("__name__", "").startswith("understudy.") and "raise " in source_line


def _raised_by(error: Exception) -> tuple[str, str] | None:
    """The function of a user's own class or module that raised an error, as name and place; None for other errors.

    An error that understudy raised for users while such a function called it is understudy's.
    """
    frames = list(traceback.walk_tb(error.__traceback__))
    modules = [frame.f_globals.get("__name__", "") for frame, _ in frames]
    own = [i for i, module in enumerate(modules) if module.partition(".")[0] == "understudy"]
    theirs = [i for i, (frame, _) in enumerate(frames) if own and i > own[0] and i not in own and _is_theirs(frame)]
    if not theirs or (_is_for_users(error) and own[-1] > theirs[-1]):
        return None
    frame, line = frames[theirs[-1]]
    instance = frame.f_locals.get("self")
    owner = "" if instance is None else f"{type(instance).__name__}."
    return f"{owner}{frame.f_code.co_name}", f"{frame.f_code.co_filename}, line {line}"


def _is_theirs(frame: Any) -> bool:
    """Is this code of a user: a method of a class derived from one of understudy's, or in no installed package?"""
    cls, *bases = type(frame.f_locals.get("self")).__mro__
    if not cls.__module__.startswith("understudy.") and any(b.__module__.startswith("understudy.") for b in bases):
        return True
    file, paths = Path(frame.f_code.co_filename), sysconfig.get_paths()
    installed = (paths[name] for name in ("stdlib", "platstdlib", "purelib", "platlib"))
    return file.is_file() and not any(file.is_relative_to(path) for path in installed)

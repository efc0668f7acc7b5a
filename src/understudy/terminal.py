"""What reaches the terminal: plain text without control codes, progress bars, warnings, and an error as one sentence.

Names, paths, columns and templates are foreign text: a terminal would execute their escape sequences, and rich would
read their brackets as markup. Everything that is printed goes through `escape` or `show`. Nothing heavy is imported.
"""

import errno
import linecache
import logging
import os
import sys
import sysconfig
import traceback
import unicodedata
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from types import FrameType
from typing import Any

from rich import get_console, reconfigure
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text
from rich.theme import Theme

logger = logging.getLogger(__name__)

# Colours that can be read on a dark and on a light terminal, in place of rich's yellow, cyan and nearly black grey.
THEME = Theme(
    {
        "bar.back": "grey46",
        "progress.elapsed": "none",
        "progress.remaining": "none",
        "progress.download": "none",
    }
)
INTERRUPTED = 130  # exit code after Ctrl-C

_JOINERS = "\u200c\u200d"  # within words of some scripts, and within emoji
_failed_displays: set[str] = set()  # displays whose failure was reported


def escape(text: object) -> str:
    """The text with a replacement character for control codes and for marks that change the direction of text.

    Newlines stay, and a tab is a space.
    """
    return replace_control_codes(str(text).replace("\t", " "), "\n")


def replace_control_codes(text: str, except_for: str) -> str:
    """The text with a replacement character for control codes and marks of direction that are not in `except_for`."""
    shown = _JOINERS + except_for
    return "".join(
        c if c.isprintable() or c in shown or unicodedata.category(c) == "Zs" else "\N{REPLACEMENT CHARACTER}"
        for c in text
    )


def counted(number: int, one: str, many: str) -> str:
    """A number and what it counts: counted(2, "row", "rows") is "2 rows"."""
    return f"{number:,} {one if number == 1 else many}"


def show(text: object, console: Console | None = None) -> None:
    """Print foreign text as it is, escaped, in lines that are not wrapped."""
    (console or get_console()).print(Text(escape(text)), soft_wrap=True)


@contextmanager
def showing(what: str) -> Iterator[None]:
    """Log an error of something that is only shown, once for each `what`, instead of raising it."""
    try:
        yield
    except (Exception, SystemExit) as error:  # rich ends the process where a pipe is closed
        if what not in _failed_displays:
            _failed_displays.add(what)
            reason = " ".join(str(error).split()) or type(error).__name__
            logger.warning("%s cannot be shown (%s); the run goes on without", what, reason)


def working(what: str, console: Console) -> AbstractContextManager[Any]:
    """Show on a terminal, and only there, that something takes a while."""
    return console.status(Text(f"{what} …")) if console.is_terminal else nullcontext()


def is_first_process() -> bool:
    """Is this the process that prints, of the several that torchrun or accelerate may have started?"""
    return os.environ.get("RANK", "0") == "0"


def leave_process_group() -> None:
    """End this process's connection to the others of a run; DeepSpeed aborts a process that exits without it."""
    distributed = getattr(sys.modules.get("torch"), "distributed", None)
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()


def prepare() -> None:
    """Set up the streams, the colours and the logging of a command.

    A character that the terminal's encoding lacks is shown as a question mark, and does not end the command.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # type: ignore[union-attr]
    reconfigure(theme=THEME)
    root = logging.getLogger()
    if not root.handlers:
        root.addHandler(_StandardError())
        root.setLevel(logging.WARNING if is_first_process() else logging.ERROR)
    logging.captureWarnings(True)


class _StandardError(logging.Handler):
    """Writes messages, escaped, to what `sys.stderr` is at the time, which a progress bar replaces."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            sys.stderr.write(f"{escape(record.getMessage())}\n")
        except (OSError, ValueError):
            self.handleError(record)


def progress() -> Progress:
    """Progress bars for long tasks, on a terminal."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=Console(stderr=True, theme=THEME), disable=not sys.stderr.isatty())


def explain(error: Exception) -> int:
    """Print an error as one sentence and return the exit code."""
    if type(error).__name__ == "Interrupted":
        leave_process_group()
        sys.stderr.write(f"{escape(_message(error))}\n")
        return getattr(error, "exit_code", INTERRUPTED)
    sys.stderr.write(f"error: {escape(sentence(error))}\n")
    return 2


def sentence(error: Exception) -> str:
    """An error as one sentence, which says where it comes from if it is none of understudy's own."""
    name, message = type(error).__name__, _message(error)
    if (full := _what_is_full(error)) is not None:
        message = full
    elif (own_class := _raised_by(error)) is not None:
        message = f"{own_class[0]} raised {name}: {message} ({own_class[1]}; --debug shows how it was called)"
    elif not _is_for_users(error):
        message = f"unexpected {name}: {message} (probably a bug; --debug shows where)"
    return message


def _message(error: Exception) -> str:
    # Errors of the argument parser name the option in format_message only.
    return " ".join(str(error.format_message() if hasattr(error, "format_message") else error).split())  # type: ignore


def _what_is_full(error: BaseException) -> str | None:
    """The sentence about a full disk or memory, in the words of the system, PyTorch or safetensors; else None."""
    name, message = type(error).__name__, str(error)
    codes = {errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC)}
    if getattr(error, "errno", None) in codes or any(f"os error {code}" in message for code in codes):
        return "the disk is full: free some space and run the same command again; it resumes from the last checkpoint"
    if "inline_container" in message or "PytorchStreamWriter" in message:  # torch.save does not say more
        message = "a checkpoint could not be written, probably because the disk is full: free some space and run the "
        return message + "same command again; it resumes from the last complete checkpoint"
    remedy = "lower training.per_device_train_batch_size or the rollout's batch_size"
    if name == "OutOfMemoryError" or "CUDA out of memory" in message or "_STATUS_ALLOC_FAILED" in message:
        return f"the GPU's memory is full: {remedy}"
    if isinstance(error, MemoryError) or "can't allocate memory" in message or "not enough memory" in message:
        return f"the memory is full: {remedy}, or end other programs"
    return None if error.__cause__ is None else _what_is_full(error.__cause__)


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


def _is_theirs(frame: FrameType) -> bool:
    """Is this code of a user: a method of a class derived from one of understudy's, or in no installed package?"""
    cls, *bases = type(frame.f_locals.get("self")).__mro__
    if not cls.__module__.startswith("understudy.") and any(b.__module__.startswith("understudy.") for b in bases):
        return True
    file, paths = Path(frame.f_code.co_filename), sysconfig.get_paths()
    installed = (paths[name] for name in ("stdlib", "platstdlib", "purelib", "platlib"))
    return file.is_file() and not any(file.is_relative_to(path) for path in installed)

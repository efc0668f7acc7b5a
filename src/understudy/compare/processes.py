"""Run tasks in processes of their own, a few at a time, which end with the process that started them.

A signal to the parent (Ctrl-C, SIGTERM, the end of a terminal) is passed to the processes, which save a checkpoint and
end; a second one ends them at once. A parent that is killed cannot pass anything: each process watches a pipe that its
parent holds open, and ends when it closes.
"""

import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from multiprocessing import resource_tracker
from multiprocessing.connection import wait
from typing import Any, Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from ..terminal import counted, show

_PAUSE = 0.2  # seconds between two looks at the processes
_PRELOADED = ["understudy.run.distill", "understudy.compare.evaluations"]
_LOOK = 2.0  # seconds between two looks at how far they are


class Task(Protocol):
    """What a process can be started with."""

    @property
    def name(self) -> str:
        """What it does, in a few words."""
        ...

    def __call__(self) -> None: ...

    def progress(self) -> float:
        """The share of it that is done, from 0 to 1, as far as it can be told."""
        ...

    def error(self) -> str | None:
        """Why it has failed; None if it has not."""
        ...


def run_in_processes(tasks: Sequence[Task], parallel: int, console: Console) -> None:
    """Run every task in a process of its own, `parallel` at a time, which share the cores.

    Raises:
        KeyboardInterrupt: after Ctrl-C. Another signal has its usual effect, once the processes have ended.
    """
    threads = max(1, (os.cpu_count() or 1) // parallel)
    context = _context()
    waiting, running = list(tasks), []
    with _Signals() as signals:
        try:
            with _Display(len(tasks), console) as display:
                while (waiting or running) and not signals.received:
                    while waiting and len(running) < parallel:
                        task = waiting.pop(0)
                        process = context.Process(target=_run, args=(task, threads, dict(os.environ)))
                        with _interrupts_deferred():
                            process.start()
                        running.append((task, process))
                    time.sleep(_PAUSE)
                    ended = [task for task, process in running if not process.is_alive()]
                    running = [(task, process) for task, process in running if task not in ended]
                    for task in ended:
                        display.show_ended(task)
                    display.show_running([task for task, _ in running])
        finally:
            _end([process for _, process in running], signals, console)
    signals.deliver()


def _context() -> Any:
    """How processes are started: forked from a server that has imported what every run needs, where that is safe.

    These imports take seconds. A process that has used an accelerator cannot be forked, and an import may use it.
    """
    import torch

    if not sys.platform.startswith("linux") or torch.accelerator.is_available():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    return context


def _end(processes: Sequence[Any], signals: "_Signals", console: Console) -> None:
    """End the processes: after their checkpoints, or at once after a second signal."""
    if processes:
        runs, them = counted(len(processes), "run", "runs"), "it" if len(processes) == 1 else "them"
        show(f"ending {runs} after a checkpoint; the same signal again ends {them} at once", console)
    for process in processes:
        process.terminate()
    while alive := [process for process in processes if process.is_alive()]:
        if len(signals.received) > 1:
            for process in alive:
                process.kill()
        time.sleep(_PAUSE)


@contextmanager
def _interrupts_deferred() -> Iterator[None]:
    """Ctrl-C reaches this process after the block, and a process that is started in it not before `_run`.

    Until then the new process belongs to the terminal, and an interrupt would end its imports with a traceback.
    """
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    resource_tracker.ensure_running()  # which unblocks the signal when it is started by the first process
    previous = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, previous)


def _drop_interrupts() -> None:
    """Discard a Ctrl-C that `_interrupts_deferred` held back, and let later ones through."""
    if hasattr(signal, "pthread_sigmask"):
        handler = signal.signal(signal.SIGINT, signal.SIG_IGN)  # discards what waits
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
        signal.signal(signal.SIGINT, handler)


class _Signals(AbstractContextManager["_Signals"]):
    """Notes the signals that would end this process; those that are ignored, as by nohup, stay ignored."""

    def __init__(self) -> None:
        self.received: list[int] = []
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "_Signals":
        if threading.current_thread() is threading.main_thread():
            names = [name for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]  # no SIGHUP on Windows
            for number in [getattr(signal, name) for name in names]:
                if signal.getsignal(number) not in (signal.SIG_IGN, None):
                    self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: Any) -> None:
        self.received.append(number)

    def deliver(self) -> None:
        """Let the first signal have the effect that it would have had."""
        if self.received:
            signal.raise_signal(self.received[0])


class _Display(AbstractContextManager["_Display"]):
    """A bar in a terminal, else a line for each task that has ended; errors at once."""

    def __init__(self, total: int, console: Console) -> None:
        self._console, self._total, self._count, self._start = console, total, 0, time.monotonic()
        self._looked = self._start  # when the running tasks were asked last
        columns = (MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn())
        self._bar = Progress(
            *(TextColumn("compare"), BarColumn(20), *columns),
            console=console,
            disable=not console.is_terminal,
            speed_estimate_period=float("inf"),
        )
        self._task = self._bar.add_task("", total=total)

    def __enter__(self) -> "_Display":
        self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.stop()

    def show_ended(self, task: Task) -> None:
        """Show that one more task has ended."""
        self._count += 1
        self._bar.update(self._task, completed=self._count)
        if (error := task.error()) is not None:
            show(f"{task.name} failed: {error}", self._console)
        if not self._console.is_terminal:
            elapsed = time.monotonic() - self._start
            left = _clock(elapsed / self._count * (self._total - self._count))
            text = f"{self._count} of {self._total} ended after {_clock(elapsed)}, about {left} left: {task.name}"
            show(text, self._console)

    def show_running(self, tasks: Sequence[Task]) -> None:
        """Advance the bar by the shares of running tasks, every few seconds."""
        if self._console.is_terminal and time.monotonic() - self._looked > _LOOK:
            self._looked = time.monotonic()
            self._bar.update(self._task, completed=self._count + sum(task.progress() for task in tasks))


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}"


def _run(task: Task, threads: int, environment: Mapping[str, str]) -> None:
    """In the process of a task: end with the parent, and leave signals of the terminal to it.

    The environment is that of the parent now, not when the server of `_context` was started.
    """
    os.environ.clear()
    os.environ.update(environment)
    if hasattr(os, "setpgid"):
        os.setpgid(0, 0)
    _drop_interrupts()
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_end_with, args=(parent.sentinel,), daemon=True).start()
    if "OMP_NUM_THREADS" not in os.environ:
        import torch  # slow: the parent is watched by then

        torch.set_num_threads(threads)
    task()


def _end_with(sentinel: Any) -> None:
    """End this process, and those that it has started, as soon as `sentinel` says that the parent has ended."""
    wait([sentinel])
    if hasattr(os, "killpg"):
        os.killpg(os.getpgid(0), signal.SIGKILL)
    os._exit(1)

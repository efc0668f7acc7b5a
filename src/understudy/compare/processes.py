"""Run tasks in separate processes, a few at a time, with a progress bar."""

import multiprocessing
import os
import time
from collections.abc import Callable, Sequence

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

Task = Callable[[], None]  # that a process can be started with


def run_in_processes(tasks: Sequence[Task], parallel: int, console: Console) -> None:
    """Run every task in a process of its own, `parallel` at a time, which share the cores."""
    threads = max(1, (os.cpu_count() or 1) // parallel)
    context = multiprocessing.get_context("spawn")
    waiting, running = list(tasks), []
    bar = Progress(TextColumn("compare"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), console=console)
    try:
        with bar as progress:
            bar_task = progress.add_task("", total=len(tasks))
            while waiting or running:
                while waiting and len(running) < parallel:
                    process = context.Process(target=_run, args=(waiting.pop(0), threads))
                    process.start()
                    running.append(process)
                time.sleep(0.2)
                alive = [process for process in running if process.is_alive()]
                progress.advance(bar_task, len(running) - len(alive))
                running = alive
    finally:
        for process in running:
            process.terminate()


def _run(task: Task, threads: int) -> None:
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(threads)
    task()

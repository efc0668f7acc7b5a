"""Trainer callbacks: schedules, budget, gradient check, Ctrl-C, metrics file, sample responses, progress bar."""

import math
import shutil
import signal
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich import get_console
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column, Table
from rich.text import Text
from transformers import TrainerCallback

from ..batch import Example
from ..budget import amount
from ..files import append_jsonl, read_jsonl, write_jsonl
from ..method import Method
from ..rollout import Rollout, Writer
from ..step import Step
from .checkpoint import checkpoints
from .spending import Spending

_PROGRESS_METRICS = ("loss", "forward_kl", "reverse_kl", "tokens_per_second")


class AfterStep(TrainerCallback):
    """Calls the method's `after_step` after each optimizer step, for its schedules."""

    def __init__(self, method: Method, spending: Spending) -> None:
        self.method, self.spending = method, spending

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        total = self.spending.expected_steps(state.global_step, state.max_steps)
        self.method.after_step(Step(state.global_step, args.seed, total))


class SyncRollout(TrainerCallback):
    """Calls the `sync` of the student's rollout when the student's weights have changed: after a step or a resume."""

    def __init__(self, rollout: Rollout) -> None:
        self.rollout = rollout

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.rollout.sync(Step(state.global_step, args.seed))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.rollout.sync(Step(state.global_step, args.seed))

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The best checkpoint may have been loaded."""
        self.rollout.sync(Step(state.global_step, args.seed))


class StopAtBudget(TrainerCallback):
    """Ends the run with the step at which its budget is used up, as if `max_steps` had been this step.

    `agree` returns the same number of seconds on all processes.
    """

    def __init__(self, spending: Spending, agree: Callable[[float], float]) -> None:
        self.spending, self.agree = spending, agree

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.spending.end_step(self.agree)
        if self.spending.share >= 1:
            state.max_steps = min(state.max_steps, state.global_step + 1)  # global_step is increased after this call

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.spending.share >= 1:
            control.should_log = True  # the last step of a budget is rarely a multiple of logging_steps


class CheckGradients(TrainerCallback):
    """Raises an error before a gradient that is not finite reaches the weights and a checkpoint."""

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if args.fp16:  # the gradient scaler skips such steps, and lowers the scale
            return
        norm: Any = torch.nn.utils.get_total_norm([p.grad for p in kwargs["model"].parameters() if p.grad is not None])
        norm = float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)
        if not math.isfinite(norm):
            raise FloatingPointError(
                f"the gradient became {norm} at step {state.global_step}, though the loss is a number; nothing was "
                f"updated with it. Resume from the last checkpoint in {args.output_dir} with a lower learning_rate"
            )


class StopOnInterrupt(TrainerCallback):
    """The first Ctrl-C ends the run after the current step, with a checkpoint; a second one ends it at once.

    With several processes the signal would reach them at different steps, so there Ctrl-C has its usual effect.
    """

    def __init__(self) -> None:
        self.interrupted = False
        self._previous_handler: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if args.world_size == 1 and threading.current_thread() is threading.main_thread():
            self._previous_handler = signal.signal(signal.SIGINT, self._interrupt)

    def _interrupt(self, *_: Any) -> None:
        self.interrupted = True
        signal.signal(signal.SIGINT, self._previous_handler)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.interrupted:
            control.should_save = control.should_training_stop = True

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._previous_handler is not None:
            signal.signal(signal.SIGINT, self._previous_handler)


class LimitCheckpoints(TrainerCallback):
    """Keeps the newest `limit` checkpoints, and the best one.

    Replaces transformers' own rotation, which orders by modification time and deletes any folder named checkpoint-*.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not args.should_save:
            return
        best = None if state.best_model_checkpoint is None else Path(state.best_model_checkpoint).resolve()
        newest_first = [path for path in reversed(checkpoints(args.output_dir)) if path.resolve() != best]
        keep = max(1, self.limit - (best is not None))
        for path in newest_first[keep:]:
            shutil.rmtree(path, ignore_errors=True)


class LogMetrics(TrainerCallback):
    """Appends every log line to a JSONL file; a resumed run first removes the lines that it will write again."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            _drop_lines_after(self.path, state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **kwargs: Any) -> None:
        if state.is_world_process_zero:
            append_jsonl(self.path, {"step": state.global_step, **logs})


class ShowSamples(TrainerCallback):
    """Every `every` steps, prints responses of the student to the same prompts and appends them to a JSONL file."""

    def __init__(
        self,
        writer: Writer,
        examples: Sequence[Example],
        tokenizer: Any,
        every: int,
        path: Path,
        console: Console | None = None,
    ) -> None:
        self.writer, self.examples, self.tokenizer = writer, list(examples), tokenizer
        self.every, self.path = every, path
        self.console = console or get_console()  # the progress bar's, so that they do not overwrite each other

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            _drop_lines_after(self.path, state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not self.every or state.global_step % self.every or not self.examples:
            return
        responses = self.writer(self.examples, Step(0, args.seed), n=1)
        if not state.is_world_process_zero:
            return
        names = ("prompt", "student", "reference")
        columns = [Column(name, overflow="fold") for name in names]  # fold: not every script has spaces to wrap at
        table = Table(*columns, title=f"step {state.global_step}", show_lines=True)
        for example, sample in zip(self.examples, responses, strict=True):
            token_ids = (sample.prompt, sample.response, example.last_turn().response)
            texts = [self.tokenizer.decode(ids, skip_special_tokens=True) for ids in token_ids]
            table.add_row(*(Text(_printable(text if len(text) <= 300 else "… " + text[-298:])) for text in texts))
            append_jsonl(self.path, {"step": state.global_step, **dict(zip(names, texts, strict=True))})
        self.console.print(table)


class ShowProgress(TrainerCallback):
    """A progress bar with rate, remaining time and current losses; with a budget its total is the expected steps."""

    def __init__(self, console: Console | None = None, spending: Spending | None = None) -> None:
        self.spending = spending or Spending()
        self.progress = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TextColumn("{task.fields[spent]}"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[losses]}"),
            console=console,
        )
        self.task: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            self.task = self.progress.add_task("distil", **self._position(state), rate="", losses="")
            self.progress.start()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.task is not None:
            speed = self.progress.tasks[self.task].speed
            rate = f"{speed:.2f} steps/s" if speed else ""
            self.progress.update(self.task, **self._position(state), rate=rate)

    def _position(self, state: Any) -> dict[str, Any]:
        """Fields of the bar: steps done, steps expected and the share of the budget that is spent."""
        steps, budget = state.global_step, self.spending.budget
        spent = "" if budget is None else f"{self.spending.share:.0%} of {amount({budget.kind: budget.limit})}"
        return {"completed": steps, "total": self.spending.expected_steps(steps, state.max_steps), "spent": spent}

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **kwargs: Any) -> None:
        if self.task is not None:
            losses = "  ".join(f"{name} {logs[name]:.4g}" for name in _PROGRESS_METRICS if name in logs)
            if losses:
                self.progress.update(self.task, losses=losses)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.progress.stop()


def _printable(text: str) -> str:
    """Replace control codes, which a terminal would execute, and marks that change the direction of text."""
    return "".join(c if c.isprintable() or c == "\n" else "\N{REPLACEMENT CHARACTER}" for c in text.replace("\t", " "))


def _drop_lines_after(path: Path, step: int) -> None:
    """Remove the lines of a JSONL file that are later than `step`, or have no step."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [line for line in read_jsonl(path) if isinstance(line.get("step"), int | float)]
    write_jsonl(path, [line for line in lines if line["step"] <= step])

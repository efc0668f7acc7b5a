"""What watches a run: the method's schedules, broken gradients, Ctrl-C, metrics, samples, the progress display."""

import math
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
from ..budget import Spending, amount
from ..files import append_jsonl, read_jsonl, write_jsonl
from ..method import Method
from ..rollout import Rollout
from ..step import Step

_SHOWN = ("loss", "forward_kl", "reverse_kl", "tokens_per_second")


class AdvanceMethod(TrainerCallback):
    """Moves the method's schedules on after each optimizer step."""

    def __init__(self, method: Method, spending: Spending) -> None:
        self.method, self.spending = method, spending

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        total = self.spending.foreseen(state.global_step, state.max_steps)
        self.method.advance(Step(state.global_step, args.seed, total))


class KeepToBudget(TrainerCallback):
    """Ends the run with the step at which its budget is used up, as if this were the last that it was to have.

    `agreed` is what all processes take a step's seconds for.
    """

    def __init__(self, spending: Spending, agreed: Callable[[float], float]) -> None:
        self.spending, self.agreed = spending, agreed

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.spending.end_step(self.agreed)
        if self.spending.share >= 1:
            state.max_steps = min(state.max_steps, state.global_step + 1)  # the one at hand is counted a moment later

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.spending.share >= 1:
            control.should_log = True  # a budget rarely ends where a line is due


class RefuseBrokenGradients(TrainerCallback):
    """Ends the run before a gradient that is not a number reaches the weights, and then a checkpoint."""

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if args.fp16:  # there the scaler skips such steps, and lowers the scale
            return
        norm: Any = torch.nn.utils.get_total_norm([p.grad for p in kwargs["model"].parameters() if p.grad is not None])
        norm = float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)
        if not math.isfinite(norm):
            raise FloatingPointError(
                f"the gradient became {norm} at step {state.global_step}, though the loss is a number; nothing was "
                f"updated with it. Resume from the last checkpoint in {args.output_dir} with a lower learning_rate"
            )


class StopOnInterrupt(TrainerCallback):
    """The first Ctrl-C ends the run after the step at hand, with a checkpoint; a second one ends it at once.

    In a run of several processes the signal reaches them at different steps, so there it keeps its usual meaning.
    """

    def __init__(self) -> None:
        self.interrupted = False
        self._before: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if args.world_size == 1 and threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGINT, self._interrupt)

    def _interrupt(self, *_: Any) -> None:
        self.interrupted = True
        signal.signal(signal.SIGINT, self._before)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.interrupted:
            control.should_save = control.should_training_stop = True

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)


class WriteMetrics(TrainerCallback):
    """Appends every log line to a JSONL file; a resumed run first drops the lines it is about to write again."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            _drop_lines_after(self.path, state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **kwargs: Any) -> None:
        if state.is_world_process_zero:
            append_jsonl(self.path, {"step": state.global_step, **logs})


class ShowSamples(TrainerCallback):
    """Every so many steps, lets the student answer the same few prompts, prints the answers and keeps them as JSONL."""

    def __init__(
        self,
        rollout: Rollout,
        examples: Sequence[Example],
        tokenizer: Any,
        every: int,
        path: Path,
        console: Console | None = None,
    ) -> None:
        self.rollout, self.examples, self.tokenizer = rollout, list(examples), tokenizer
        self.every, self.path = every, path
        self.console = console or get_console()  # the progress display's, so that neither writes over the other

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            _drop_lines_after(self.path, state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not self.every or state.global_step % self.every or not self.examples:
            return
        answers = self.rollout.generate(self.examples, Step(0, args.seed))
        answers = answers[:: len(answers) // len(self.examples)]  # the first of several to a prompt
        if not state.is_world_process_zero:
            return
        names = ("prompt", "student", "reference")
        columns = [Column(name, overflow="fold") for name in names]  # not every writing has spaces to break a line at
        table = Table(*columns, title=f"step {state.global_step}", show_lines=True)
        for example, answer in zip(self.examples, answers, strict=True):
            said = (example.prompt, answer.response, example.response)
            texts = [self.tokenizer.decode(ids, skip_special_tokens=True) for ids in said]
            table.add_row(*(Text(_harmless(text if len(text) <= 300 else "… " + text[-298:])) for text in texts))
            append_jsonl(self.path, {"step": state.global_step, **dict(zip(names, texts, strict=True))})
        self.console.print(table)


class ShowProgress(TrainerCallback):
    """A bar with rate, remaining time and the current losses; with a budget, of the steps that it will do for."""

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
            self.task = self.progress.add_task("distil", **self._reached(state), rate="", losses="")
            self.progress.start()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.task is not None:
            speed = self.progress.tasks[self.task].speed
            rate = f"{speed:.2f} steps/s" if speed else ""
            self.progress.update(self.task, **self._reached(state), rate=rate)

    def _reached(self, state: Any) -> dict[str, Any]:
        """How far the run is, of how many steps, and what share of its budget that took."""
        steps, budget = state.global_step, self.spending.budget
        spent = "" if budget is None else f"{self.spending.share:.0%} of {amount({budget.kind: budget.limit})}"
        return {"completed": steps, "total": self.spending.foreseen(steps, state.max_steps), "spent": spent}

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **kwargs: Any) -> None:
        if self.task is not None:
            losses = "  ".join(f"{name} {logs[name]:.4g}" for name in _SHOWN if name in logs)
            if losses:
                self.progress.update(self.task, losses=losses)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.progress.stop()


def _harmless(text: str) -> str:
    """Without what a terminal would obey instead of showing: control codes, and marks that turn the writing around."""
    return "".join(c if c.isprintable() or c == "\n" else "\N{REPLACEMENT CHARACTER}" for c in text.replace("\t", " "))


def _drop_lines_after(path: Path, step: int) -> None:
    """Drop the lines of a JSONL file that are later than `step`, and what is no such line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [line for line in read_jsonl(path) if isinstance(line.get("step"), int | float)]
    write_jsonl(path, [line for line in lines if line["step"] <= step])

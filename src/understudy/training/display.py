"""Trainer callbacks that show a run: its progress, and responses of the student to a few prompts.

What is only shown never ends a run: an error while showing is logged once, and training goes on.
"""

import time
from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

from rich import get_console
from rich.console import Console, RenderableType
from rich.progress import Progress, ProgressColumn, Task
from rich.progress_bar import ProgressBar
from rich.table import Column, Table
from rich.text import Text
from transformers import TrainerCallback

from ..batch import Example
from ..budget import amount
from ..files import append_jsonl
from ..rollout import Writer
from ..step import Step
from ..terminal import escape, show, showing
from .callbacks import drop_lines_after
from .spending import Spending

_METRICS_OF_BAR = ("loss", "eval_loss", "forward_kl", "reverse_kl", "tokens_per_second")  # in order of importance
_SHORTEST_BAR, _LONGEST_BAR = 8, 40  # characters
_LONGEST_SAMPLE = 300  # characters of a text that are shown


class ShowSamples(TrainerCallback):
    """Responses of the student to the same prompts, every `every` steps, appended to a JSONL file.

    They are printed as often only where `shows_each`; `show_last` prints those of the trained student.
    """

    def __init__(
        self,
        writer: Writer,
        examples: Sequence[Example],
        tokenizer: Any,
        every: int,
        path: Path,
        console: Console | None = None,
        shows_each: bool = True,
    ) -> None:
        self.writer, self.examples, self.tokenizer = writer, list(examples), tokenizer
        self.every, self.path, self.shows_each = every, path, shows_each
        self.console = console or get_console()  # the progress bar's, so that they do not overwrite each other
        self._step, self._table = -1, Table.grid()  # of the newest samples

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            drop_lines_after(self.path, state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.every and state.global_step % self.every == 0:
            self._generate(args, state)
            if self.shows_each:
                self.show_last(args, state)

    def show_last(self, args: Any, state: Any) -> None:
        """Print the samples of the student as it is at this step."""
        if self._step != state.global_step:
            self._generate(args, state)
        if self._step == state.global_step and state.is_world_process_zero:
            with showing("samples of the student"):
                show(f"samples of the student after step {self._step}", self.console)
                self.console.print(self._table)

    def _generate(self, args: Any, state: Any) -> None:
        """Generate the samples of this step and append them to the file; they are only for looking at."""
        with showing("samples of the student"):
            responses = self.writer(self.examples, Step(0, args.seed), n=1) if self.examples else []
            if responses:
                self._step = state.global_step  # on every process: all of them generate again, or none
            if not state.is_world_process_zero or not responses:
                return
            table = Table.grid(Column(no_wrap=True, style="dim"), Column(overflow="fold"), padding=(0, 1))
            lines = []
            for example, sample in zip(self.examples, responses, strict=True):
                token_ids = {"prompt": example.prompt, "student": sample.response, "reference": example.response}
                texts = {n: self.tokenizer.decode(ids, skip_special_tokens=True) for n, ids in token_ids.items()}
                for name, text in texts.items():
                    table.add_row(name, Text(self._shortened(text)))
                table.add_row("", "")  # an empty line
                lines.append({"step": state.global_step, **texts})
            drop_lines_after(self.path, state.global_step - 1)  # those of this step, from before an interruption
            append_jsonl(self.path, *lines)
            self._table = table

    def _shortened(self, text: str) -> str:
        """The end of a text in one paragraph, with a sign where lines end."""
        text = text if len(text) <= _LONGEST_SAMPLE else "… " + text[2 - _LONGEST_SAMPLE :]
        sign = "⏎" if self.console.encoding.startswith("utf") else "\\n"
        return escape(text.strip("\n").replace("\n", f" {sign} "))


class ShowProgress(TrainerCallback):
    """A progress bar with remaining time and losses; where there is no terminal, a line for every logging step.

    Args:
        spending: with a budget, the total is the expected number of steps.
        bar: False for lines on a terminal too.
    """

    def __init__(self, console: Console | None = None, spending: Spending | None = None, bar: bool = True) -> None:
        self.spending, self.console = spending or Spending(), console or get_console()
        self.has_bar = bar and self.console.is_terminal and not self.console.is_dumb_terminal
        self.progress = Progress(_StepsAndLosses(self.console), console=self.console)
        self.task: Any = None
        self._start = time.perf_counter(), 0  # and the step at that time

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._start = time.perf_counter(), state.global_step
        if state.is_world_process_zero and self.has_bar:
            with showing("progress"):
                steps, total, spent = self._position(state)
                self.task = self.progress.add_task("distil", completed=steps, total=total, spent=spent, metrics={})
                self.progress.start()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.task is not None:
            with showing("progress"):
                steps, total, spent = self._position(state)
                self.progress.update(self.task, completed=steps, total=total, spent=spent)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **kwargs: Any) -> None:
        if not state.is_world_process_zero or "train_runtime" in logs:
            return
        numbers = {name: x for name, x in logs.items() if isinstance(x, int | float) and name != "epoch"}
        with showing("progress"):
            if self.task is not None:
                metrics = self.progress.tasks[self.task].fields["metrics"] | numbers
                self.progress.update(self.task, metrics=metrics)
            elif not self.has_bar:
                show("  ".join([self._line(state), *_words(numbers)]), self.console)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.close()

    def close(self) -> None:
        """End the bar, which restores the terminal's cursor."""
        with showing("progress"):
            if self.progress.live.is_started:
                self.progress.stop()

    def _position(self, state: Any) -> tuple[int, int, str]:
        """Steps done, steps expected, and the share of the budget that is spent."""
        steps, budget = state.global_step, self.spending.budget
        spent = "" if budget is None else f"{self.spending.share:.0%} of {amount({budget.kind: budget.limit})}"
        return steps, self.spending.expected_steps(steps, state.max_steps), spent

    def _line(self, state: Any) -> str:
        """Steps and remaining time as text."""
        steps, total, spent = self._position(state)
        start, first = self._start
        seconds = (time.perf_counter() - start) / max(steps - first, 1) * (total - steps)
        left = f"{_duration(seconds)} left" if steps < total else ""
        return "  ".join(filter(None, [f"step {steps}/{total}", left, spent]))


class _StepsAndLosses(ProgressColumn):
    """The whole line of a bar, as wide as the console; the fewer characters there are, the less stands behind the ETA.

    Steps and remaining time are always there; the bar itself and then, in order, losses, the budget and the rate have
    what is left.
    """

    def __init__(self, console: Console) -> None:
        super().__init__(Column(no_wrap=True))
        self.console = console

    def render(self, task: Task) -> RenderableType:
        remaining = "-:--:--" if task.time_remaining is None else _duration(task.time_remaining)
        total = int(task.total or 0)
        text = f"{int(task.completed)}/{total} {remaining if task.completed < total else _duration(task.elapsed or 0)}"
        metrics: dict[str, float] = task.fields["metrics"]
        speed = [f"{task.speed:.2f} steps/s"] if task.speed else []
        losses = _words({name: metrics[name] for name in _METRICS_OF_BAR if name in metrics})
        pieces = [*losses[:1], *filter(None, [task.fields["spent"]]), *speed, *losses[1:]]
        room = self.console.width - len(task.description) - _SHORTEST_BAR - 3
        for piece in pieces:
            if len(text) + len(piece) + 2 <= room:
                text += f"  {piece}"
        line = Table.grid(padding=(0, 1))
        width = min(room - len(text) + _SHORTEST_BAR, _LONGEST_BAR)
        if width < _SHORTEST_BAR:
            return Text(text, no_wrap=True, overflow="crop")
        bar = ProgressBar(total=max(total, 1), completed=task.completed, width=width)
        line.add_row(Text(task.description, style="bold"), bar, Text(text))
        return line


def _words(numbers: Mapping[str, float]) -> list[str]:
    return [f"{name} {value:.4g}" for name, value in numbers.items()]


def _duration(seconds: float) -> str:
    return str(timedelta(seconds=max(0, round(seconds))))

"""Trainer callbacks: schedules, budget, gradient check, metrics file."""

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from ..files import append_jsonl, read_jsonl, write_jsonl
from ..method import Method
from ..rollout import Rollout
from ..step import Step
from ..teacher import Teacher
from .hyperparameters import remedy
from .spending import Spending


class AfterStep(TrainerCallback):
    """Calls `after_step` of method and teacher after each optimizer step."""

    def __init__(self, parts: Mapping[str, Method | Teacher], spending: Spending) -> None:
        self.parts, self.spending = parts, spending

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        total = self.spending.expected_steps(state.global_step, state.max_steps)
        for part in self.parts.values():
            part.after_step(Step(state.global_step, args.seed, total))


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
                f"updated with it. {remedy(args.output_dir)}"
            )


class LogMetrics(TrainerCallback):
    """Appends every log line to a JSONL file; a resumed run first writes it anew as it was at its checkpoint."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_jsonl(self.path, [{"step": line["step"], **line} for line in state.log_history])

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **kwargs: Any) -> None:
        if state.is_world_process_zero:
            append_jsonl(self.path, {"step": state.global_step, **logs})


def drop_lines_after(path: Path, step: int) -> None:
    """Remove the lines of a JSONL file that are later than `step`, or have no step."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [line for line in read_jsonl(path) if isinstance(line.get("step"), int | float)]
    write_jsonl(path, [line for line in lines if line["step"] <= step])

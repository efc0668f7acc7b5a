"""Ctrl-C, SIGTERM and the end of a terminal end a run after its current step, with a checkpoint."""

import signal
import threading
from types import TracebackType
from typing import Any

import torch
from transformers import TrainerCallback

_NAMES = ("SIGINT", "SIGTERM", "SIGHUP")  # Windows has no SIGHUP


class Interrupted(Exception):
    """The run was stopped by a signal after saving a checkpoint, or at its end the student."""

    def __init__(self, step: int, number: int, finished: bool = False) -> None:
        after = "which was the last one: the run is finished" if finished else "the same command resumes from there"
        super().__init__(f"stopped after step {step}{',' if finished else ';'} {after}")
        self.exit_code = 128 + number


class StopOnSignal(TrainerCallback):
    """The first signal ends the run after the current step or evaluation, with a checkpoint; a second one at once.

    Use it as a context manager around training. Signals that are ignored, as by nohup, stay ignored. Several processes
    agree on the step at which they end, because a signal reaches them at different times.
    """

    def __init__(self) -> None:
        self.signal: int | None = None  # the one that ended the run
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "StopOnSignal":
        if threading.current_thread() is threading.main_thread():
            numbers = [int(getattr(signal, name)) for name in _NAMES if hasattr(signal, name)]
            handlers = {number: signal.getsignal(number) for number in numbers}
            self._previous = {
                number: handler for number, handler in handlers.items() if handler not in (signal.SIG_IGN, None)
            }
            for number in self._previous:
                signal.signal(number, self._note)
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._restore()

    def _note(self, number: int, frame: Any) -> None:
        self.signal = number
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.agree(args) is not None:
            control.should_save = control.should_training_stop = True

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """After the last step there is no further one that would save."""
        self.on_step_end(args, state, control)

    def agree(self, args: Any) -> int | None:
        """The signal that any of the processes has received, the same on all of them."""
        if args.world_size > 1:
            number = torch.tensor(self.signal or 0, device=args.device)
            torch.distributed.all_reduce(number, torch.distributed.ReduceOp.MAX)
            self.signal = int(number) or None
        return self.signal

    def let_through(self) -> None:
        """From now on a signal ends the process at once."""
        self._restore()

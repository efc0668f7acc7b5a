"""A teacher or a rollout outside the process that fails ends a run with a checkpoint of the last complete step.

The step in which it fails has changed more than its step number says: random numbers were drawn, tokens were counted,
and the method may have collected examples. So what a checkpoint saves of these is noted after every step, and restored.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from transformers import TrainerCallback

from ..method import Method
from ..rollout import Rollout
from ..teacher import Capability, Teacher, TeacherError
from .checkpoint import last_checkpoint, step_of
from .spending import Spending

if TYPE_CHECKING:
    from .trainer import StudentTrainer


def can_fail(teacher: Teacher | None, rollout: Rollout | None) -> bool:
    """Is the teacher or the rollout outside this process?"""
    return (teacher is not None and not teacher.can(Capability.MODEL)) or (rollout is not None and rollout.is_remote)


class NoteLastStep(TrainerCallback):
    """Notes after every step what the next one changes before its optimizer step."""

    def __init__(self, method: Method, spending: Spending) -> None:
        self.method, self.spending = method, spending
        self._step, self._state, self._tokens, self._random = -1, {}, 0, None

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._step, self._tokens = state.global_step, self.spending.tokens
        self._state = {name: tensor.clone() for name, tensor in self.method.state_dict().items()}
        self._random = torch.get_rng_state(), torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []

    def restore(self, step: int) -> None:
        """Return to the end of step `step`, unless another one was noted: in an evaluation nothing changes."""
        if self._step != step or self._random is None:
            return
        self.spending.tokens = self._tokens
        if self._state or self.method.state_dict():
            self.method.load_state_dict(self._state)
        torch.set_rng_state(self._random[0])
        torch.cuda.set_rng_state_all(self._random[1])


@contextmanager
def checkpoint_on_failure(trainer: "StudentTrainer") -> Iterator[None]:
    """Within this block a TeacherError is raised after saving a checkpoint, and says so.

    Of a run of several processes, only where all of them raise it, because they save together.
    """
    try:
        yield
    except TeacherError as error:
        if error.checkpoint or (trainer.accelerator.num_processes > 1 and not error.on_all_processes):
            raise
        step = trainer.state.global_step
        if step == 0:
            raise
        if step_of(last_checkpoint(str(trainer.args.output_dir)) or "") != step:
            for callback in trainer.callback_handler.callbacks:
                if isinstance(callback, NoteLastStep):
                    callback.restore(step)
            trainer._save_checkpoint(cast(Any, trainer.model), trial=None)
            trainer.control = trainer.callback_handler.on_save(trainer.args, trainer.state, trainer.control)
        path = Path(str(trainer.args.output_dir)) / f"checkpoint-{step}"
        message = f"{error}; stopped after step {step}, and the same command resumes from {path}"
        raise TeacherError(message, error.on_all_processes, str(path)) from error

"""The rollouts of a run, bound to the models that generate with them."""

from pathlib import Path
from typing import Any

from torch import nn

from ..method import Method
from ..rollout import Rollout, Writer, Writers
from ..sampling import Sampling
from ..teacher import Capability, Teacher


def bind_writers(
    student: nn.Module,
    teacher: Teacher | None,
    method: Method,
    tokenizer: Any,
    rollout: Rollout | None,
    sampling: Sampling,
    teacher_rollout: Rollout | None,
    folder: Path,
) -> Writers:
    """The models that generate responses: the student by `rollout`, the teacher by its own rollout or the same one.

    Raises:
        ValueError: if one that the method trains on is missing.
    """
    for each in (rollout, teacher_rollout):
        if each is not None:
            each.setup(folder)
    if teacher is not None and "teacher" in method.authors and teacher_rollout is None:
        teacher_rollout = teacher.rollout()
    if teacher is not None and "teacher" in method.authors and teacher.can(Capability.MODEL):
        if teacher_rollout is None and rollout is not None:
            teacher_rollout = rollout.bind(teacher.model, tokenizer, "teacher")
        elif teacher_rollout is not None and not teacher_rollout.is_bound:
            teacher_rollout = teacher_rollout.bind(teacher.model, tokenizer, "teacher")
    writers = Writers(
        None if rollout is None else Writer(rollout.bind(student, tokenizer), sampling),
        None if teacher_rollout is None else Writer(teacher_rollout, sampling),
    )
    writers.check(method.authors)
    return writers

"""Teachers, one file per kind; the file's name is the teacher's name in a recipe."""

from ..registry import Registry
from ..teacher import Capability, Teacher, covers, describe

TEACHERS: Registry[Teacher] = Registry("teacher", __name__, Teacher)


def check_provides(teacher: Teacher | None, required: frozenset[Capability], method: str) -> None:
    """Refuse a teacher that does not provide what a method requires.

    Raises:
        ValueError: naming what the method requires, and the teachers that provide it.
    """
    if covers(frozenset() if teacher is None else teacher.provides, required):
        return
    provided = "there is no teacher" if teacher is None else f"this teacher provides {describe(teacher.provides)}"
    suitable = [name for name in TEACHERS.builtin_names() if covers(TEACHERS.get(name).provides, required)]
    raise ValueError(
        f"{method} requires a teacher that provides {describe(required)}, and {provided}; choose another method, or "
        f"one of the teachers that provide it: {', '.join(suitable)}"
    )

"""Teachers, one file per kind; the file's name is the teacher's name in a recipe."""

from collections.abc import Set

from ..batch import Author
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
    classes = {name: TEACHERS.get(name) for name in TEACHERS.builtin_names()}
    suitable = [
        f"{name} with other arguments" if isinstance(teacher, cls) else name
        for name, cls in classes.items()
        if covers(cls.provides, required)
    ]
    raise ValueError(
        f"{method} requires a teacher that provides {describe(required)}, and {provided}; choose another method, or "
        f"one of the teachers that provide it: {', '.join(suitable)}"
    )


def check_scores_responses(teacher: Teacher | None, authors: Set[Author], method: str) -> None:
    """Refuse a teacher that has scores of stored examples only, where a method trains on responses generated anew.

    Raises:
        ValueError: naming the responses, with the remedy.
    """
    if teacher is None or teacher.scores_new_responses or not (new := authors - {"dataset", "corpus"}):
        return
    writers = " and ".join(sorted(new))
    raise ValueError(
        f"{method} trains on responses of the {writers} that are generated during the run, and this teacher has only "
        f"stored scores: write them before with `understudy cache … --responses {min(new)}` and train on its "
        "responses.jsonl with kd, or use a local teacher"
    )

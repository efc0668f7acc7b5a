"""Resolve names of the playground: models and tokenizers that ship with the package, and its generated datasets."""

from importlib import resources
from typing import Any

PREFIX = "playground:"
MODELS = {  # name → folder
    "arithmetic": "arithmetic_teacher",
    "arithmetic-student": "arithmetic_student",
    "both-student": "both_student",
    "contexts-student": "contexts_student",
    "instructions": "instructions_teacher",
    "instructions-student": "instructions_student",
}
DATASETS = ("arithmetic", "both", "contexts", "instructions")
ROWS = {"train": 100_000, "validation": 2_000, "test": 2_000, "unseen": 2_000}  # without a limit


def is_playground(name: str) -> bool:
    """Is this a name of the playground?

    Raises:
        ValueError: for an unknown one, with the known ones.
    """
    if not str(name).startswith(PREFIX):
        return False
    if name.removeprefix(PREFIX) not in {*MODELS, *DATASETS}:
        names = ", ".join(PREFIX + each for each in dict.fromkeys((*MODELS, *DATASETS)))
        raise ValueError(f"there is no {name!r}; the playground has {names}")
    return True


def resolve(name: str) -> str:
    """The folder of a model of the playground, with its tokenizer; any other name unchanged.

    `playground:arithmetic` is the teacher, `playground:arithmetic-student` the warm start of a small student.

    Raises:
        ValueError: for the name of a dataset alone.
    """
    if not is_playground(name):
        return name
    if name.removeprefix(PREFIX) not in MODELS:
        raise ValueError(f"{name} is a dataset, not a model: use {name}-student")
    return str(resources.files("understudy.playground") / MODELS[name.removeprefix(PREFIX)])


def rows(name: str, split: str = "train", seed: int = 0, limit: int | None = None) -> list[dict[str, Any]]:
    """A task's rows, with prompt and completion; those of the instructions also with their kind, contexts with theirs.

    Raises:
        ValueError: for the name of a student, and an unknown split.
    """
    assert is_playground(name)
    if name.removeprefix(PREFIX) not in DATASETS:
        raise ValueError(f"{name} is a model, not a dataset: use {name.removesuffix('-student')}")
    splits = [split for split in ROWS if split != "unseen" or name == "playground:instructions"]
    if split not in splits:
        raise ValueError(f"{name} has no split {split!r}; it has {', '.join(splits)}")
    if name == "playground:instructions":
        from .instructions.rows import instructions as generate
    elif name == "playground:both":
        from .both import both_tasks as generate
    elif name == "playground:contexts":
        from .contexts import problems_in_context as generate
    else:
        from .arithmetic import problems as generate
    return generate(limit or ROWS[split], seed, split)  # type: ignore[arg-type]

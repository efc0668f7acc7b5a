"""Resolve names of the playground: models and tokenizers that ship with the package, and its generated datasets."""

from importlib import resources
from typing import Any

PREFIX = "playground:"
MODELS = {  # name → folder; a name without -student is a dataset as well
    "arithmetic": "arithmetic_teacher",
    "arithmetic-student": "arithmetic_student",
    "instructions": "instructions_teacher",
    "instructions-student": "instructions_student",
}
ROWS = {"train": 100_000, "validation": 2_000, "test": 2_000, "unseen": 2_000}  # without a limit


def is_playground(name: str) -> bool:
    """Is this a name of the playground?

    Raises:
        ValueError: for an unknown one, with the known ones.
    """
    if not str(name).startswith(PREFIX):
        return False
    if name.removeprefix(PREFIX) not in MODELS:
        raise ValueError(f"there is no {name!r}; the playground has {', '.join(PREFIX + model for model in MODELS)}")
    return True


def resolve(name: str) -> str:
    """The folder of a model of the playground, with its tokenizer; any other name unchanged.

    `playground:arithmetic` is the teacher, `playground:arithmetic-student` the warm start of a small student.
    """
    if not is_playground(name):
        return name
    return str(resources.files("understudy.playground") / MODELS[name.removeprefix(PREFIX)])


def rows(name: str, split: str = "train", seed: int = 0, limit: int | None = None) -> list[dict[str, Any]]:
    """A task's rows, with prompt and completion; those of the instructions also with their kind.

    Raises:
        ValueError: for the name of a student, and an unknown split.
    """
    assert is_playground(name)
    if name.endswith("-student"):
        raise ValueError(f"{name} is a model, not a dataset: use {name.removesuffix('-student')}")
    splits = [split for split in ROWS if split != "unseen" or name == "playground:instructions"]
    if split not in splits:
        raise ValueError(f"{name} has no split {split!r}; it has {', '.join(splits)}")
    if name == "playground:instructions":
        from .instructions.rows import instructions as generate
    else:
        from .arithmetic import problems as generate
    return generate(limit or ROWS[split], seed, split)  # type: ignore[arg-type]

"""Resolve the name `playground:arithmetic`, which may stand for a model, a tokenizer or a dataset."""

from importlib import resources
from typing import Any, cast

PREFIX = "playground:"
TASKS = ("arithmetic",)
PROBLEMS = {"train": 100_000, "validation": 2_000, "test": 2_000}  # without a limit


def is_playground(name: str) -> bool:
    """Is this a name of the playground?

    Raises:
        ValueError: for an unknown task of the playground, with the known ones.
    """
    if not str(name).startswith(PREFIX):
        return False
    if name.removeprefix(PREFIX) not in TASKS:
        raise ValueError(
            f"there is no {name!r}; the playground's tasks are {', '.join(PREFIX + task for task in TASKS)}"
        )
    return True


def resolve(name: str) -> str:
    """The folder of the playground's teacher and tokenizer for a name of the playground; any other name unchanged."""
    return (
        str(resources.files("understudy.playground") / f"{name.removeprefix(PREFIX)}_teacher")
        if is_playground(name)
        else name
    )


def rows(name: str, split: str = "train", seed: int = 0, limit: int | None = None) -> list[dict[str, Any]]:
    """A task's problems as dataset rows with prompt and completion."""
    from .arithmetic import Split, problems

    assert is_playground(name)
    if split not in PROBLEMS:
        raise ValueError(f"the playground has no split {split!r}; it has {', '.join(PROBLEMS)}")
    return problems(limit or PROBLEMS[split], seed, cast(Split, split))

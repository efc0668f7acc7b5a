"""What `playground:arithmetic` means wherever a model, a tokenizer or a dataset may be named."""

from importlib import resources
from typing import Any, cast

PREFIX = "playground:"
TASKS = ("arithmetic",)
PROBLEMS = {"train": 100_000, "validation": 2_000, "test": 2_000}  # where no limit is given


def is_playground(name: str) -> bool:
    """Does the name mean something of the playground? An unknown task of it is an error.

    Raises:
        ValueError: naming the tasks there are.
    """
    if not str(name).startswith(PREFIX):
        return False
    if name.removeprefix(PREFIX) not in TASKS:
        raise ValueError(
            f"there is no {name!r}; the playground's tasks are {', '.join(PREFIX + task for task in TASKS)}"
        )
    return True


def resolve(name: str) -> str:
    """The folder of the playground's teacher and tokenizer for a name of the playground; any other name as it is."""
    return (
        str(resources.files("understudy.playground") / f"{name.removeprefix(PREFIX)}_teacher")
        if is_playground(name)
        else name
    )


def rows(name: str, split: str = "train", seed: int = 0, limit: int | None = None) -> list[dict[str, Any]]:
    """Problems of a task, as rows with a prompt and a completion."""
    from .arithmetic import Split, problems

    assert is_playground(name)
    if split not in PROBLEMS:
        raise ValueError(f"the playground has no split {split!r}; it has {', '.join(PROBLEMS)}")
    return problems(limit or PROBLEMS[split], seed, cast(Split, split))

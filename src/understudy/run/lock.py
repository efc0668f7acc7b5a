"""The lock of a run's folder: one process at a time trains there. The lock of a killed process is released."""

from collections.abc import Iterator
from contextlib import contextmanager

from filelock import FileLock, Timeout

from ..recipe import Recipe
from .folder import RunFolder


@contextmanager
def locked(folder: RunFolder, recipe: Recipe) -> Iterator[None]:
    """Lock the folder, which is created if it is missing.

    Raises:
        RecipeError: while another process trains there.
    """
    folder.path.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder.lock, timeout=0)
    try:
        lock.acquire()
    except Timeout:
        message = f"another process is training in {folder.path}: wait until it has ended, or give another"
        raise recipe.error("training.output_dir", f"{message} training.output_dir") from None
    try:
        yield
    finally:
        lock.release()


def check_unlocked(folder: RunFolder, recipe: Recipe) -> None:
    """Refuse a folder in which another process trains, before anything is loaded."""
    if folder.lock.exists():
        with locked(folder, recipe):
            pass

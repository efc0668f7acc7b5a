"""Finding instances of an idea by their file's name: methods, teachers, rollouts. Adding one is adding a file."""

import difflib
from collections.abc import Iterable
from importlib import import_module, resources
from typing import Generic, TypeVar

T = TypeVar("T")


class UnknownName(ValueError):
    """A name that belongs to nothing, with the nearest one that does."""


class Registry(Generic[T]):
    """The modules of one package, each of which defines exactly one final subclass of `base`."""

    def __init__(self, noun: str, package: str, base: type[T]) -> None:
        self.noun, self.package, self.base = noun, package, base

    def names(self) -> list[str]:
        """The file names, without importing any of them."""
        files = resources.files(self.package).iterdir()
        return sorted(
            f.name.removesuffix(".py") for f in files if f.name.endswith(".py") and not f.name.startswith("_")
        )

    def get(self, name: str) -> type[T]:
        """The class of the file `name`.

        Raises:
            UnknownName: if there is no such file; names the nearest match.
        """
        if name not in self.names():
            raise UnknownName(f'there is no {self.noun} "{name}"{nearest(name, self.names())}')
        module = import_module(f"{self.package}.{name}")
        [found] = [
            x
            for x in vars(module).values()
            if isinstance(x, type) and issubclass(x, self.base) and x.__module__ == module.__name__
        ]
        return found


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The end of a sentence about an unknown name: what was probably meant, or nothing where no known name is near."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.65)
    return f'; did you mean "{close[0]}"?' if close else ""


def nearest(name: str, known: Iterable[str]) -> str:
    """As `did_you_mean`, but where nothing is near, what there is."""
    known = sorted(known)
    return did_you_mean(name, known) or f"; there {'are' if len(known) > 1 else 'is'}: {', '.join(known)}"

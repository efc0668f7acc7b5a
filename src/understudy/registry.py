"""Finding instances of an idea by their file's name: methods, teachers, rollouts. Adding one is adding a file."""

import difflib
from importlib import import_module, resources
from typing import Generic, TypeVar

T = TypeVar("T")


class Registry(Generic[T]):
    """The modules of one package, each of which defines exactly one final subclass of `base`."""

    def __init__(self, noun: str, package: str, base: type[T]) -> None:
        self.noun, self.package, self.base = noun, package, base

    def names(self) -> list[str]:
        """The file names, without importing any of them."""
        files = resources.files(self.package).iterdir()
        return sorted(f.name.removesuffix(".py") for f in files if f.name.endswith(".py") and not f.name.startswith("_"))

    def get(self, name: str) -> type[T]:
        """The class of the file `name`.

        Raises:
            ValueError: if there is no such file; names the nearest match.
        """
        if name not in self.names():
            raise ValueError(f"there is no {self.noun} {name!r}{nearest(name, self.names())}")
        module = import_module(f"{self.package}.{name}")
        [found] = [
            x
            for x in vars(module).values()
            if isinstance(x, type) and issubclass(x, self.base) and x.__module__ == module.__name__
        ]
        return found


def nearest(name: str, known: list[str]) -> str:
    """The end of a sentence about an unknown name: what was probably meant, or what there is."""
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return f"; did you mean {close[0]!r}?" if close else f"; there are: {', '.join(sorted(known))}"

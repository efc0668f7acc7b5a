"""Find a class by the name that a recipe gives it: methods, teachers, rollouts, metrics and divergences.

A name is one of three things:

    gkd                   a class of this package; adding one is adding a file
    my_module:MyMethod    a class of your own; the module is installed or lies in the working directory
    their_method          an entry point of an installed package, in the group understudy.methods
"""

import difflib
import importlib
import importlib.metadata
import inspect
import logging
import os
import re
import sys
from collections.abc import Iterable
from contextlib import suppress
from functools import reduce
from importlib import resources
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Generic, TypeVar, get_origin

logger = logging.getLogger(__name__)

T = TypeVar("T")


class UnknownName(ValueError):
    """An unknown class name; the message is one sentence with the remedy."""


class Registry(Generic[T]):
    """The final subclasses of `base` that a recipe can name.

    Args:
        noun: the kind of class, such as "method", for errors; the entry points' group is `understudy.<noun>s`.
        package: a package in which every module defines one class, named after the module; or a single module that
            defines all classes, where JensenShannon is named jensen_shannon.
    """

    def __init__(self, noun: str, package: str, base: type[T]) -> None:
        self.noun, self.package, self.base = noun, package, base

    def names(self) -> list[str]:
        """The names of this package's classes and of entry points. No file of a package is imported."""
        return sorted({*self.builtin_names(), *self._entry_points()})

    def builtin_names(self) -> list[str]:
        """The names of this package's classes alone."""
        if not self._is_package():
            return sorted(snake_case(cls.__name__) for cls in self._classes(self.package))
        files = resources.files(self.package).iterdir()
        return sorted(
            f.name.removesuffix(".py") for f in files if f.name.endswith(".py") and not f.name.startswith("_")
        )

    def get(self, name: str) -> type[T]:
        """The class of that name. A class of this package takes precedence over an entry point of the same name.

        Raises:
            UnknownName: if there is no such name (with the nearest one), if it cannot be imported, or if it is not a
                concrete subclass of `base`.
        """
        if ":" in name:
            return self._checked(import_object(name, self.noun, "class"), name)
        entry_points = self._entry_points()
        if name in self.builtin_names():
            if name in entry_points:
                message = 'the %s "%s" is built into understudy, so the entry point %s of that name is not used: '
                message += "write the latter in the recipe to use it"
                logger.warning(message, self.noun, name, entry_points[name])
            return self._builtin(name)
        if name not in entry_points:
            raise UnknownName(f'there is no {self.noun} "{name}"{nearest(name, self.names())}')
        return self._checked(import_object(entry_points[name], self.noun, "class"), entry_points[name])

    def _is_package(self) -> bool:
        spec = find_spec(self.package)
        return spec is not None and spec.submodule_search_locations is not None

    def _builtin(self, name: str) -> type[T]:
        if self._is_package():
            [cls] = self._classes(f"{self.package}.{name}")
            return cls
        return next(cls for cls in self._classes(self.package) if snake_case(cls.__name__) == name)

    def _classes(self, module: str) -> list[type[T]]:
        """The subclasses of `base` that the module itself defines, without abstract ones."""
        content = [x for x in vars(importlib.import_module(module)).values() if is_class(x)]
        defined = [x for x in content if x.__module__ == module and issubclass(x, self.base)]
        return [x for x in defined if not inspect.isabstract(x)]

    def _entry_points(self) -> dict[str, str]:
        """The entry points of installed packages: from the name to `module:Class`."""
        group = importlib.metadata.entry_points(group=f"understudy.{self.noun}s")
        return {entry.name: f"{entry.module}:{entry.attr}" for entry in group}

    def _checked(self, value: Any, name: str) -> type[T]:
        base = f"{self.base.__module__}.{self.base.__name__}"
        if not is_class(value) or not issubclass(value, self.base):
            raise UnknownName(f"the {self.noun} {name} is not a subclass of {base}: derive it from that class")
        if inspect.isabstract(value):
            missing = " and ".join(sorted(value.__abstractmethods__))  # type: ignore[attr-defined]
            raise UnknownName(f"the {self.noun} {name} is abstract: define {missing}, as {base} asks for")
        return value


def is_class(value: Any) -> bool:
    """Is this a class? In Python 3.10 `list[int]` is an instance of `type` as well, and no class."""
    return isinstance(value, type) and get_origin(value) is None


def import_object(path: str, noun: str, kind: str) -> Any:
    """Import an object by `module:name`. The module may lie in the working directory.

    Args:
        noun: the object's role, such as "reward function"; for errors.
        kind: its kind in Python, "class" or "function"; for errors.

    Raises:
        UnknownName: if there is no such module or no such name in it, or if importing the module fails.
    """
    module_name, _, name = path.partition(":")
    if not module_name or not name:
        raise UnknownName(f'a {noun} is written module:{kind}, not "{path}"')
    directory = os.getcwd()
    sys.path.insert(0, directory)
    try:
        importlib.invalidate_caches()  # the file may be newer than Python's cached listing of its folder
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        reason = str(error)
        if error.name is not None and f"{module_name}.".startswith(f"{error.name}."):
            guess = did_you_mean(module_name, [file.stem for file in Path(directory).glob("*.py")])
            reason = f'there is no module "{error.name}" in {directory} or among the installed ones{guess}'
        raise UnknownName(f"the {noun} {path} cannot be imported: {reason}") from error
    except Exception as error:
        kind_of_error = "" if isinstance(error, ImportError) else f"{type(error).__name__}: "
        raise UnknownName(f"the {noun} {path} cannot be imported: {kind_of_error}{error}") from error
    finally:
        with suppress(ValueError):
            sys.path.remove(directory)
    try:
        return reduce(getattr, name.split("."), module)
    except AttributeError:
        guess = did_you_mean(name, vars(module))
        raise UnknownName(f'the module {module_name} has no {kind} "{name}"{guess}') from None


def snake_case(name: str) -> str:
    """JensenShannon → jensen_shannon, ForwardKL → forward_kl."""
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower()


def did_you_mean(name: str, known_names: Iterable[str]) -> str:
    """The end of an error about an unknown name: the nearest known name, or an empty string where none is near."""
    close = difflib.get_close_matches(name, list(known_names), n=1, cutoff=0.65)
    return f'; did you mean "{close[0]}"?' if close else ""


def nearest(name: str, known_names: Iterable[str]) -> str:
    """As `did_you_mean`, but where nothing is near, every known name."""
    names = sorted(known_names)
    return did_you_mean(name, names) or f"; there {'are' if len(names) > 1 else 'is'}: {', '.join(names)}"

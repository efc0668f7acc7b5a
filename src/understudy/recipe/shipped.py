"""The recipes that come with the package, by name: `playground/gkd`."""

import os
from importlib import resources
from pathlib import Path

from ..registry import did_you_mean, nearest
from .yaml_text import RecipeError


def folder() -> Path:
    """The folder of recipes: inside the installed package, or at the root of a checkout."""
    package = Path(str(resources.files("understudy")))
    installed = package / "recipes"
    return installed if installed.exists() else package.parents[1] / "recipes"


def names() -> list[str]:
    """The names of all recipes: paths in the folder, without their ending."""
    root = folder()
    return sorted(path.relative_to(root).with_suffix("").as_posix() for path in root.rglob("*.yaml"))


def named(name: str) -> Path:
    """The file of a shipped recipe.

    Raises:
        RecipeError: if there is none of that name, with the nearest one.
    """
    if _plain(name) not in names():
        raise RecipeError(f'there is no recipe "{name}" among those that come with understudy{nearest(name, names())}')
    return folder() / f"{_plain(name)}.yaml"


def locate(path: str | Path) -> Path:
    """The file that a path names: itself, or the shipped recipe of that name where there is no such file.

    So `playground/gkd` and `recipes/playground/gkd.yaml` name the same recipe in every working directory.

    Raises:
        RecipeError: for a name that is nearly one of a shipped recipe.
    """
    path = Path(path)
    if os.path.exists(path) or path.is_absolute():
        return path
    name = _plain(path.as_posix())
    if name in names():
        return named(name)
    if hint := did_you_mean(name, names()):
        raise RecipeError(f"there is no recipe {path}{hint}")
    return path


def _plain(name: str) -> str:
    return name.removeprefix("recipes/").removesuffix(".yaml")

"""A recipe as it is written: a YAML file and overrides, as one dictionary that knows the place of every key."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

Places = dict[tuple[str, ...], str]  # where every key was given: "gkd.yaml, line 3"


class RecipeError(ValueError):
    """What is wrong with a recipe, in one sentence that names the place and the remedy."""

    def __init__(self, message: str, key: str = "", located: bool = False) -> None:
        super().__init__(message)
        self.key = key  # dotted, where the complaint is about one
        self.located = located  # does the message say already where that key was given?


def read(path: str | Path, overrides: Sequence[str] = ()) -> tuple[dict[str, Any], Places]:
    """The content of a YAML file with dotted overrides, `key.key=value`, applied; and where each key was given.

    Raises:
        RecipeError: if there is no such file, if it holds no YAML or no mapping, and for what is no override.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise RecipeError(f"there is no recipe {path}; recipes are YAML files, see the folder recipes/") from None
    except IsADirectoryError:
        raise RecipeError(f"the recipe {path} is a folder; name one of the YAML files in it") from None
    except OSError as error:
        raise RecipeError(f"the recipe {path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise RecipeError(f"{path}, line {line}: this is not valid UTF-8; save the file with that encoding") from None
    try:
        content, lines = _read_yaml(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or error
        raise RecipeError(f"{path}{where}: this cannot be read as YAML: {problem}") from None
    if not isinstance(content, dict):
        found = "it is empty" if content is None else f"this is {content!r:.40}"
        raise RecipeError(f"{path}: {found}; a recipe is a mapping such as `student: {{model: …}}`, line by line")
    places = {key: f"{path}, line {line}" for key, line in lines.items()}
    for override in overrides:
        _override(content, places, override)
    return content, places


def place(source: str, places: Places, path: tuple[str, ...]) -> str:
    """Where the key was given, or the nearest key above it that was."""
    return next((places[path[:n]] for n in range(len(path), 0, -1) if path[:n] in places), source)


class _Loader(yaml.SafeLoader):
    """YAML 1.1 with 1e-5 as a number, as everybody means it."""


_Loader.yaml_implicit_resolvers = dict(yaml.SafeLoader.yaml_implicit_resolvers)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+0123456789.")
)


def _read_yaml(text: str) -> tuple[Any, dict[tuple[str, ...], int]]:
    """The content, and the line of every key, counted from 1. A key given twice is an error."""
    lines: dict[tuple[str, ...], int] = {}

    def visit(node: Any, path: tuple[str, ...]) -> None:
        for key, value in node.value if isinstance(node, yaml.MappingNode) else ():
            here = (*path, str(key.value))
            if here in lines:
                problem = f'the key "{key.value}" stands here for the second time, after line {lines[here]}; keep one'
                raise yaml.MarkedYAMLError(problem=problem, problem_mark=key.start_mark)
            if value is node or len(here) > 20:
                raise yaml.MarkedYAMLError(problem="a block that is inside itself", problem_mark=key.start_mark)
            lines[here] = key.start_mark.line + 1
            visit(value, here)

    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        visit(node, ())
        return (loader.construct_document(node) if node is not None else None), lines
    finally:
        loader.dispose()


def value_of(text: str) -> Any:
    """What an override's value means: YAML, or the text itself where it is none."""
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError:
        return text


def _override(content: dict[str, Any], places: Places, override: str) -> None:
    """Set one value in `content`, making the blocks above it, and note in `places` where it comes from."""
    key, separator, text = override.partition("=")
    path = tuple(key.strip().split("."))
    if not separator or not all(path):
        raise RecipeError(f'"{override}" is no override; write key.key=value, such as training.max_steps=100')
    value = value_of(text)
    here = content
    for depth, parent in enumerate(path[:-1]):
        below = here.get(parent)
        if depth == 0 and parent in ("teacher", "method", "rollout"):
            below = _instance_of(below, path[1], override)
        if below is None:
            below = {}
            places.setdefault(path[: depth + 1], f'the override "{override}"')
        if not isinstance(below, dict):
            above = ".".join(path[: depth + 1])
            raise RecipeError(f'the override "{override}" goes below {above}, which is {below!r} and has no fields')
        here[parent] = below
        here = below
    here[path[-1]] = value
    for old in [p for p in places if p[: len(path)] == path]:
        del places[old]
    places[path] = f'the override "{override}"'


def _instance_of(chosen: Any, name: str, override: str) -> Any:
    """The block of a teacher, method or rollout as a mapping, if it is the one called `name`."""
    if isinstance(chosen, str):
        chosen = {chosen: {}}
    if isinstance(chosen, dict) and chosen and name not in chosen:
        [*others] = chosen
        word = override.partition(".")[0]
        raise RecipeError(
            f'the override "{override}" is for {name}, and the {word} is {others[0]}; '
            f'to change the {word} put "{word}={name}" before it'
        )
    return chosen

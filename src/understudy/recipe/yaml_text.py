"""Read a recipe's YAML file and apply overrides from the command line, with the file and line of every key."""

import stat
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from .yaml_nodes import LARGEST_FILE, RefusedYAML, read_yaml

CLASS_KEYS = ("method", "teacher", "rollout")  # the keys whose value names a class
Places = dict[tuple[str, ...], str]  # from each key's path to where it is set: "gkd.yaml, line 3"


class RecipeError(ValueError):
    """A mistake in a recipe, as one sentence with the place and the remedy."""

    def __init__(self, message: str, key: str = "", located: bool = False) -> None:
        super().__init__(message)
        self.key = key  # dotted, if the error is about one
        self.located = located  # does the message contain the file and line of the key?


def read(path: str | Path, overrides: Sequence[str] = ()) -> tuple[dict[str, Any], Places]:
    """The content of a YAML file with dotted overrides, `key.key=value`, applied; and the place of each key.

    Raises:
        RecipeError: if there is no such file, if it is not a YAML mapping, and for an override that cannot be read.
    """
    path = Path(path)
    try:
        content, lines = read_yaml(_text(path))
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or error
        reason = problem if isinstance(error, RefusedYAML) else f"this cannot be read as YAML: {problem}"
        raise RecipeError(f"{path}{where}: {reason}") from None
    if not isinstance(content, dict):
        problem = "it is empty" if content is None else f"this is {content!r:.40}"
        raise RecipeError(f"{path}: {problem}; a recipe is a mapping such as `student: {{model: …}}`, line by line")
    places = {key: f"{path}, line {line}" for key, line in lines.items()}
    for override in overrides:
        _override(content, places, override)
    return content, places


def place(source: str, places: Places, key: str) -> str:
    """Where a dotted key is set, or the nearest key above it that is. Parts of the key may hold dots themselves."""
    above = [path for path in places if f"{key}.".startswith(".".join(path) + ".")]
    return places[max(above, key=len)] if above else source


def _text(path: Path) -> str:
    """The text of a recipe's file, which is a regular file of limited size.

    Raises:
        RecipeError: if there is no such file, or it is too large or no text.
    """
    try:
        kind = path.stat()
        if not stat.S_ISREG(kind.st_mode) and not stat.S_ISDIR(kind.st_mode):  # a pipe or a device may never end
            raise RecipeError(f"the recipe {path} is no regular file; save the recipe in one")
        if stat.S_ISREG(kind.st_mode) and kind.st_size > LARGEST_FILE:
            raise RecipeError(f"the recipe {path} has more than {LARGEST_FILE:,} bytes; a recipe is a short YAML file")
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        message = f"there is no recipe {path}; recipes are YAML files, or names that `understudy recipes` lists"
        raise RecipeError(message) from None
    except IsADirectoryError:
        raise RecipeError(f"the recipe {path} is a folder; name one of the YAML files in it") from None
    except (OSError, ValueError) as error:
        if isinstance(error, RecipeError):
            raise
        if isinstance(error, UnicodeDecodeError):
            line = error.object.count(b"\n", 0, error.start) + 1
            message = f"{path}, line {line}: this is not valid UTF-8; save the file with that encoding"
            raise RecipeError(message) from None
        reason = getattr(error, "strerror", None) or error
        raise RecipeError(f"the recipe {path} cannot be read: {reason}") from None


def value_of(text: str) -> Any:
    """Parse an override's value: as YAML, or as plain text where it is not valid YAML.

    Raises:
        RecipeError: for YAML that is refused, such as a number that is not finite.
    """
    try:
        return read_yaml(text)[0]
    except RefusedYAML as error:
        raise RecipeError(f"the value {text!r:.60} cannot be used: {error.problem}") from None
    except yaml.YAMLError:
        return text


def _override(content: dict[str, Any], places: Places, override: str) -> None:
    """Set one value in `content`, with the blocks above it, and record the override as its place."""
    key, separator, text = override.partition("=")
    parts = key.strip().split(".")
    if not separator or not all(parts):
        raise RecipeError(f'"{override}" is not an override; write key.key=value, such as training.max_steps=100')
    value = value_of(text)
    path: tuple[str, ...] = ()
    block = content
    while True:
        size = _key_size(parts, path, block)
        path, parts = (*path, ".".join(parts[:size])), parts[size:]
        if not parts:
            break
        below = block.get(path[-1])
        if len(path) == 1 and path[0] in CLASS_KEYS:
            below = _fields_of_class(below, parts, override)
        if below is None:
            below = {}
            places.setdefault(path, f'the override "{override}"')
        if not isinstance(below, dict):
            above = ".".join(path)
            raise RecipeError(
                f'the override "{override}" sets a field of {above}, which is {below!r} and has none: override {above}'
            )
        block[path[-1]] = below
        block = below
    block[path[-1]] = value
    for old in [p for p in places if p[: len(path)] == path]:
        del places[old]
    places[path] = f'the override "{override}"'


def _key_size(parts: list[str], path: tuple[str, ...], block: dict[str, Any]) -> int:
    """How many of an override's dotted parts make up its next key, below the keys `path`.

    A key that the block has already is matched as a whole, dots included. A new key is one part, except the name of a
    class or function, which extends to the part with its colon: `my.package.module:MyClass`. Such names are directly
    below `method`, `teacher` and `rollout`, below their fields, and in reward.functions.
    """
    for size in range(len(parts), 0, -1):
        if ".".join(parts[:size]) in block:
            return size
    is_name = path == ("reward", "functions") or (len(path) % 2 == 1 and path[0] in CLASS_KEYS)
    colons = [index for index, part in enumerate(parts) if ":" in part]
    return colons[0] + 1 if is_name and colons else 1


def _fields_of_class(block: Any, parts: list[str], override: str) -> Any:
    """The block of a teacher, method or rollout as a mapping, if the override is for the class that it names."""
    if isinstance(block, str):
        block = {block: {}}
    if isinstance(block, dict) and block:
        name = ".".join(parts[: _key_size(parts, (CLASS_KEYS[0],), block)])
        if name not in block:
            key = override.partition(".")[0]
            raise RecipeError(
                f'the override "{override}" is for {name}, and the {key} is {next(iter(block))}; '
                f'to change the {key} put "{key}={name}" before it'
            )
    return block

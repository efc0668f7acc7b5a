"""A recipe: a run completely described, in one YAML file with seven words.

    student, teacher, method, rollout, data, training, evaluate

The one idea: nothing is declared twice. `name: {fields}` selects an instance by its file's name, and its fields are the
constructor's arguments; `training` is transformers' TrainingArguments, `peft` is LoraConfig. Every key is known or an
error with the line and the nearest match. This file reads and checks; `run.py` builds. It imports no torch.
"""

import inspect
import re
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, PrivateAttr, TypeAdapter, ValidationError, field_validator, model_validator

from .registry import Registry, nearest


class RecipeError(ValueError):
    """What is wrong with a recipe, in one sentence that names the place and the remedy."""

    def __init__(self, message: str, key: str = "") -> None:
        super().__init__(message)
        self.key = key  # dotted, where the complaint is about one


class _Block(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Student(_Block):
    """A model by name or folder; or a fresh one, or one cut from the teacher."""

    model: str | None = None
    fresh: dict[str, Any] | None = None  # fields of the teacher's configuration to change; random weights
    layers: list[int] | None = None  # the teacher's layers to keep, with their weights
    peft: dict[str, Any] | None = None  # LoraConfig
    merge: bool = False  # save adapters merged into the model
    dtype: str = "float32"
    options: dict[str, Any] = {}  # further arguments of from_pretrained
    tokenizer: str | None = None  # default: the student's own, or the teacher's for one that is fresh or cut

    @model_validator(mode="after")
    def _one_origin(self) -> "Student":
        given = [name for name in ("model", "fresh", "layers") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"a student comes from exactly one of model, fresh or layers, not {' and '.join(given) or 'none'}")
        if self.merge and self.peft is None:
            raise ValueError("merge is for adapters: give the student a peft block")
        return self


class Data(_Block):
    """What to train on; see `data.load_examples` for the fields."""

    dataset: str
    split: str = "train"
    name: str | None = None
    columns: dict[str, str] | None = None
    template: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    max_length: int = 512
    max_prompt_length: int | None = None
    text_prompt: int = 32
    on_bad_row: Literal["error", "skip"] = "error"
    on_long_prompt: Literal["cut", "skip", "error"] = "cut"
    limit: int | None = None
    seed: int = 0  # of a playground's problems


class Evaluate(_Block):
    """What to look at: a held-out dataset, read like `data` where not said otherwise, and answers to show."""

    dataset: str | None = None
    split: str = "test"
    name: str | None = None
    limit: int | None = 500
    show: int = 3  # answers of the student shown as it learns
    show_every: int | None = None  # steps between; default: a fifth of the run


class Recipe(_Block):
    """The seven words. `method`, `teacher` and `rollout` are kept as (name, fields) until they are built."""

    student: Student
    teacher: tuple[str, dict[str, Any]] | None = None
    method: tuple[str, dict[str, Any]]
    rollout: tuple[str, dict[str, Any]] = ("generate", {})
    data: Data
    training: dict[str, Any] = {}
    evaluate: Evaluate = Evaluate()

    _source: str = PrivateAttr("recipe")
    _lines: Mapping[tuple[str, ...], int] = PrivateAttr({})

    @field_validator("teacher", "method", "rollout", mode="before")
    @classmethod
    def _named(cls, value: Any) -> Any:
        return named(value) if value is not None else None

    def build(self, word: str, registry: Registry[Any], **given: Any) -> Any:
        """The instance that `method`, `teacher` or `rollout` describes; `given` are arguments that no recipe sets."""
        name, fields = getattr(self, word)
        try:
            found = registry.get(name)
        except ValueError as error:
            raise self.complaint(word, str(error)) from None
        try:
            return construct(found, fields, f"{word}.{name}", **given)
        except RecipeError as error:
            raise self.complaint(error.key or word, str(error)) from None

    @property
    def name(self) -> str:
        """The recipe's file name without its ending, or "recipe"."""
        return Path(self._source).stem

    def complaint(self, key: str, message: str) -> RecipeError:
        """An error about a dotted key, with the line it stands in."""
        return RecipeError(f"{_place(self._source, self._lines, tuple(key.split('.')))}: {message}", key)

    def resolved(self) -> dict[str, Any]:
        """The recipe as a dictionary that `parse` reads back to the same one."""
        plain = self.model_dump(exclude_none=True)
        return plain | {key: {plain[key][0]: plain[key][1]} for key in ("teacher", "method", "rollout") if key in plain}


def named(value: Any) -> tuple[str, dict[str, Any]]:
    """`name` or `{name: {fields}}` as (name, fields)."""
    if isinstance(value, str):
        return value, {}
    if isinstance(value, tuple):
        return value
    if isinstance(value, Mapping) and len(value) == 1:
        [(name, fields)] = value.items()
        if fields is None or isinstance(fields, Mapping):
            return str(name), dict(fields or {})
    raise ValueError("write one name, or one name with its fields: `gkd` or `gkd: {on_policy: 0.5}`")


def load(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe and apply dotted overrides, `key.key=value`, whose values are YAML.

    Raises:
        RecipeError: for anything that is not a recipe, naming the file, the line and the remedy.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise RecipeError(f"there is no recipe {path}; recipes are YAML files, see the folder recipes/") from None
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"the recipe {path} cannot be read: {error}") from None
    try:
        content, lines = _read_yaml(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        raise RecipeError(f"{path}{where}: this is not YAML ({getattr(error, 'problem', error)})") from None
    if not isinstance(content, dict):
        raise RecipeError(f"{path}: a recipe is a mapping with the keys {', '.join(Recipe.model_fields)}")
    for override in overrides:
        _override(content, override)
    return parse(content, str(path), lines)


def parse(content: dict[str, Any], source: str = "recipe", lines: Mapping[tuple[str, ...], int] | None = None) -> Recipe:
    """Check a recipe given as a dictionary."""
    try:
        recipe = Recipe.model_validate(content)
    except ValidationError as error:
        raise RecipeError(_sentence(error, source, lines or {})) from None
    recipe._source, recipe._lines = source, lines or {}
    return recipe


def construct(cls: type, fields: Mapping[str, Any], where: str, **given: Any) -> Any:
    """Build an instance from a recipe's fields, checked against the constructor's signature.

    Args:
        where: what the fields are called in complaints, such as `method.gkd`.
        given: arguments that the recipe does not set.

    Raises:
        RecipeError: for an unknown field, a missing one or one of the wrong type, and what the constructor refuses.
    """
    parameters = inspect.signature(cls).parameters
    hints = typing.get_type_hints(cls.__init__)
    values = dict(given)
    for name, value in fields.items():
        if name not in parameters or name.startswith("_"):
            known = [n for n in parameters if n not in given and not n.startswith("_")]
            raise RecipeError(f"{where} has no field {name!r}{nearest(name, known)}", f"{where}.{name}")
        values[name] = _convert(value, hints.get(name, Any), f"{where}.{name}")
    missing = [n for n, p in parameters.items() if p.default is p.empty and n not in values and p.kind is not p.VAR_KEYWORD]
    if missing:
        raise RecipeError(f"{where} needs {missing[0]!r}: add {where}.{missing[0]}", where)
    try:
        return cls(**values)
    except (TypeError, ValueError) as error:
        raise RecipeError(f"{where}: {error}", where) from None


def _convert(value: Any, hint: Any, where: str) -> Any:
    from .divergences import Divergence

    if isinstance(hint, type) and issubclass(hint, Divergence):
        return _divergence(value, where)
    options = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else ()
    if any(isinstance(option, type) and not option.__module__.startswith("builtins") for option in options):
        hint = str  # a model in Python, its name in a recipe
    try:
        return TypeAdapter(hint).validate_python(value)
    except ValidationError as error:
        raise RecipeError(f"{where}: {error.errors()[0]['msg'].lower()}, not {value!r}", where) from None


def _divergence(value: Any, where: str) -> Any:
    """`reverse_kl` or `{jensen_shannon: {beta: 0.9}}`."""
    from . import divergences

    known = {
        _snake(c.__name__): c
        for c in vars(divergences).values()
        if isinstance(c, type) and issubclass(c, divergences.Divergence) and c is not divergences.Divergence
    }
    try:
        name, fields = named(value)
    except ValueError as error:
        raise RecipeError(f"{where}: {error}", where) from None
    if name not in known:
        raise RecipeError(f"{where}: there is no divergence {name!r}{nearest(name, list(known))}", where)
    return construct(known[name], fields, f"{where}.{name}")


def _snake(name: str) -> str:
    """JensenShannon → jensen_shannon, ForwardKL → forward_kl."""
    return "".join(f"_{c.lower()}" if c.isupper() and i and not name[i - 1].isupper() else c.lower() for i, c in enumerate(name))


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
        if isinstance(node, yaml.MappingNode):
            for key, value in node.value:
                here = (*path, str(key.value))
                if here in lines:
                    raise yaml.MarkedYAMLError(problem=f"the key {key.value!r} stands here twice", problem_mark=key.start_mark)
                lines[here] = key.start_mark.line + 1
                visit(value, here)

    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        visit(node, ())
        return (loader.construct_document(node) if node is not None else None), lines
    finally:
        loader.dispose()


def _override(content: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise RecipeError(f"{override!r} is no override; write key.key=value, such as training.max_steps=100")
    try:
        value = yaml.load(text, _Loader)  # noqa: S506, a SafeLoader
    except yaml.YAMLError:
        value = text
    *parents, last = key.split(".")
    here = content
    for parent in parents:
        if isinstance(here.get(parent), str) and parent in ("teacher", "method", "rollout"):
            here[parent] = {here[parent]: {}}
        below = here.setdefault(parent, {})
        if below is None:
            below = here[parent] = {}
        if not isinstance(below, dict):
            raise RecipeError(f"{override!r} goes below {parent!r}, which is the value {below!r} and has no fields")
        here = below
    here[last] = value


def _place(source: str, lines: Mapping[tuple[str, ...], int], path: tuple[str, ...]) -> str:
    """The recipe's name and the line of the key, or of the nearest key above it that stands in the file."""
    line = next((lines[path[:n]] for n in range(len(path), 0, -1) if path[:n] in lines), None)
    return f"{source}, line {line}" if line else source


def _sentence(error: ValidationError, source: str, lines: Mapping[tuple[str, ...], int]) -> str:
    """The first complaint of pydantic's, with its line and what to do."""
    first = error.errors()[0]
    path = tuple(str(part) for part in first["loc"])
    where = _place(source, lines, path)
    key = ".".join(path)
    if first["type"] == "extra_forbidden":
        block = Recipe if len(path) == 1 else {"student": Student, "data": Data, "evaluate": Evaluate}.get(path[0], Recipe)
        return f"{where}: unknown key {key!r}{nearest(path[-1], list(block.model_fields))}"
    if first["type"] == "missing":
        return f"{where}: {key!r} is missing; a recipe needs at least student, method and data"
    message = first["msg"].removeprefix("Value error, ")
    return f"{where}: {key}: {message}" if first["type"] == "value_error" else f"{where}: {key}: {message}, not {first['input']!r}"

"""A recipe: a run completely described, in one YAML file with seven words.

    student, teacher, method, rollout, data, training, evaluate

The one idea: nothing is declared twice. `name: {fields}` selects an instance by its file's name, and its fields are the
constructor's arguments; `training` is transformers' TrainingArguments, `peft` is LoraConfig. Every key is known or an
error with the line and the nearest match. This file reads and checks; `run.py` builds. It imports no torch.
"""

import copy
import dataclasses
import inspect
import re
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PrivateAttr,
    TypeAdapter,
    ValidationError,
    field_validator,
    model_validator,
)

from .budget import Budget
from .recipe_yaml import Places, RecipeError, place, read
from .registry import Registry, UnknownName, did_you_mean, nearest
from .sampling import Sampling

_SAMPLING_FIELDS = tuple(field.name for field in dataclasses.fields(Sampling))


class _Block(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Student(_Block):
    """A model by name or folder; or a fresh one, or one cut from the teacher."""

    model: str | None = None
    fresh: dict[str, Any] | None = None  # fields of the teacher's configuration to change; random weights
    layers: list[int] | None = None  # the teacher's layers to keep, with their weights
    peft: dict[str, Any] | None = None  # LoraConfig
    merge: bool = False  # save adapters merged into the model
    dtype: Literal["auto", "float32", "bfloat16", "float16", "float64"] = "float32"
    options: dict[str, Any] = {}  # further arguments of from_pretrained
    tokenizer: str | None = None  # default: the student's own, or the teacher's for one that is fresh or cut

    @model_validator(mode="after")
    def _one_origin(self) -> "Student":
        given = [name for name in ("model", "fresh", "layers") if getattr(self, name) is not None]
        if len(given) != 1:
            found = " and ".join(given) or "none of them"
            raise ValueError(f"a student comes from exactly one of model, fresh and layers, and this has {found}")
        if self.merge and self.peft is None:
            raise ValueError("merge is for adapters: give the student a peft block, or leave merge out")
        if self.peft is not None and self.model is None and not self.merge:
            raise ValueError(f"adapters alone would be saved, without the {given[0]} model below them: add merge: true")
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
    """What to look at: a held-out dataset, read like `data` where not said otherwise, and answers to show.

    The pace, and which checkpoint is best, are `training`'s: eval_steps, metric_for_best_model, load_best_model_at_end.
    """

    dataset: str | None = None
    split: str = "test"
    name: str | None = None
    limit: int | None = 500
    metrics: list[str] = []  # of greedy answers to the held-out prompts, beside the loss
    patience: int | None = Field(default=None, gt=0)  # end after so many evaluations without a better one
    show: int = Field(default=3, ge=0)  # answers of the student shown as it learns
    show_every: int | None = Field(default=None, gt=0)  # steps between; default: a fifth of the run


class Reward(_Block):
    """What responses are worth, for methods that take a reward; see `reward.Reward`."""

    functions: dict[str, float] = {}  # module:function → weight
    model: str | None = None  # for sequence classification
    label: str | None = None  # the class of the model whose probability counts
    reads: Literal["text", "pair"] = "text"
    weight: float = 1.0  # the model's
    normalize: bool = False


class Recipe(_Block):
    """The seven words, `corpus` and `reward` for methods that take one, and a `budget` for runs that are to have one.

    `method`, `teacher` and `rollout` are kept as (name, fields) until they are built.
    """

    student: Student
    teacher: tuple[str, dict[str, Any]] | None = None
    method: tuple[str, dict[str, Any]]
    rollout: tuple[str, dict[str, Any]] = ("generate", {})
    data: Data
    corpus: Data | None = None  # plain text, for methods with a language-modelling loss
    reward: Reward | None = None
    training: dict[str, Any] = {}
    budget: Budget | None = None
    evaluate: Evaluate = Field(default_factory=Evaluate)

    _source: str = PrivateAttr("recipe")
    _places: Places = PrivateAttr(default_factory=dict)

    @field_validator("teacher", "method", "rollout", mode="before")
    @classmethod
    def _named(cls, value: Any) -> Any:
        return named(value) if value is not None else None

    @field_validator("budget", mode="before")
    @classmethod
    def _limited(cls, value: Any) -> Any:
        return construct(Budget, value, "budget") if isinstance(value, Mapping) else value

    def check(self, word: str, registry: Registry[Any], **given: Any) -> None:
        """Refuse what `build` would refuse before it calls the constructor, which may load a model."""
        name, fields = getattr(self, word)
        with self.locating(word):
            arguments(registry.get(name), fields, f"{word}.{name}", _elsewhere(word), **given)

    def build(self, word: str, registry: Registry[Any], **given: Any) -> Any:
        """The instance that `method`, `teacher` or `rollout` describes; `given` are arguments that no recipe sets."""
        name, fields = getattr(self, word)
        with self.locating(word):
            return construct(registry.get(name), fields, f"{word}.{name}", _elsewhere(word), **given)

    def sampling(self) -> Sampling:
        """The sampling parameters in the rollout block, whose other fields are the engine's options."""
        name, fields = self.rollout
        with self.locating("rollout"):
            values = {key: value for key, value in fields.items() if key in _SAMPLING_FIELDS}
            return construct(Sampling, values, f"rollout.{name}")

    @property
    def source(self) -> Path:
        """The file that the recipe was read from, as far as it was."""
        return Path(self._source)

    @property
    def name(self) -> str:
        """The recipe's file name without its ending, or "recipe"."""
        return self.source.stem

    def complaint(self, key: str, message: str) -> RecipeError:
        """An error about a dotted key, with the line it stands in."""
        where = place(self._source, self._places, tuple(key.split(".")))
        return RecipeError(f"{where}: {message}", key, located=True)

    @contextmanager
    def locating(self, key: str) -> Iterator[None]:
        """Give what is refused in this block its place in the recipe: the key that it names itself, or `key`."""
        try:
            yield
        except UnknownName as error:
            raise self.complaint(key, str(error)) from None
        except RecipeError as error:
            raise error if error.located else self.complaint(error.key or key, str(error)) from None

    def resolved(self) -> dict[str, Any]:
        """The recipe as a dictionary that `parse` reads back to the same one."""
        plain = _given(self)
        plain |= {key: {plain[key][0]: plain[key][1]} for key in ("teacher", "method", "rollout") if key in plain}
        return plain | ({} if self.budget is None else {"budget": {self.budget.kind: self.budget.limit}})


def _elsewhere(word: str) -> tuple[str, ...]:
    """The fields of a block that are not its constructor's arguments."""
    return _SAMPLING_FIELDS if word == "rollout" else ()


def _given(block: BaseModel) -> dict[str, Any]:
    """The block's fields without those that are None by default and were left so."""
    values = {name: getattr(block, name) for name in type(block).model_fields}
    return {
        name: _given(value) if isinstance(value, BaseModel) else copy.deepcopy(value)
        for name, value in values.items()
        if value is not None or type(block).model_fields[name].default is not None
    }


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
    content, places = read(path, overrides)
    return parse(content, str(path), places)


def parse(content: dict[str, Any], source: str = "recipe", places: Places | None = None) -> Recipe:
    """Check a recipe given as a dictionary; `source` and `places` are for complaints."""
    try:
        recipe = Recipe.model_validate(content)
    except ValidationError as error:
        raise RecipeError(_sentence(error, source, places or {})) from None
    recipe._source, recipe._places = source, places or {}
    return recipe


def construct(cls: type, fields: Mapping[str, Any], where: str, elsewhere: Sequence[str] = (), /, **given: Any) -> Any:
    """Build an instance from a recipe's fields.

    Raises:
        RecipeError: as `arguments`, and for what the constructor refuses.
    """
    values = arguments(cls, fields, where, elsewhere, **given)
    try:
        return cls(**values)
    except RecipeError:
        raise
    except (TypeError, ValueError) as error:
        raise RecipeError(f"{where}: {error}", where) from None


def arguments(
    cls: type, fields: Mapping[str, Any], where: str, elsewhere: Sequence[str] = (), /, **given: Any
) -> dict[str, Any]:
    """A recipe's fields as arguments of a constructor, checked against its signature.

    Args:
        where: what the fields are called in complaints, such as `method.gkd`.
        elsewhere: fields that belong to something else, and are left to it.
        given: arguments that the recipe does not set.

    Raises:
        RecipeError: for an unknown field, a missing one or one of the wrong type.
    """
    parameters = inspect.signature(cls).parameters
    hints = typing.get_type_hints(cls.__init__)
    values = dict(given)
    for name, value in fields.items():
        if name in elsewhere:
            continue
        if name not in parameters or name.startswith("_") or name in given:
            known = [n for n in (*parameters, *elsewhere) if n not in given and not n.startswith("_")]
            raise RecipeError(f'{where} has no field "{name}"{nearest(str(name), known)}', f"{where}.{name}")
        values[name] = _convert(value, hints.get(name, Any), f"{where}.{name}")
    missing = [
        n for n, p in parameters.items() if p.default is p.empty and n not in values and p.kind is not p.VAR_KEYWORD
    ]
    if missing:
        raise RecipeError(f'{where} needs "{missing[0]}": add {where}.{missing[0]}', where)
    return values


def _convert(value: Any, hint: Any, where: str) -> Any:
    from .divergences import Divergence

    options = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    if any(isinstance(option, type) and issubclass(option, Divergence) for option in options):
        return None if value is None and type(None) in options else _divergence(value, where)
    if str in options and any(isinstance(o, type) and o.__module__ != "builtins" for o in options):
        hint = str | None if type(None) in options else str  # a model in Python, its name in a recipe
    return checked(value, hint, where)


def checked(value: Any, hint: Any, where: str) -> Any:
    """The value as the type that `hint` asks for.

    Raises:
        RecipeError: if it is none, naming `where` it stands.
    """
    try:
        return TypeAdapter(hint, config=ConfigDict(arbitrary_types_allowed=True)).validate_python(value)
    except ValidationError as error:
        raise RecipeError(f"{where}: {_lower(error.errors()[0]['msg'])}, not {value!r}", where) from None


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
        raise RecipeError(f'{where}: there is no divergence "{name}"{nearest(name, known)}', where)
    return construct(known[name], fields, f"{where}.{name}")


def _snake(name: str) -> str:
    """JensenShannon → jensen_shannon, ForwardKL → forward_kl."""
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower()


def _sentence(error: ValidationError, source: str, places: Places) -> str:
    """The first complaint of pydantic's, with its line and what to do."""
    unknown = ("extra_forbidden", "invalid_key")  # a misspelt key goes before what is missing therefore
    first = min(error.errors(), key=lambda e: e["type"] not in unknown)
    path = tuple(str(part) for part in first["loc"] if part != "[key]")
    where = place(source, places, path)
    key = ".".join(path)
    blocks = {"student": Student, "data": Data, "corpus": Data, "reward": Reward, "evaluate": Evaluate}
    if first["type"] == "extra_forbidden":
        known = (Recipe if len(path) == 1 else blocks[path[0]]).model_fields
        homes = [name for name, block in blocks.items() if path[-1] in block.model_fields] if len(path) == 1 else []
        hint = f"; it belongs into the block {homes[0]}" if homes else nearest(path[-1], known)
        return f'{where}: unknown key "{key}"{hint}'
    if first["type"] == "missing":
        block = "recipe" if len(path) == 1 else f"{path[0]} block"
        return f'{where}: "{key}" is missing, and every {block} needs it'
    if first["type"] in ("model_type", "dict_type", "dataclass_type"):
        return f"{where}: {key} has fields, written as `{path[-1]}: {{key: value}}`, and is not {first['input']!r:.60}"
    if first["type"] == "value_error":
        message = first["msg"].removeprefix("Value error, ")
        return f"{where}: {message}" if message.startswith(key) else f"{where}: {key}: {message}"
    guess = did_you_mean(first["input"], _choices(first)) if isinstance(first["input"], str) else ""
    return f"{where}: {key}: {_lower(first['msg'])}, not {first['input']!r:.60}{guess}"


def _choices(error: Any) -> list[str]:
    """What pydantic expected where it expected one of a few words."""
    return re.findall(r"'([^']*)'", error.get("ctx", {}).get("expected", ""))


def _lower(message: str) -> str:
    return message[:1].lower() + message[1:]

"""A recipe: the complete description of a run, as one YAML file with seven keys.

    student, teacher, method, rollout, data, training, evaluate

`name: {fields}` selects a class by its name in the registry, and the fields are its constructor's arguments; `training`
is transformers' TrainingArguments, `peft` is LoraConfig. An unknown key is an error with its line and the nearest known
one. Recipes are read and checked here and built in `run/`; torch is not imported.
"""

import copy
import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PrivateAttr,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from ..budget import Budget
from ..registry import Registry, UnknownName, did_you_mean, nearest
from ..sampling import Sampling, Schedule
from .arguments import arguments, construct, name_and_fields
from .shipped import locate
from .yaml_text import Places, RecipeError, place, read

_SAMPLING_FIELDS = tuple(field.name for field in dataclasses.fields(Sampling))
_SCHEDULE_FIELDS = tuple(field.name for field in dataclasses.fields(Schedule))
_OTHER_FIELDS = {
    "rollout": (*_SAMPLING_FIELDS, *_SCHEDULE_FIELDS)
}  # of a block, that are not arguments of the class it names


class _Block(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Student(_Block):
    """The student: a model by name or folder, a new one with random weights, or some of the teacher's layers."""

    model: str | None = None
    fresh: dict[str, Any] | None = None  # random weights; changes to the teacher's configuration
    layers: list[int] | None = None  # the numbers of the teacher's layers to copy
    peft: dict[str, Any] | None = None  # LoraConfig
    merge: bool = False  # save the model with its adapters merged
    dtype: Literal["auto", "float32", "bfloat16", "float16", "float64"] = "float32"
    save_dtype: Literal["auto", "float32", "bfloat16", "float16", "float64"] = "auto"  # auto: as it came, if narrower
    options: dict[str, Any] = {}  # further arguments of from_pretrained
    tokenizer: str | None = None  # default: the model's own, else the teacher's

    @model_validator(mode="after")
    def _one_origin(self) -> "Student":
        origins = [name for name in ("model", "fresh", "layers") if getattr(self, name) is not None]
        if len(origins) != 1:
            names = " and ".join(origins) or "none of them"
            raise ValueError(f"a student comes from exactly one of model, fresh and layers, and this has {names}")
        if self.merge and self.peft is None and self.model is None:
            raise ValueError("merge is for adapters: give the student a peft block, or leave merge out")
        if self.peft is not None and self.model is None and not self.merge:
            raise ValueError(
                f"adapters alone would be saved, without the {origins[0]} model below them: add merge: true"
            )
        return self


class Data(_Block):
    """The dataset to train on; `data.examples.load_examples` documents the fields."""

    dataset: str
    split: str = "train"
    name: str | None = None
    columns: dict[str, str] | None = None
    template: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    train_on: Literal["last", "all"] = "last"  # of a conversation's messages of the assistant
    text_as: Literal["chunks", "lines", "files"] = "chunks"  # what a .txt file holds
    max_length: int = 512
    max_prompt_length: int | None = None
    text_prompt: int = 32
    on_bad_row: Literal["error", "skip"] = "error"
    on_long_prompt: Literal["cut", "skip", "error"] = "cut"
    teacher_prompt: str | None = None  # what the teacher reads in place of the prompt: a template or a column
    teacher_system: str | None = None  # a system message that only the teacher reads
    limit: int | None = None
    seed: int = 0  # of a playground's problems


class Evaluate(_Block):
    """Evaluation while training: a held-out dataset, with `data`'s settings for all other fields, and sample responses.

    How often, and which checkpoint is best, is set in `training`: eval_steps, metric_for_best_model and so on.
    """

    dataset: str | None = None
    split: str = "test"
    name: str | None = None
    limit: int | None = 500
    metrics: list[str] = []  # of greedy responses to the held-out prompts
    exposure_bias: int = Field(default=0, ge=0)  # the number of held-out prompts on which it is measured; 0: not
    patience: int | None = Field(default=None, gt=0)  # evaluations without improvement after which training stops
    show: int = Field(default=3, ge=0)  # sample responses to print when training has ended
    show_every: int | None = Field(default=None, gt=0)  # print them during training too, with this many steps between


class Reward(_Block):
    """The reward of a response, for methods that take one; `reward.Reward` documents the fields."""

    functions: dict[str, float] = {}  # module:function → weight
    model: str | None = None  # a sequence-classification model
    label: str | None = None  # the model's class whose probability is the reward
    reads: Literal["text", "pair"] = "text"
    weight: float = 1.0  # of the model
    normalize: bool = False


class Recipe(_Block):
    """A run's description: the seven keys, and optionally `corpus`, `reward` and `budget`.

    `method`, `teacher` and `rollout` are pairs (name, fields), from which `build` constructs instances.
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
    def _name_and_fields(cls, value: Any, info: ValidationInfo) -> Any:
        return None if value is None and info.field_name == "teacher" else name_and_fields(value)

    @field_validator("budget", mode="before")
    @classmethod
    def _budget(cls, value: Any) -> Any:
        return construct(Budget, value, "budget") if isinstance(value, Mapping) else value

    def check(self, word: str, registry: Registry[Any], **extra: Any) -> None:
        """Raise the errors that `build` would raise before it calls the constructor, which may load a model."""
        name, fields = getattr(self, word)
        with self.locating(word):
            arguments(registry.get(name), fields, f"{word}.{name}", _OTHER_FIELDS.get(word, ()), registry, **extra)

    def build(self, word: str, registry: Registry[Any], **extra: Any) -> Any:
        """The instance that `method`, `teacher` or `rollout` describes; `extra` is for a method's `reward`."""
        name, fields = getattr(self, word)
        with self.locating(word):
            return construct(
                registry.get(name), fields, f"{word}.{name}", _OTHER_FIELDS.get(word, ()), registry, **extra
            )

    def sampling(self) -> Sampling:
        """The sampling parameters in the rollout block, which has the schedule and the engine's options as well."""
        return self._of_rollout(Sampling, _SAMPLING_FIELDS)

    def schedule(self) -> Schedule:
        """How training uses the rollout, in the rollout block."""
        return self._of_rollout(Schedule, _SCHEDULE_FIELDS)

    def _of_rollout(self, cls: type, names: Sequence[str]) -> Any:
        name, fields = self.rollout
        with self.locating("rollout"):
            return construct(cls, {key: fields[key] for key in names if key in fields}, f"rollout.{name}")

    @property
    def source(self) -> Path:
        """The file that the recipe was read from, or just "recipe"."""
        return Path(self._source)

    @property
    def name(self) -> str:
        """The file's name without its ending, or "recipe"."""
        return self.source.stem

    def error(self, key: str, message: str) -> RecipeError:
        """A RecipeError about a dotted key, with the file and line of that key."""
        return RecipeError(f"{place(self._source, self._places, key)}: {message}", key, located=True)

    @contextmanager
    def locating(self, key: str) -> Iterator[None]:
        """Add file and line to errors raised in this block: those of the error's own key, or of `key`."""
        try:
            yield
        except UnknownName as error:
            raise self.error(key, str(error)) from error
        except RecipeError as error:
            raise error if error.located else self.error(error.key or key, str(error)) from error.__cause__

    def resolved(self) -> dict[str, Any]:
        """The recipe as a dictionary with every default filled in; `parse` reads it back as the same recipe."""
        content = _content(self)
        content |= {
            key: {content[key][0]: content[key][1]} for key in ("teacher", "method", "rollout") if key in content
        }
        return content | ({} if self.budget is None else {"budget": {self.budget.kind: self.budget.limit}})


def _content(block: BaseModel) -> dict[str, Any]:
    """The block's fields, without those that are None by default and not set."""
    values = {name: getattr(block, name) for name in type(block).model_fields}
    return {
        name: _content(value) if isinstance(value, BaseModel) else copy.deepcopy(value)
        for name, value in values.items()
        if value is not None or type(block).model_fields[name].default is not None
    }


def load(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe by path, or by name one that comes with the package, and apply dotted overrides in YAML.

    Raises:
        RecipeError: for anything that is not a recipe, with the file, the line and the remedy.
    """
    path = locate(path)
    content, places = read(path, overrides)
    return parse(content, str(path), places)


def parse(content: dict[str, Any], source: str = "recipe", places: Places | None = None) -> Recipe:
    """Build a recipe from a dictionary and check it; `source` and `places` are for errors."""
    try:
        recipe = Recipe.model_validate(content)
    except ValidationError as error:
        raise RecipeError(_message(error, source, places or {})) from None
    recipe._source, recipe._places = source, places or {}
    return recipe


def _message(error: ValidationError, source: str, places: Places) -> str:
    """The first of pydantic's errors as one sentence, with its line and the remedy."""
    unknown = ("extra_forbidden", "invalid_key")  # a misspelt key is often the cause of a missing one
    first = min(error.errors(), key=lambda e: e["type"] not in unknown)
    path = tuple(str(part) for part in first["loc"] if part != "[key]")
    key = ".".join(path)
    where = place(source, places, key)
    blocks = {"student": Student, "data": Data, "corpus": Data, "reward": Reward, "evaluate": Evaluate}
    if first["type"] == "extra_forbidden":
        fields = (Recipe if len(path) == 1 else blocks[path[0]]).model_fields
        blocks_with_key = (
            [name for name, block in blocks.items() if path[-1] in block.model_fields] if len(path) == 1 else []
        )
        hint = f"; it belongs in the block {blocks_with_key[0]}" if blocks_with_key else nearest(path[-1], fields)
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
    reason = first["msg"][:1].lower() + first["msg"][1:]
    return f"{where}: {key}: {reason}, not {first['input']!r:.60}{guess}"


def _choices(error: Any) -> list[str]:
    """The words that pydantic accepts, where it accepts only a few."""
    return re.findall(r"'([^']*)'", error.get("ctx", {}).get("expected", ""))

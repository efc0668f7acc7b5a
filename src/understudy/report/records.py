"""What a report reads from the JSON files of a run: which fields have which types.

Anybody may have written the files, so each is checked where it is read, and an error names the file and the field.
"""

import json
import math
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

_LARGEST = 1e100  # of a number that can be drawn
Model = TypeVar("Model", bound=BaseModel)


def is_number(value: Any) -> bool:
    """Is this a number that can be drawn? NaN and infinities are numbers; they are left out later."""
    return isinstance(value, int | float) and not isinstance(value, bool) and not _LARGEST < abs(value) < float("inf")


def _number(value: Any) -> Any:
    if value is not None and not is_number(value):
        raise ValueError("this is no number")
    return value


Number = Annotated[Any, BeforeValidator(_number)]  # int stays int, so that counts are shown as such
Numbers = dict[str, Number]


class _Record(BaseModel):
    model_config = ConfigDict(extra="allow", strict=True)


class StudentSamples(_Record):
    """The distance to the teacher on student samples."""

    before: Numbers = {}
    after: Numbers = {}


class Summary(_Record):
    """run.json."""

    seed: int | None = None
    steps: Number = None
    seconds: Number = None
    cpu_seconds: Number = None
    tokens: Number = None
    peak_memory_mb: Number = None
    metrics: Numbers = {}
    versions: dict[str, Any] = {}
    student_samples: StudentSamples = Field(default_factory=StudentSamples)


class Before(_Record):
    """before.json."""

    student_samples: Numbers = {}


class _Scored(_Record):
    """Scores of the responses, and curves."""

    scores: dict[str, list[Number]] = {}
    curves: dict[str, dict[str, list[Number] | None]] = {}


class Part(_Scored):
    """A `*.metrics.json` of `understudy evaluate`."""

    metrics: Numbers = {}


class Settings(_Record):
    """The settings of an evaluation."""

    data: dict[str, Any] | None = None
    metrics: list[str] = []
    length_buckets: list[int] = []


class Evaluated(_Scored):
    """The results with one of several settings."""

    metrics: Numbers


class Evaluation(_Record):
    """evaluation.json."""

    settings: dict[str, Settings] = {}
    results: dict[str, Evaluated]


class Point(_Record):
    """A variant of a sweep."""

    recipe: str
    value: Any
    written: str


class Sweep(_Record):
    """The swept option, and its values by the variant's name."""

    option: str
    points: dict[str, Point]


class Comparison(_Record):
    """comparison.json."""

    baseline: str | None = None
    sweep: Sweep | None = None
    folders: dict[str, str] = {}


class _Block(_Record):
    model: str | None = None


class _Training(_Record):
    seed: int | None = None
    max_steps: Number = None


class RecipeRecord(_Record):
    """The parts of recipe.yaml that a report reads."""

    student: _Block | None = None
    teacher: dict[str, Any] | None = None
    method: dict[str, Any] | None = None
    data: dict[str, Any] | None = None
    training: _Training | None = None


def checked(path: Path, content: Any, model: type[Model]) -> dict[str, Any]:
    """The content of a file, if its fields have the types of `model`.

    Raises:
        ValueError: naming the file and the field.
    """
    try:
        model.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"])[:80] or "the content"
        message = f"{path} cannot be read: {field} has another form than in a file that a run writes"
        raise ValueError(f"{message}; move it away, or restore it") from None
    return content


def numeric(line: dict[str, Any]) -> dict[str, Any]:
    """The numbers of a log line; of its step only one that is finite."""
    numbers = {name: value for name, value in line.items() if is_number(value)}
    return {name: value for name, value in numbers.items() if name != "step" or math.isfinite(value)}


def dumps(content: Any) -> str:
    """JSON in UTF-8; lone surrogates, which UTF-8 does not have, become question marks."""
    text = json.dumps(content, ensure_ascii=False, indent=1, allow_nan=False)
    return text.encode("utf-8", "replace").decode("utf-8") + "\n"

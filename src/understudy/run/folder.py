"""A run's folder: the names of all files in it, how they are read, and which run they belong to.

Nothing heavy is imported, so that an error in a folder's name is reported at once.
"""

import errno
import json
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from ..files import read_jsonl, write_atomic
from ..recipe import Recipe, RecipeError, load
from ..training import checkpoint
from . import marker

if TYPE_CHECKING:
    from ..data.examples import Examples

_RESPONSES = re.compile(r"responses-(.+)\.[0-9a-f]{8}\.jsonl")
_MEASURED = ".metrics.json"
_REMEDY = "give another training.output_dir"


class _Entry:
    """Descriptor of a file or folder in a run's folder: its path; accessed on the class, its name alone."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __get__(self, folder: "RunFolder | None", owner: type) -> Path:
        return Path(self.name) if folder is None else folder.path / self.name


@dataclass(frozen=True)
class RunFolder:
    """The folder of one run, `training.output_dir`; or a folder with only the evaluation of a model."""

    path: Path

    recipe = _Entry("recipe.yaml")  # the resolved recipe
    marker = _Entry(marker.MARKER)  # which kinds of files understudy wrote here: a run's, an evaluation's
    before = _Entry("before.json")  # before training: the data's fingerprint, the distance to the teacher
    metrics = _Entry("metrics.jsonl")  # every log line
    samples = _Entry("samples.jsonl")  # sample responses during training
    teacher_responses = _Entry("teacher_responses.jsonl")  # generated once, for every epoch
    student = _Entry("student")  # the trained student
    student_partial = _Entry("student.partial")
    soft_prompt = _Entry("soft_prompt")  # the prompt that PromptKD trains besides the student
    run_json = _Entry("run.json")  # versions, hardware, counts, seconds, final metrics
    report = _Entry("report")
    evaluation = _Entry("evaluation.json")  # of the student, by `compare`
    failed = _Entry("failed.txt")  # the error of a failed run of a comparison
    log = _Entry("log.txt")  # the output of a run of a comparison

    def read_run_json(self) -> dict[str, Any] | None:
        """The content of run.json; None before the run is finished."""
        return read_json(self.run_json) if self.run_json.is_file() else None

    def read_before(self) -> dict[str, Any] | None:
        return read_json(self.before) if self.before.is_file() else None

    def read_evaluation(self) -> dict[str, Any] | None:
        return read_json(self.evaluation) if self.evaluation.is_file() else None

    def read_failed(self) -> str | None:
        return self.failed.read_text(encoding="utf-8").strip() if self.failed.is_file() else None

    def read_measurements(self) -> dict[str, dict[str, Any]]:
        """The metrics files of `understudy evaluate --output`, by the name of the file of responses."""
        paths = sorted(self.path.glob(f"*{_MEASURED}"))
        return {path.name.removesuffix(_MEASURED): read_json(path) for path in paths}

    def responses(self, name: str, digest: str) -> Path:
        """The path of an evaluation's responses; `digest` is of everything that they depend on."""
        return self.path / f"responses-{name}.{digest}.jsonl"

    def read_responses(self) -> dict[str, list[dict[str, Any]]]:
        """The evaluated responses by the settings' name, in the order of seeds and rows.

        Of an unfinished evaluation, those that exist so far.
        """
        results = (self.read_evaluation() or {}).get("results")
        if isinstance(results, dict):
            names = {name: result.get("responses") for name, result in results.items() if isinstance(result, dict)}
            files = {name: self.path / Path(file).name for name, file in names.items() if isinstance(file, str)}
        else:
            unfinished = sorted(self.path.glob("responses-*.jsonl"), key=lambda file: file.stat().st_mtime)
            files = {match[1]: file for file in unfinished if (match := _RESPONSES.fullmatch(file.name))}
        lines = {name: read_jsonl(file) for name, file in files.items() if file.is_file()}
        return {
            name: sorted(part, key=lambda line: (line.get("seed", 0), line.get("row", 0)))
            for name, part in lines.items()
        }

    def last_checkpoint(self) -> str | None:
        """The newest complete checkpoint."""
        return checkpoint.last_checkpoint(self.path)

    @property
    def is_finished(self) -> bool:
        return self.run_json.exists() and self.student.exists()

    @property
    def has_results(self) -> bool:
        """Does the folder contain anything that took long to compute?"""
        return self.last_checkpoint() is not None or self.student.exists() or self.teacher_responses.exists()

    def holds_run_of(self, recipe: Recipe) -> bool:
        """Is the resolved recipe in the folder this one?"""
        if not self.recipe.is_file():
            return False
        try:
            return load(self.recipe).resolved() == recipe.resolved()
        except RecipeError:
            return False

    def check_free(self, recipe: Recipe, restart: bool) -> None:
        """Refuse a folder with another recipe's run, or with files that a run would overwrite; changes nothing.

        Raises:
            RecipeError: naming the file or run that is there, with the remedy.
        """
        same = self.holds_run_of(recipe)
        if not same and self.recipe.exists() and self.recipe.resolve() == recipe.source.resolve():
            message = f"{self.path} contains the recipe itself, as recipe.yaml, which the run would overwrite"
            raise recipe.error("training.output_dir", f"{message}: {_REMEDY}")
        try:
            marker.check(self.path, RUN, _REMEDY)
        except ValueError as error:
            raise recipe.error("training.output_dir", str(error)) from None
        if not same and not restart and self.has_results:
            message = f"{self.path} holds a run of another recipe: {_REMEDY}, or --restart to delete that run"
            raise recipe.error("training.output_dir", message)
        nearest = next((place for place in (self.path, *self.path.absolute().parents) if place.exists()), self.path)
        if not nearest.is_dir():
            raise self._not_writable(recipe, errno.EEXIST if nearest == self.path else errno.ENOTDIR)
        if not os.access(nearest, os.W_OK | os.X_OK):
            raise self._not_writable(recipe, errno.EACCES)

    def claim(self, recipe: Recipe, restart: bool) -> None:
        """Take the folder for a run of this recipe: mark it, and delete files of an earlier run that is not resumed.

        Raises:
            RecipeError: as `check_free`, and where nothing can be written.
        """
        self.check_free(recipe, restart)
        same = self.holds_run_of(recipe)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            marker.mark(self.path, RUN)
            if restart or not same:
                marker.clear(self.path, RUN, keep=(str(RunFolder.recipe),))
            if not same:
                write_atomic(self.recipe, yaml.safe_dump(recipe.resolved(), sort_keys=False, allow_unicode=True))
        except OSError as error:
            if error.errno == errno.ENOSPC:
                raise
            raise self._not_writable(recipe, error.errno) from None

    def check_unchanged(self, recipe: Recipe, train: "Examples") -> None:
        """Refuse to resume with other training data: its order and the teacher's responses depend on the rows.

        Raises:
            RecipeError: with the remedies.
        """
        before = self.read_before()
        if self.has_results and before is not None and before["fingerprint"] != train.fingerprint:
            message = f"{train.source} has changed since the run in {self.path} began"
            message += ": restore it, give another training.output_dir, or --restart to delete that run"
            raise recipe.error("data.dataset", message)

    def _not_writable(self, recipe: Recipe, code: int | None) -> RecipeError:
        reason = os.strerror(code or errno.EIO)
        message = f"the run's folder {self.path} cannot be written ({reason}): {_REMEDY}"
        return recipe.error("training.output_dir", message)


def _kind(name: str, *patterns: Any, **options: Any) -> marker.Kind:
    return marker.Kind(name, tuple(map(str, patterns)), **options)


REPORT = marker.Kind("report", ("report.html", "report.json", "png"))
EVALUATION = _kind("evaluation", RunFolder.evaluation, RunFolder.failed, RunFolder.log)
RUN = _kind(
    *("run", RunFolder.recipe, checkpoint.PATTERN, RunFolder.student, RunFolder.teacher_responses),
    *(RunFolder.soft_prompt, RunFolder.metrics, RunFolder.samples, RunFolder.before, RunFolder.run_json),
    RunFolder.report,
    nested={str(RunFolder.report): REPORT},
)


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object from a file.

    Raises:
        ValueError: naming the file, if it does not contain one.
    """
    return read_mapping(path, json.loads, path.read_text(encoding="utf-8", errors="replace"))


def read_mapping(path: Path, parse: Callable[[str], Any], text: str) -> dict[str, Any]:
    """Parse the `text` of a file as a mapping.

    Raises:
        ValueError: naming the file, if it is not a mapping.
    """
    try:
        content = parse(text)
    except (ValueError, RecursionError, yaml.YAMLError):
        content = None
    if not isinstance(content, dict):
        raise ValueError(f"{path} cannot be read: it is not a file that a run writes; move it away, or restore it")
    return content

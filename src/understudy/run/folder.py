"""A run's folder: the names of all files in it, how they are read, and which run they belong to.

Nothing heavy is imported, so that an error in a folder's name is reported at once.
"""

import errno
import json
import logging
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ..files import read_jsonl, write_atomic
from ..recipe import Recipe, RecipeError, load
from ..training import checkpoint
from . import marker
from .differences import Input, changed, differences, fixed, is_length, listed, touching
from .sources import check_not_overwritten

_RESPONSES = re.compile(r"responses-(.+)\.[0-9a-f]{8}\.jsonl")
_MEASURED = ".metrics.json"
_REMEDY = "give another training.output_dir"
_ACCEPT = "--accept-changes to go on with the new values"
_RESTART = "--restart to delete that run"
logger = logging.getLogger(__name__)


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
    lock = _Entry(".understudy.lock")  # held by the process that trains here
    inputs = _Entry("inputs.json")  # hashes of data, weights and code, and versions, when the run began
    before = _Entry("before.json")  # the distance to the teacher before training
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
    vllm_log = _Entry("vllm.log")  # the output of the vLLM that the rollout has started
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
        return {name: sorted(part, key=_seed_and_row) for name, part in lines.items()}

    def last_checkpoint(self) -> str | None:
        """The newest complete checkpoint."""
        return checkpoint.last_checkpoint(self.path)

    @property
    def is_finished(self) -> bool:
        return self.run_json.exists() and self.student.exists()

    @property
    def has_results(self) -> bool:
        """Does the folder contain anything that took long to compute?"""
        saved = any(path.exists() for path in (self.student, self.teacher_responses))
        return saved or any(checkpoint.was_complete(path) for path in checkpoint.checkpoints(self.path))

    def read_recipe(self) -> Recipe | None:
        """The recipe of the run that the folder holds; None where there is none, or none that can be read."""
        try:
            return load(self.recipe) if self.recipe.is_file() else None
        except RecipeError:
            return None

    def check_free(self, recipe: Recipe, restart: bool, accept_changes: bool = False) -> None:
        """Refuse a folder with another recipe's run, or with files that a run would overwrite; changes nothing.

        Raises:
            RecipeError: naming the file or what differs, with the remedy.
        """
        check_not_overwritten(recipe, self.path, self.student)
        before = self.read_recipe()
        is_source = self.recipe.exists() and self.recipe.resolve() == recipe.source.resolve()
        is_run = before is not None and RUN.name in marker.kinds(self.path)
        if is_source and (before is None or not is_run or differences(before, recipe)):
            message = f"{self.path} contains the recipe itself, as recipe.yaml, which the run would overwrite"
            raise recipe.error("training.output_dir", f"{message}: {_REMEDY}")
        try:
            marker.check(self.path, RUN, _REMEDY)
        except ValueError as error:
            raise recipe.error("training.output_dir", str(error)) from None
        if not restart and self.has_results:
            self._check_same(recipe, before, accept_changes)
            self._check_undamaged(recipe)
        nearest = next((place for place in (self.path, *self.path.absolute().parents) if place.exists()), self.path)
        if not nearest.is_dir():
            raise self._not_writable(recipe, errno.EEXIST if nearest == self.path else errno.ENOTDIR)
        if not os.access(nearest, os.W_OK | os.X_OK):
            raise self._not_writable(recipe, errno.EACCES)

    def _check_same(self, recipe: Recipe, before: Recipe | None, accept_changes: bool) -> None:
        """Refuse to resume the run in the folder with a recipe that makes another student."""
        if before is None:
            message = (
                f"{self.recipe} cannot be read, which says whose run this is: restore it, {_REMEDY}, or {_RESTART}"
            )
            raise recipe.error("training.output_dir", message)
        never = fixed(before, recipe)
        refused = never or ([] if accept_changes else touching(before, recipe))
        if refused:
            names = listed([*map(str, refused[:5]), *(["others"] if len(refused) > 5 else [])])
            message = f"{self.path} holds a run of another recipe, with other values of {names}"
            if any(map(is_length, refused)):
                message += " (a run may be made longer if its lr_scheduler_type is constant)"
            remedies = [_REMEDY, *([] if never else [_ACCEPT]), f"or {_RESTART}"]
            raise recipe.error("training.output_dir", f"{message}: {', '.join(remedies)}")

    def _check_undamaged(self, recipe: Recipe) -> None:
        """Refuse to begin again where every checkpoint was damaged after it was complete."""
        broken = [(path, reason) for path, reason in checkpoint.damaged(self.path) if checkpoint.was_complete(path)]
        if broken and self.last_checkpoint() is None:
            path, reason = broken[0]
            message = f"{path} is damaged ({reason}), and there is no other checkpoint to resume from: restore it"
            raise recipe.error("training.output_dir", f"{message}, {_REMEDY}, or {_RESTART}")

    def is_extended_by(self, recipe: Recipe, accept_changes: bool) -> bool:
        """Does the recipe let the finished run in the folder go on: with more steps, or with changes to accept?"""
        before = self.read_recipe()
        if before is None or self.last_checkpoint() is None:
            return False
        changes = differences(before, recipe)
        return any(map(is_length, changes)) or (accept_changes and bool(touching(before, recipe)))

    def claim(self, recipe: Recipe, restart: bool, accept_changes: bool = False) -> None:
        """Take the folder for a run of this recipe: mark it, and delete files of an earlier run that is not resumed.

        Raises:
            RecipeError: as `check_free`, and where nothing can be written.
        """
        self.check_free(recipe, restart, accept_changes)
        before = self.read_recipe()
        same = before is not None and before.resolved() == recipe.resolved()
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            marker.mark(self.path, RUN)
            if restart or (not same and not self.has_results):
                marker.clear(self.path, RUN, keep=(str(RunFolder.recipe),))
            self.run_json.unlink(missing_ok=True)
            if not same:
                write_atomic(self.recipe, yaml.safe_dump(recipe.resolved(), sort_keys=False, allow_unicode=True))
        except OSError as error:
            if error.errno == errno.ENOSPC:
                raise
            raise self._not_writable(recipe, error.errno) from None

    def check_unchanged(self, recipe: Recipe, inputs: Sequence[Input], accept_changes: bool) -> None:
        """Refuse to resume a run whose data, models, code or packages have changed since it began.

        Raises:
            RecipeError: naming what has changed, with the remedies.
        """
        changes = self._changed_inputs(inputs)
        if changes and not accept_changes:
            names = listed([description for _, description in changes])
            verb = "have" if len(changes) > 1 or "weights" in changes[0][0].name else "has"
            message = f"{names} {verb} changed since the run in {self.path} began"
            remedies = f"restore what has changed, {_REMEDY}, {_ACCEPT}, or {_RESTART}"
            raise recipe.error(changes[0][0].key, f"{message}: {remedies}")

    def changes(self, recipe: Recipe, inputs: Sequence[Input]) -> list[str]:
        """What differs from the run in the folder and makes another student, in recipe and inputs."""
        before = None if self.last_checkpoint() is None else self.read_recipe()
        keys = [] if before is None else map(str, touching(before, recipe))
        return [*keys, *(description for _, description in self._changed_inputs(inputs))]

    def _changed_inputs(self, inputs: Sequence[Input]) -> list[tuple[Input, str]]:
        if self.last_checkpoint() is None:
            return []
        before = self._read_inputs().get("inputs")
        if not isinstance(before, dict):
            message = "%s cannot be read: whether data, models and packages are those of the run's beginning is unknown"
            logger.warning(message, self.inputs)
            return []
        return changed(before, inputs)

    def _read_inputs(self) -> dict[str, Any]:
        try:
            return read_json(self.inputs) if self.inputs.is_file() else {}
        except ValueError:
            return {}

    def save_inputs(self, inputs: Sequence[Input], accepted: Sequence[str]) -> None:
        """Save what the run depends on now, and what has changed since it began and was accepted."""
        earlier = [] if self.last_checkpoint() is None else self.accepted_changes
        content = {"inputs": {each.name: each.value for each in inputs}, "accepted_changes": [*earlier, *accepted]}
        write_atomic(self.inputs, json.dumps(content, indent=1, ensure_ascii=False))

    @property
    def accepted_changes(self) -> list[str]:
        accepted = self._read_inputs().get("accepted_changes")
        return accepted if isinstance(accepted, list) else []

    def _not_writable(self, recipe: Recipe, code: int | None) -> RecipeError:
        reason = os.strerror(code or errno.EIO)
        message = f"the run's folder {self.path} cannot be written ({reason}): {_REMEDY}"
        return recipe.error("training.output_dir", message)


def _kind(name: str, *patterns: Any, **options: Any) -> marker.Kind:
    return marker.Kind(name, tuple(map(str, patterns)), **options)


REPORT = marker.Kind("report", ("report.html", "report.json", "png"))
EVALUATION = _kind("evaluation", RunFolder.evaluation, RunFolder.failed, RunFolder.log)
RUN = _kind(
    *("run", RunFolder.recipe, checkpoint.PATTERN, RunFolder.student, RunFolder.teacher_responses, RunFolder.inputs),
    *(RunFolder.soft_prompt, RunFolder.metrics, RunFolder.samples, RunFolder.before, RunFolder.run_json),
    RunFolder.vllm_log,
    RunFolder.report,
    nested={str(RunFolder.report): REPORT},
)


def _seed_and_row(line: dict[str, Any]) -> tuple[int, int]:
    seed, row = (line.get(name) for name in ("seed", "row"))
    return seed if isinstance(seed, int) else 0, row if isinstance(row, int) else 0


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

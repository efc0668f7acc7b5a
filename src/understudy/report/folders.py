"""Find the folders of runs and read their files: of runs that are finished, in progress, interrupted or failed.

A folder may be read at any moment of a run, so files may be missing, and an incomplete last line is ignored. Nothing
heavy is imported, so that an error in a folder's name is reported at once.
"""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..files import read_jsonl
from ..recipe.yaml_nodes import read_yaml
from ..run.folder import RunFolder, read_json, read_mapping
from . import records
from .records import checked, numeric

_DEPTHS = ("*", "*/*", "*/*/*")  # OUTPUT/<recipe>/<option>=<value>/seed-<n>
_SEED = re.compile(r"seed-(\d+)")
_DEFAULT_SEED = 42  # of transformers' TrainingArguments
_COMPARISON = "comparison.json"


@dataclass(frozen=True)
class RunRecord:
    """The content of a run's folder so far."""

    folder: RunFolder
    name: str  # of the variant: runs of the same name differ in their seeds
    recipe: dict[str, Any] = field(default_factory=dict)
    recipe_text: str = ""
    lines: list[dict[str, Any]] = field(default_factory=list)  # metrics.jsonl
    samples: list[dict[str, Any]] = field(default_factory=list)  # samples.jsonl
    before: dict[str, float] = field(default_factory=dict)  # the distance on student samples before training
    summary: dict[str, Any] | None = None  # run.json, once the run is finished
    failed: str | None = None  # the error of a failed run of a comparison
    evaluation: dict[str, Any] | None = None  # evaluation.json: {"settings": …, "results": …}
    measurements: dict[str, dict[str, Any]] = field(default_factory=dict)  # *.metrics.json of `understudy evaluate`
    responses: dict[str, list[dict[str, Any]]] = field(default_factory=dict)  # evaluated ones, by the settings' name
    changed: float = 0.0  # the time of the last log line, in seconds since 1970

    @property
    def seed(self) -> int:
        """The seed of training."""
        seed = (self.summary or {}).get("seed", dig(self.recipe, "training", "seed"))
        if seed is None and (match := _SEED.fullmatch(self.folder.path.name)):
            seed = match[1]
        return _DEFAULT_SEED if seed is None else int(seed)

    @property
    def student(self) -> str:
        """The saved student, as a model's name."""
        return str(self.folder.student)

    @property
    def has_student(self) -> bool:
        return self.folder.student.is_dir()


def find_runs(places: Sequence[Path]) -> list[Path]:
    """The runs' folders in `places`, each of which is a run's folder or contains some, as a comparison's output does.

    Raises:
        ValueError: naming the first place that is neither, with the remedy.
    """
    paths: dict[Path, None] = {}
    for place in places:
        if not place.is_dir():
            raise ValueError(
                f"there is no folder {place}: name a run's folder, such as runs/gkd, or one that contains runs"
            )
        nested = (path for depth in _DEPTHS for path in sorted(place.glob(depth)))
        here = [place] if _is_run(place) else [path for path in nested if _is_run(path)]
        if not here:
            raise ValueError(
                f"{place} is not a run's folder and contains none: name one with a recipe.yaml of `understudy distill`"
            )
        paths |= dict.fromkeys(here)
    return list(paths)


def read_runs(places: Sequence[Path]) -> list[RunRecord]:
    """Read the folders of the runs in `places`.

    Raises:
        ValueError: as `find_runs`, and for a file of a run that cannot be read, naming it.
    """
    paths = find_runs(places)
    homes = [place.resolve() for place in places if (place / _COMPARISON).is_file()]
    if len(homes) == len(places) == 1:
        base = homes[0]  # so that runs have the names that they have in the comparison
    else:
        base = Path(os.path.commonpath([path.resolve() for path in paths])) if len(paths) > 1 else None
    named = [(place, read_comparison(place).get("folders", {})) for place in homes]
    known = {place / folder: name for place, folders in named for folder, name in folders.items()}
    return [_read(RunFolder(path), known.get(path.resolve().parent) or _name(path, base)) for path in paths]


def read_comparison(place: Path) -> dict[str, Any]:
    """The content of comparison.json in a comparison's folder; empty if there is none yet."""
    path = place / _COMPARISON
    return checked(path, read_json(path), records.Comparison) if path.is_file() else {}


def _is_run(path: Path) -> bool:
    folder = RunFolder(path)
    return path.is_dir() and any(file.is_file() for file in (folder.recipe, folder.metrics, folder.failed))


def _name(path: Path, base: Path | None) -> str:
    """The run's name: its folder relative to `base`, without the seed."""
    path = path.resolve()
    parts = path.relative_to(base).parts if base is not None else path.parts[-3:]
    parts = [part for part in parts if not _SEED.fullmatch(part)]
    return " ".join(parts if base is not None else parts[-1:]) or (base or path).name


def _read(folder: RunFolder, name: str) -> RunRecord:
    text = folder.recipe.read_text(encoding="utf-8", errors="replace") if folder.recipe.is_file() else ""
    recipe = read_mapping(folder.recipe, lambda text: read_yaml(text)[0], text) if text else {}
    before, summary, evaluation = folder.read_before(), folder.read_run_json(), folder.read_evaluation()
    return RunRecord(
        folder=folder,
        name=name,
        recipe=checked(folder.recipe, recipe, records.RecipeRecord),
        recipe_text=text,
        lines=[numeric(line) for line in read_jsonl(folder.metrics)],
        samples=read_jsonl(folder.samples),
        before=checked(folder.before, before or {}, records.Before).get("student_samples", {}),
        summary=None if summary is None else checked(folder.run_json, summary, records.Summary),
        failed=folder.read_failed(),
        evaluation=None if evaluation is None else checked(folder.evaluation, evaluation, records.Evaluation),
        measurements={
            name: checked(folder.path / f"{name}.metrics.json", part, records.Part)
            for name, part in folder.read_measurements().items()
        },
        responses=folder.read_responses(),
        changed=folder.metrics.stat().st_mtime if folder.metrics.is_file() else 0.0,
    )


def dig(content: Any, *keys: str) -> Any:
    """`content[key][key]…`, or None where a key is missing."""
    for key in keys:
        content = content.get(key) if isinstance(content, dict) else None
    return content

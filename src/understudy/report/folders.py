"""What the folders of runs hold, as plain values: of runs that are finished, in progress, interrupted or failed.

The one idea: a folder may be read at any moment of a run, so nothing but a sign of a run has to be there, and a line
that is being written is left for the next time. Nothing heavy is imported: mistakes in a folder's name answer at once.
"""

import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

_SIGNS = ("recipe.yaml", "metrics.jsonl", "failed.txt")  # any of these makes a folder a run's
_DEPTHS = ("*", "*/*", "*/*/*")  # OUTPUT/<recipe>/<option>=<value>/seed-<n>
_SEED = re.compile(r"seed-(\d+)")
_ANSWERS = re.compile(r"answers-(.+)\.[0-9a-f]{8}\.jsonl")  # compare.judge


@dataclass(frozen=True)
class RunFolder:
    """One run's folder."""

    path: Path
    name: str  # the contestant's: runs of one name differ in their seeds
    recipe: dict[str, Any] = field(default_factory=dict)
    recipe_text: str = ""
    lines: list[dict[str, Any]] = field(default_factory=list)  # metrics.jsonl
    samples: list[dict[str, Any]] = field(default_factory=list)  # samples.jsonl
    before: dict[str, float] = field(default_factory=dict)  # the distance on own samples when the run began
    summary: dict[str, Any] | None = None  # run.json, once the run is finished
    failed: str | None = None  # why, where a comparison's run has failed
    evaluation: dict[str, Any] | None = None  # evaluation.json: {"trial": …, "found": …}
    measured: dict[str, dict[str, Any]] = field(default_factory=dict)  # *.metrics.json of `understudy evaluate`
    answers: dict[str, list[dict[str, Any]]] = field(default_factory=dict)  # a comparison's, by sampling
    changed: float = 0.0  # when anything was logged last, in seconds since 1970

    @property
    def seed(self) -> int:
        """The seed of training: transformers' default where nothing says another."""
        found = (self.summary or {}).get("seed", dig(self.recipe, "training", "seed"))
        if found is None and (folder := _SEED.fullmatch(self.path.name)):
            found = folder[1]
        return 42 if found is None else int(found)

    @property
    def has_student(self) -> bool:
        return (self.path / "student").is_dir()


def find(places: Sequence[Path]) -> list[Path]:
    """The runs' folders in `places`, each of which is a run's folder or holds some, as a comparison's output does.

    Raises:
        ValueError: naming the first place that is none, and saying what is one.
    """
    found: dict[Path, None] = {}
    for place in places:
        if not place.is_dir():
            raise ValueError(
                f"there is no folder {place}: name a run's folder, such as runs/gkd, or one that holds runs"
            )
        here = [place] if _is_run(place) else [p for depth in _DEPTHS for p in sorted(place.glob(depth)) if _is_run(p)]
        if not here:
            raise ValueError(
                f"{place} is no run's folder and holds none: `understudy distill` writes a recipe.yaml into a run's"
            )
        found |= dict.fromkeys(here)
    return list(found)


def read(places: Sequence[Path]) -> list[RunFolder]:
    """Everything that the runs in `places` have written so far.

    Raises:
        ValueError: as `find`, and for a file of a run that cannot be read, naming it.
    """
    paths = find(places)
    homes = [place.resolve() for place in places if (place / "comparison.json").is_file()]
    if len(homes) == len(places) == 1:
        base = homes[0]  # so that names are those of the comparison
    else:
        base = Path(os.path.commonpath([path.resolve() for path in paths])) if len(paths) > 1 else None
    return [_read(path, _name(path, base)) for path in paths]


def _is_run(path: Path) -> bool:
    return path.is_dir() and any((path / sign).is_file() for sign in _SIGNS)


def _name(path: Path, base: Path | None) -> str:
    """What tells a run's folder from the others, without its seed."""
    path = path.resolve()
    parts = path.relative_to(base).parts if base is not None else path.parts[-3:]
    parts = [part for part in parts if not _SEED.fullmatch(part)]
    return " ".join(parts if base is not None else parts[-1:]) or (base or path).name


def _read(path: Path, name: str) -> RunFolder:
    summary, evaluation, failed = path / "run.json", path / "evaluation.json", path / "failed.txt"
    recipe, before = path / "recipe.yaml", path / "before.json"
    logged = path / "metrics.jsonl"
    judged = read_json(evaluation) if evaluation.is_file() else None
    text = recipe.read_text(encoding="utf-8") if recipe.is_file() else ""
    return RunFolder(
        path=path,
        name=name,
        recipe=_mapping(recipe, yaml.safe_load, text) if text else {},
        recipe_text=text,
        lines=read_lines(logged),
        samples=read_lines(path / "samples.jsonl"),
        before=read_json(before).get("own_samples", {}) if before.is_file() else {},
        summary=read_json(summary) if summary.is_file() else None,
        failed=failed.read_text(encoding="utf-8").strip() if failed.is_file() else None,
        evaluation=judged,
        measured={p.name.removesuffix(".metrics.json"): read_json(p) for p in sorted(path.glob("*.metrics.json"))},
        answers=read_answers(path),
        changed=logged.stat().st_mtime if logged.is_file() else 0.0,
    )


def read_answers(path: Path) -> dict[str, list[dict[str, Any]]]:
    """The answers that were judged, by sampling, in the order of the rows; of a judgement under way, those so far."""
    file = path / "evaluation.json"
    found = dig(read_json(file), "found") if file.is_file() else None
    if isinstance(found, dict):
        names = {name: str(dig(part, "answers") or f"answers-{name}.jsonl") for name, part in found.items()}
        files = {name: path / Path(file).name for name, file in names.items() if (path / Path(file).name).is_file()}
    else:
        under_way = sorted(path.glob("answers-*.jsonl"), key=lambda file: file.stat().st_mtime)
        files = {match[1]: file for file in under_way if (match := _ANSWERS.fullmatch(file.name))}
    lines = {name: read_lines(file) for name, file in files.items()}
    return {name: sorted(of, key=lambda line: (line.get("seed", 0), line.get("row", 0))) for name, of in lines.items()}


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        ValueError: naming the file, if it holds none.
    """
    return _mapping(path, json.loads, path.read_text(encoding="utf-8"))


def _mapping(path: Path, parse: Any, text: str) -> dict[str, Any]:
    try:
        content = parse(text)
    except (ValueError, yaml.YAMLError):
        content = None
    if not isinstance(content, dict):
        raise ValueError(f"{path} cannot be read: it is not what a run writes there; put it away, or restore it")
    return content


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSONL file, less a last line that is being written."""
    found = []
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n") if path.is_file() else []:
        try:
            content = json.loads(line)
        except ValueError:
            continue
        if isinstance(content, dict):
            found.append(content)
    return found


def dig(content: Any, *keys: str) -> Any:
    """`content[key][key]…`, or None where there is no such thing."""
    for key in keys:
        content = content.get(key) if isinstance(content, dict) else None
    return content

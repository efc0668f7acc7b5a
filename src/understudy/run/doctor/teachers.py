"""Teachers: where their scores come from, and whether these can be had."""

from collections.abc import Iterator
from typing import Any

from ...models.load import load_config
from ...models.skeleton import missing_package
from ...recipe import Recipe
from ...teacher import Teacher
from ...teachers.cached import CachedTeacher
from ...teachers.server import ServerTeacher
from ..prepare import Prepared, teacher_parts, uses_teacher
from ..refusals import Refusals
from .findings import Finding, Section, green, red, size, yellow

_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")


def teachers(recipe: Recipe, prepared: Prepared, refusals: Refusals) -> Section:
    """The section about teachers; what they cannot provide or score is refused while a run is prepared."""
    section, teacher = Section("teacher"), prepared.teacher
    add = section.findings.append
    if recipe.teacher is None:
        add(green("this method needs no teacher"))
        return section
    if teacher is None or prepared.method is None:
        return section
    if not uses_teacher(prepared.method):
        add(yellow(f"{recipe.method[0]} uses no teacher: leave the block out, or choose another method"))
    refused = {getattr(refusal.error, "key", None) for refusal in refusals.collected if refusal.topic == "teacher"}
    for key, part in teacher_parts(recipe, teacher).items():
        section.findings += _part(recipe, key, part, key in refused)
    return section


def _part(recipe: Recipe, key: str, part: Teacher, is_refused: bool) -> Iterator[Finding]:
    name = key.removeprefix("teacher.") if key != "teacher" else "the teacher"
    if isinstance(part, CachedTeacher):
        yield from _cached(part, is_refused)
    elif isinstance(part, ServerTeacher) and not is_refused:
        window = "" if part.context_length is None else f"; it reads {part.context_length:,} tokens"
        yield green(f"{name}'s server answers, its scores are reproducible and each is of its own token{window}")
    if part.source is None:
        return
    if (package := missing_package(part.source.quantization)) is not None:
        yield red(str(recipe.error(key, f"the quantization of {name} needs {package}: pip install {package}")))
    if (sentence := experts(part.source.name)) is not None:
        yield green(f"{name} is a mixture of experts: {sentence}")


def _cached(part: CachedTeacher, is_refused: bool) -> Iterator[Finding]:
    count = sum(path.stat().st_size for path in part.folder.rglob("*") if path.is_file())
    manifest = part.manifest
    kind = f"the top {manifest.top_k} tokens" if manifest.kind == "top_k" else "hidden rows, which give every token's"
    yield green(f"{part.folder} has log-probabilities of {kind} in {manifest.dtype}: {size(count)}, memory-mapped")
    if not is_refused:
        yield green(f"every row of the data is among its {len(part.shards.places):,} examples")


def experts(name: str) -> str | None:
    """How many experts a model has and uses; None if it has none, or cannot be loaded, which is refused elsewhere."""
    try:
        config: Any = load_config(name)
    except ValueError:
        return None
    count = next((getattr(config, key) for key in _EXPERTS if getattr(config, key, None)), None)
    used = getattr(config, "num_experts_per_tok", None)
    return None if count is None else f"all {count} experts are in memory, and {used or 'some'} compute a token"

"""Run a teacher once over a dataset, and save its scores in a folder for the teacher `cached`.

What is scored are the dataset's responses, or responses that the teacher or the student generates first; these are
saved in responses.jsonl, which `data.dataset` reads with exactly the same token ids. A process that was killed goes on
where it was, and the files become the same as without the interruption. Further datasets may be added to a folder.
"""

import hashlib
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from rich.progress import Progress
from transformers import TrainingArguments, set_seed

from ..batch import Example
from ..data.load import data_settings
from ..evaluation.responses import generate_responses
from ..files import remove, replace_folder
from ..generation.stop_tokens import stop_ids
from ..models.fingerprint import fingerprint, tokenizer_fingerprint
from ..models.student import load_student
from ..models.vocabulary import vocabulary_size
from ..recipe import Recipe
from ..teacher import Capability, Teacher
from ..teachers.cached import DTYPES, Kind, Manifest, Shards, example_key
from .arguments import training_arguments
from .prepare import Prepared, held_out_data, prepare
from .write_scores import write_scores

# By the author of the responses, the method that needs of a recipe what is needed here, and whose checks apply.
_METHODS = {"dataset": ("kd", {}), "teacher": ("seqkd", {"soft_weight": 0.5}), "student": ("gkd", {})}


@dataclass(frozen=True)
class CacheSettings:
    """What is scored and saved: options of `understudy cache`."""

    kind: Kind = "top_k"
    top_k: int = 64  # K, for the kind top_k
    dtype: str | None = None  # default: the first one of the kind in DTYPES
    responses: str = "dataset"  # or teacher, or student
    batch_size: int = 32  # sequences that are scored at once
    shard_mb: float = 64.0  # of a file; what a killed process loses at most

    def __post_init__(self) -> None:
        if self.responses not in _METHODS:
            raise ValueError(f"responses are of {', '.join(_METHODS)}, and not of {self.responses}")
        if self.dtype is not None and self.dtype not in DTYPES[self.kind]:
            raise ValueError(f"{self.kind} is saved in {' or '.join(DTYPES[self.kind])}, not in {self.dtype}")


@dataclass(frozen=True)
class CacheSummary:
    """What a cache holds after `cache`, and what was added."""

    examples: int
    tokens: int  # of responses
    added: int  # examples
    bytes: int  # of all scores
    seconds: float  # of scoring what was added
    without_held_out: bool  # does the recipe have a held-out dataset that lacks responses?


def cache(recipe: Recipe, folder: Path, settings: CacheSettings, progress: Progress | None = None) -> CacheSummary:
    """Save the scores of the recipe's teacher on its training data, and on its held-out data if that has responses.

    Raises:
        RecipeError: for what is wrong with the recipe, before anything is computed.
        ValueError: for a folder that holds something else, scores of another teacher or other settings, or that another
            process writes to.
    """
    method = _METHODS[settings.responses]
    recipe = recipe.model_copy(update={"method": method, "corpus": None, "reward": None})
    arguments = training_arguments(recipe)
    prepared = prepare(recipe)
    teacher, tokenizer = prepared.teacher, prepared.configs.tokenizer
    assert teacher is not None  # the method requires one
    if not teacher.scores_new_responses:
        raise recipe.error("teacher", "this teacher is a cache itself: name the teacher that computes the scores")
    if teacher.needs_student:
        message = "this teacher is the student: name the student's model as a local teacher to save its scores"
        raise recipe.error("teacher", message)
    if any(part.tokenizer is not None for part in teacher.parts().values()):
        message = "a teacher with another tokenizer gives no log-probabilities of the student's tokens to save"
        raise recipe.error("teacher", f"{message}: train with it directly")
    has_held_out = prepared.held_out is not None and prepared.held_out.has_responses
    manifest = _manifest(recipe, prepared, settings, has_held_out)
    before = _existing(folder)
    if before is not None:
        before.check_same(replace(manifest, weights=before.weights, teacher=before.teacher), folder)
    with recipe.locating("teacher"):
        teacher.to(arguments.device)
    manifest = replace(manifest, weights=_weights(teacher, manifest.teacher))
    if before is not None:
        before.check_same(manifest, folder)
        manifest = replace(before, data=(*before.data, *(d for d in manifest.data if d not in before.data)))
    with _locked(folder):
        manifest.write(folder)
        _save_tokenizer(folder, tokenizer)
        examples = [*prepared.train.examples]
        if settings.responses != "dataset":
            examples = _generated(recipe, prepared, settings.responses == "teacher", folder, arguments, progress)
        if prepared.held_out is not None and has_held_out:
            examples += prepared.held_out.examples
        by_key = {example_key(example): example for example in examples}
        advance = _task(progress, "scores", len(by_key))
        start = time.perf_counter()
        added = write_scores(folder, manifest, teacher, by_key, settings.batch_size, settings.shard_mb, advance)
        seconds = time.perf_counter() - start
    return _summary(folder, added, seconds, without_held_out=prepared.held_out is not None and not has_held_out)


def _manifest(recipe: Recipe, prepared: Prepared, settings: CacheSettings, has_held_out: bool) -> Manifest:
    """The manifest, without a hash of the weights, which are not loaded yet."""
    teacher, tokenizer = prepared.teacher, prepared.configs.tokenizer
    assert teacher is not None
    vocabulary = vocabulary_size(tokenizer)
    data = [{**data_settings(recipe.data, tokenizer), "responses": settings.responses}]
    if has_held_out:
        data.append({**data_settings(held_out_data(recipe), tokenizer), "responses": "dataset"})
    return Manifest(
        kind=settings.kind,
        dtype=settings.dtype or DTYPES[settings.kind][0],
        vocabulary=vocabulary,
        top_k=min(settings.top_k, vocabulary) if settings.kind == "top_k" else None,
        chosen=teacher.can(Capability.CHOSEN),
        teacher=json.dumps(recipe.resolved()["teacher"], sort_keys=True),
        weights=None,
        tokenizer=tokenizer_fingerprint(tokenizer),
        data=tuple(json.loads(json.dumps(data))),
    )


def _weights(teacher: Teacher, block: str) -> str | None:
    """A hash of the teacher's weights, or the one that a server tells; of several teachers one of all and the block."""
    models = {key: (part.local_model, part.fingerprint) for key, part in teacher.parts().items()}
    hashes = {key: other if model is None else fingerprint(model) for key, (model, other) in models.items()}
    if "" in hashes:
        return hashes[""]
    return hashlib.sha256(json.dumps([block, hashes], sort_keys=True).encode()).hexdigest()[:16]


def _existing(folder: Path) -> Manifest | None:
    """The manifest of a cache that is in the folder already; None for a new or empty one."""
    if not folder.exists() or {path.name for path in folder.iterdir()} <= {".lock", "cache.json.partial"}:
        return None
    return Manifest.read(folder)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / ".lock", timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise ValueError(f"another process is writing to {folder}: let it end, or give another --output") from None
    try:
        yield
    finally:
        lock.release()


def _save_tokenizer(folder: Path, tokenizer: Any) -> None:
    partial, path = folder / "tokenizer.partial", folder / "tokenizer"
    if not path.is_dir():
        remove(partial)
        tokenizer.save_pretrained(partial)
        replace_folder(partial, path)


def _generated(
    recipe: Recipe,
    prepared: Prepared,
    by_teacher: bool,
    folder: Path,
    arguments: TrainingArguments,
    progress: Progress | None,
) -> list[Example]:
    """The training data's prompts with responses of the teacher or the student; those in the folder are read."""
    teacher, tokenizer, sampling = prepared.teacher, prepared.configs.tokenizer, prepared.sampling
    assert teacher is not None
    model, author = teacher.model, "teacher" if by_teacher else "student"
    if not by_teacher:
        set_seed(arguments.seed)
        with recipe.locating("student"):
            model = load_student(recipe, prepared.configs.student, teacher.model_name).to(arguments.device).eval()
    if not sampling.stop_ids:
        sampling = replace(sampling, stop_ids=tuple(stop_ids(tokenizer, model, teacher.model)))
    seeds = range(arguments.seed, arguments.seed + sampling.n)
    sampling = replace(sampling, n=1, logprobs=False)
    generated = generate_responses(
        *(model, tokenizer, prepared.train, prepared.rollout, sampling, seeds, lambda text, row: None),
        author=author,
        path=folder / "responses.jsonl",
        on_progress=_task(progress, f"{author}'s responses", len(seeds) * len(prepared.train)),
        prompt_tokens=True,
    )
    return [replace(response.example, trained=None, streams={}) for response in generated.responses]


def _task(progress: Progress | None, description: str, total: int) -> Callable[[int], None]:
    """Show a task of `total` steps; returns a function that is called with the number of further steps."""
    if progress is None:
        return lambda number: None
    task = progress.add_task(description, total=total)
    return lambda number: progress.advance(task, number)


def _summary(folder: Path, added: int, seconds: float, without_held_out: bool) -> CacheSummary:
    places = Shards(folder).places.values()
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    return CacheSummary(len(places), sum(b - a for _, a, b in places), added, size, seconds, without_held_out)

"""Comparing recipes: the same data, the same evaluation, several seeds.

    OUTPUT/<contestant>/seed-<n>/   a run's folder, and in it evaluation.json, log.txt and answers-*.jsonl
    OUTPUT/reference/               what the teacher and the warm start answer
    OUTPUT/comparison.json, .md     every result, and the table

Every run has a process of its own, so that one that fails leaves the others alone. The same command again goes on
where it stopped: runs and evaluations that are finished stay.
"""

import hashlib
import json
import multiprocessing
import os
import time
import traceback
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from .. import mark
from ..data.examples import Examples
from ..evaluation.evaluate import evaluate
from ..evaluation.responses import identity
from ..methods import METHODS
from ..models.student import all_stop_ids, load_config, load_model, load_tokenizer, teacher_name, window_of
from ..playground.names import resolve
from ..recipe import Recipe, RecipeError, load
from ..recipe_yaml import value_of
from ..rollouts import ROLLOUTS
from ..rollouts.generate import GenerateRollout
from ..run.distill import distill, load_data
from ..run.folder import write
from ..teachers.local import LocalTeacher
from . import statistics as comparison
from .statistics import Result


@dataclass(frozen=True)
class Contestant:
    """A recipe with what is changed in it; `name` is its folder's."""

    name: str
    recipe: Path
    overrides: tuple[str, ...] = ()
    swept: tuple[str, str] | None = None  # the option that a sweep sets, and its value as it was written

    def load(self, *more: str) -> Recipe:
        """The recipe, with the contestant's overrides and `more`."""
        return load(self.recipe, [*self.overrides, *more])


@dataclass(frozen=True)
class Trial:
    """How every model is tried: on which problems, by which sampling and metrics."""

    dataset: str | None = None  # default: the recipe's own
    split: str = "test"
    limit: int | None = None
    temperatures: tuple[float, ...] = (0.0,)
    metrics: tuple[str, ...] = ()  # beside accuracy, lengths and truncation
    exposure: int = 0  # prompts on which exposure bias is measured, against `teacher`
    teacher: str | None = None  # found out by `compare`
    seed: int = 0
    batch_size: int = 256

    @property
    def samplings(self) -> dict[str, float]:
        """What each sampling is called: greedy, T=1."""
        return {"greedy" if t == 0 else f"T={t:g}": t for t in self.temperatures}


def contestants(recipes: Sequence[Path], overrides: Sequence[str] = (), sweep: str | None = None) -> list[Contestant]:
    """One for each recipe, or one for each recipe and value of a `sweep` such as "method.gkd.on_policy=0,0.5,1".

    Raises:
        RecipeError: for two recipes of the same name, and a sweep without values.
    """
    made = [Contestant(path.stem, path, tuple(overrides)) for path in recipes]
    if sweep is not None:
        key, _, values = sweep.partition("=")
        if not key or not values:
            raise RecipeError(
                f"a sweep is written key=value,value,…, such as training.learning_rate=1e-3,1e-4, not {sweep}"
            )
        short = key.rpartition(".")[2]
        made = [
            Contestant(f"{c.name} {short}={value}", c.recipe, (*c.overrides, f"{key}={value}"), (key, value))
            for c in made
            for value in values.split(",")
        ]
    if len({c.name for c in made}) < len(made):
        raise RecipeError("two of the recipes have the same file name, by which runs are told apart: rename one")
    return made


def budget_override(text: str) -> str:
    """What gives a recipe the budget `tokens=100000` or `seconds=60`, instead of its own.

    Raises:
        RecipeError: for anything else; what the amount may be is the recipe's to say.
    """
    kind, _, amount = text.partition("=")
    if kind not in ("tokens", "seconds") or not amount:
        raise RecipeError(f"a budget is written tokens=N or seconds=N, such as tokens=100000, not {text}")
    return f"budget={{{kind}: {amount}}}"


def compare(
    entered: Sequence[Contestant],
    output: Path,
    trial: Trial,
    seeds: int = 1,
    parallel: int = 1,
    baseline: str | None = None,
    console: Console | None = None,
) -> str:
    """Run every contestant with the seeds 0 … seeds − 1, judge all students alike, and return the table in Markdown.

    The teacher and the student that the runs begin with are judged as well, where all contestants share them.

    Raises:
        RecipeError: for a recipe that cannot be read, before anything is run, and an unknown baseline.
    """
    console = console or Console()
    recipes = [c.load() for c in entered]
    for recipe in recipes:
        recipe.check("method", METHODS)
        recipe.check("rollout", ROLLOUTS)
    if baseline is not None and baseline not in {c.name for c in entered}:
        raise RecipeError(f'the baseline "{baseline}" is none of {", ".join(c.name for c in entered)}')
    if trial.dataset is None and len({recipe.data.dataset for recipe in recipes}) > 1:
        raise RecipeError(
            "the recipes have different datasets: name the one that all students are judged on, with --data"
        )
    jobs = [(c, seed, output / c.name.replace(" ", "/") / f"seed-{seed}") for seed in range(seeds) for c in entered]
    extra = _references(recipes)
    _check_free(output, [folder for *_, folder in jobs], [reference_folder(output, model) for model in extra.values()])
    _refuse_others(jobs)
    if trial.exposure:
        if "teacher" not in extra:
            raise RecipeError(
                "exposure bias needs one teacher for all recipes that name one, and there are several or none"
            )
        trial = replace(trial, teacher=extra["teacher"])
    output.mkdir(parents=True, exist_ok=True)
    mark.mark(output, "comparison")
    threads = max(1, (os.cpu_count() or 1) // parallel)
    tasks: list[tuple[Any, ...]] = []  # what is to be done, the folder that it is done in, and what with
    tasks += [(_judge_reference, reference_folder(output, m), m, entered[0], trial) for m in extra.values()]
    tasks += [(_run, folder, contestant, seed, trial) for contestant, seed, folder in jobs]
    unfinished = [task for task in tasks if isinstance(result(task[1], trial), str)]
    _work(unfinished, threads, parallel, console)

    results: dict[str, dict[int, Result | str]] = {c.name: {} for c in entered}
    for contestant, seed, folder in jobs:
        results[contestant.name][seed] = result(folder, trial)
    judged = {name: result(reference_folder(output, model), trial) for name, model in extra.items()}
    known = {name: r for name, r in judged.items() if isinstance(r, Result)}
    table = comparison.lines(results, baseline, known.get("teacher"), known.get("warm start"))
    first = [m for m in ("accuracy", *trial.metrics) if any(m in v for line in table for v in line.metrics.values())]
    columns = [(name, metric) for name in trial.samplings for metric in first]
    columns += [(name, "response_length") for name in trial.samplings]
    columns += [("exposure", "exposure_bias")] if trial.exposure else []
    text = comparison.markdown(table, columns, known)
    content = {
        "trial": asdict(trial),
        "baseline": baseline,
        "budget": recipes[0].resolved().get("budget") if len({r.budget for r in recipes}) == 1 else None,
        "sweep": _sweep(entered),
        "references": {name: asdict(r) if isinstance(r, Result) else r for name, r in judged.items()},
        "lines": [asdict(line) for line in table],
        "runs": {name: {seed: str(folder) for c, seed, folder in jobs if c.name == name} for name in results},
    }
    write(output / "comparison.json", json.dumps(content, indent=2))
    write(output / "comparison.md", text)
    return text


def _recipe_of(contestant: Contestant, seed: int, folder: Path) -> Recipe:
    """What is run in the folder."""
    place = f"training.output_dir={json.dumps(str(folder))}"
    return contestant.load(place, f"training.seed={seed}", "training.disable_tqdm=true")


def _check_free(output: Path, runs: Sequence[Path], references: Sequence[Path]) -> None:
    """Change nothing, and refuse folders with files that the comparison would replace and did not write."""
    remedy = "give another --output"
    mark.check(output, "comparison", remedy)
    for folder in runs:
        mark.check(folder, "run", remedy)
    for folder in (*runs, *references):
        mark.check(folder, "judgement", remedy)


def _refuse_others(jobs: Sequence[tuple[Contestant, int, Path]]) -> None:
    """Finished runs stay, so that those of another budget, say, would be shown as what is asked for now."""
    for contestant, seed, folder in jobs:
        finished = (folder / "run.json").is_file() and (folder / "recipe.yaml").is_file()
        if finished and load(folder / "recipe.yaml").resolved() != _recipe_of(contestant, seed, folder).resolved():
            message = f"{folder} holds a finished run of {contestant.name} with other settings or another budget"
            raise RecipeError(f"{message}: give another --output, or delete it")


def _sweep(entered: Sequence[Contestant]) -> dict[str, Any] | None:
    """Which option a sweep set, and for each contestant whose recipe and to what; values as YAML reads them."""
    points = {
        c.name: {"recipe": c.recipe.stem, "value": value_of(c.swept[1]), "written": c.swept[1]}
        for c in entered
        if c.swept is not None
    }
    return {"option": entered[0].swept[0], "points": points} if points and entered[0].swept else None


def _references(recipes: Sequence[Recipe]) -> dict[str, str]:
    """The models beside which the students are seen: the teacher and the warm start, if there is one for all."""
    teachers = {teacher_name(recipe) for recipe in recipes} - {None}
    starts = {recipe.student.model for recipe in recipes}
    found = {"teacher": teachers, "warm start": starts}
    return {name: str(next(iter(models))) for name, models in found.items() if len(models) == 1 and None not in models}


def _work(tasks: list[tuple[Any, ...]], threads: int, parallel: int, console: Console) -> None:
    """Do every task in a process of its own, `parallel` at a time."""
    context = multiprocessing.get_context("spawn")
    waiting, running = list(tasks), []
    bar = Progress(TextColumn("compare"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), console=console)
    try:
        with bar as progress:
            shown = progress.add_task("", total=len(tasks))
            while waiting or running:
                while waiting and len(running) < parallel:
                    work, *arguments = waiting.pop(0)
                    process = context.Process(target=_child, args=(work, arguments, threads))
                    process.start()
                    running.append(process)
                time.sleep(0.2)
                done = [p for p in running if not p.is_alive()]
                running = [p for p in running if p.is_alive()]
                progress.advance(shown, len(done))
    finally:
        for process in running:
            process.terminate()


def _child(work: Any, arguments: list[Any], threads: int) -> None:
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(threads)
    work(*arguments)


def _run(folder: Path, contestant: Contestant, seed: int, trial: Trial) -> None:
    """Train one contestant with one seed and judge its student; what goes wrong is written to failed.txt."""
    _claim(folder)
    (folder / "failed.txt").unlink(missing_ok=True)
    with (folder / "log.txt").open("a", encoding="utf-8") as log:
        console = Console(file=log, width=120)
        try:
            recipe = _recipe_of(contestant, seed, folder)
            distill(recipe, console=console)
            judge(str(folder / "student"), recipe, folder, trial)
        except Exception as error:
            traceback.print_exc(file=log)
            write(folder / "failed.txt", " ".join(str(error).split()) or type(error).__name__)


def _judge_reference(folder: Path, model: str, contestant: Contestant, trial: Trial) -> None:
    judge(model, contestant.load(), folder, trial)


def _claim(folder: Path) -> None:
    """Mark a folder, made where there is none, as one that holds what a judgement writes."""
    mark.check(folder, "judgement", "give another folder")
    folder.mkdir(parents=True, exist_ok=True)
    mark.mark(folder, "judgement")


def reference_folder(output: Path, model: str) -> Path:
    return output / "reference" / hashlib.sha256(model.encode()).hexdigest()[:8]


def judge(model: str, recipe: Recipe, folder: Path, trial: Trial) -> None:
    """Let a model answer as the trial says, on a recipe's data; write evaluation.json and the answers.

    Every file of answers is named after all that they depend on, so that those of another trial or of other weights
    stay, and the same ones are taken up.

    Raises:
        ValueError: for a folder with an evaluation.json that no judgement wrote.
    """
    _claim(folder)
    tokenizer = load_tokenizer(model)
    loaded = load_model(model, dtype="float32").eval()
    longest = recipe.rollout[1].get("max_new_tokens", GenerateRollout.max_new_tokens)
    data = {"dataset": trial.dataset or recipe.data.dataset, "split": trial.split, "limit": trial.limit}
    examples = load_data(recipe.data.model_copy(update=data), tokenizer, window_of(load_config(model)), longest)
    stops, size = all_stop_ids(tokenizer, loaded), trial.batch_size
    found: dict[str, Any] = {}
    for name, temperature in trial.samplings.items():
        rollout = GenerateRollout(longest, temperature, stop_ids=stops, batch_size=size)
        file = folder / f"answers-{name}.{_digest(trial.seed, examples, rollout, loaded)}.jsonl"
        judged = evaluate(loaded, tokenizer, examples, rollout, seed=trial.seed, metrics=trial.metrics, output=file)
        right = [a["correct"] for a in judged.answers]
        scores = None if None in right else [float(r) for r in right]
        found[name] = {"metrics": judged.metrics, "scores": scores, "answers": file.name}
    if trial.exposure and trial.teacher is not None and trial.teacher != model:
        some = replace(examples, examples=examples.examples[: trial.exposure], rows=examples.rows[: trial.exposure])
        teacher = LocalTeacher(resolve(trial.teacher), vocabulary=len(tokenizer), dtype="float32")
        rollout = GenerateRollout(longest, stop_ids=stops, batch_size=size)
        file = folder / f"answers-exposure.{_digest(trial.seed, some, rollout, loaded, teacher.model)}.jsonl"
        kept = {"seed": trial.seed, "output": file}
        judged = evaluate(loaded, tokenizer, some, rollout, teacher, exposure=True, **kept)
        found["exposure"] = {
            "metrics": judged.metrics,
            "scores": None,
            "curves": judged.curves,
            "answers": file.name,
        }
    write(folder / "evaluation.json", json.dumps({"trial": asdict(trial), "found": found}, indent=1))


def _digest(seed: int, examples: Examples, rollout: GenerateRollout, *models: Any) -> str:
    """8 hexadecimal digits that change with whatever the models' answers to the examples depend on."""
    settings = [identity(model, rollout, "student") for model in models]
    content = json.dumps([seed, settings, [example.prompt for example in examples.examples]], default=str)
    return hashlib.sha256(content.encode()).hexdigest()[:8]


def result(folder: Path, trial: Trial) -> Result | str:
    """What a run's folder holds of this trial, or why there is nothing."""
    file, run, failed = folder / "evaluation.json", folder / "run.json", folder / "failed.txt"
    content = json.loads(file.read_text(encoding="utf-8")) if file.exists() else None
    if content is None or content["trial"] != json.loads(json.dumps(asdict(trial))):
        other = "the process was killed" if content is None else "judged in another trial"
        return failed.read_text(encoding="utf-8") if failed.exists() else other
    found = content["found"]
    cost = json.loads(run.read_text(encoding="utf-8")) if run.exists() else {}
    return Result(
        metrics={name: part["metrics"] for name, part in found.items()},
        scores={name: part["scores"] for name, part in found.items() if part["scores"] is not None},
        **{name: cost.get(name) for name in ("seconds", "cpu_seconds", "tokens", "budget")},
    )

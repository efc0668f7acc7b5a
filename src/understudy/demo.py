"""The demo: distil a small model for arithmetic, after a warm start by SFT, with supervised KD and with GKD.

Both start from the same warm student and train on the same number of response tokens: supervised KD on the worked
solutions of the dataset, GKD on student samples.
"""

import time
from pathlib import Path
from typing import Any

from rich import get_console
from rich.console import Console
from rich.table import Table

from .compare.evaluations import evaluate_into, named_settings, read_result
from .compare.statistics import Result
from .data.load import load_data
from .evaluation.settings import EvalSettings
from .models.load import load_model, load_tokenizer
from .recipe import Data, load
from .report import write_report
from .run.distill import distill
from .run.folder import RunFolder
from .terminal import show

TEACHER = "playground:arithmetic"
_QUICK = ["training.max_steps=4", "training.logging_steps=2", "data.limit=200", "evaluate.show=1"]


def run_demo(folder: Path, quick: bool = False, seed: int = 0, console: Console | None = None) -> list[dict[str, Any]]:
    """Run the demo, print a table and return its rows: model, parameters, accuracy, tokens, seconds."""
    console = console or get_console()
    start = time.perf_counter()
    console.rule("[bold]understudy[/]: distil a large model into a small one")
    console.print(
        "The task: word problems with written-out working. The teacher ships with the package; the student starts\n"
        "from random weights, is warmed up on worked solutions, and then learns from the teacher in two ways.\n"
    )

    def train(name: str, *overrides: str) -> dict[str, Any]:
        console.rule(name)
        common = [f"training.seed={seed}", f"training.output_dir={folder / name}", *(_QUICK if quick else [])]
        recipe = load(f"playground/{name}", [*common, *overrides])
        return distill(recipe, restart=True, console=console)

    warm = train("warm_start")
    start_from = (f"student.model={warm['folder']}/student", "training.learning_rate=5e-3")
    on_policy = train("gkd", *start_from)
    steps = max(1, round(on_policy["tokens"] / _dataset_tokens_per_step()))
    supervised = train("kd", *start_from, f"training.max_steps={steps}")

    console.rule("500 held-out problems" if not quick else "a few held-out problems")
    models = {
        "teacher": (TEACHER, None),
        "student after SFT": (f"{warm['folder']}/student", warm),
        "  then supervised KD": (f"{supervised['folder']}/student", supervised),
        "  then GKD (λ = 0.5)": (f"{on_policy['folder']}/student", on_policy),
    }
    rows = [_evaluate(name, model, run, folder, quick) for name, (model, run) in models.items()]
    _show(rows, console)
    runs = [Path(run["folder"]) for run in (warm, supervised, on_policy)]
    page, _ = write_report(runs, folder / "report", models=not quick)
    show(f"report: {page}", console)
    show(f"runs: {folder}   in all {time.perf_counter() - start:.0f} s", console)
    return rows


def _dataset_tokens_per_step() -> float:
    """The mean number of response tokens in a step of supervised training, to give both methods the same number."""
    recipe = load("playground/kd")
    examples = load_data(recipe.data.model_copy(update={"limit": 2000}), load_tokenizer(TEACHER), None, 1)
    mean = sum(len(example.response) for example in examples) / len(examples)
    return mean * recipe.training["per_device_train_batch_size"]


def _evaluate(name: str, model: str, run: dict[str, Any] | None, folder: Path, quick: bool) -> dict[str, Any]:
    """Evaluate a model on the held-out problems, and save the evaluation in its folder, where the report reads it."""
    settings = named_settings(EvalSettings(Data(dataset=TEACHER, split="test", limit=20 if quick else 500)))
    place = RunFolder(Path(run["folder"]) if run else folder / "teacher")
    evaluate_into(place, model, settings)
    result = read_result(place, model, settings)
    assert isinstance(result, Result)
    return {
        "model": name,
        "parameters": sum(p.numel() for p in load_model(model).parameters()),
        "accuracy": result.metrics["greedy"]["accuracy"],
        "tokens": None if run is None else run["tokens"],
        "seconds": None if run is None else run["seconds"],
    }


def _show(rows: list[dict[str, Any]], console: Console) -> None:
    table = Table("model", title="accuracy on held-out problems (greedy), and what the training cost")
    for name in ("parameters", "accuracy", "tokens", "seconds"):
        table.add_column(name, justify="right")
    for row in rows:
        trained = ("", "") if row["tokens"] is None else (f"{row['tokens']:,}", f"{row['seconds']:.0f}")
        table.add_row(row["model"], f"{row['parameters']:,}", f"{row['accuracy']:.1%}", *trained)
    console.print(table)
    _, warm, supervised, on_policy = (row["accuracy"] for row in rows)
    console.print(
        f"GKD: {100 * (on_policy - warm):+.1f} points over its warm start, "
        f"{100 * (on_policy - supervised):+.1f} points over supervised KD with the same number of training tokens."
    )

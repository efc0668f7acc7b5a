"""Check a recipe completely and show what it would do, without training and without writing anything."""

from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from rich import get_console
from rich.console import Console
from rich.text import Text

from ..batch import Example
from ..recipe import Recipe
from ..terminal import escape, is_first_process, show, working
from .arguments import training_arguments
from .build import Run, build
from .folder import RunFolder
from .overview import lengths, show_overview

_TRAINED, _READ = "bold green", "dim"  # styles of tokens
_AUTHORS = {
    "dataset": "the dataset's responses",
    "student": "responses that the student generates",
    "teacher": "responses that the teacher generates",
    "corpus": "the corpus",
}


def dry_run(recipe: Recipe, restart: bool = False, console: Console | None = None) -> None:
    """Build a run as `distill` does, and print its overview, lengths and first example instead of training.

    Raises:
        RecipeError: as `distill`.
    """
    console = (console or get_console()) if is_first_process() else Console(quiet=True)
    arguments = training_arguments(recipe)
    folder = RunFolder(Path(arguments.output_dir or "."))
    folder.check_free(recipe, restart)
    with TemporaryDirectory() as temporary:  # the Trainer creates its folder when it is built
        with working("loading data and models", console):
            run = build(recipe, replace(arguments, output_dir=temporary), console)
        show_overview(run, folder.path, console)
        for name, text in lengths(run.train):
            show(f"{name:9} {text}", console)
        _show_first(run, console)
        show(f"checked; nothing was trained, and nothing was written to {folder.path}", console)


def _show_first(run: Run, console: Console) -> None:
    """Print the first example as the models read it, with the tokens that are trained on in colour."""
    authors = sorted(run.trainer.method.authors)
    show("trains on " + " and ".join(_AUTHORS.get(author, author) for author in authors), console)
    example = run.train[0] if "dataset" in authors else run.train[0].last_turn()
    styles = Text("first example: ").append("read", style=_READ).append(", ").append("trained on", style=_TRAINED)
    console.print(styles if console.color_system else Text("first example, «trained on» in these marks:"))
    console.print(rendered(example, run.tokenizer, marks=not console.color_system), soft_wrap=True)
    if "dataset" not in authors:
        show("(the response stands for those that are generated)", console)


def rendered(example: Example, tokenizer: Any, marks: bool = False) -> Text:
    """An example's text with special tokens; tokens that are trained on are in another style, or between « and »."""
    trained = set(example.trained_tokens)
    text = Text(escape(tokenizer.decode(example.prompt)), style=_READ)
    for is_trained, ids in _runs([i in trained for i in range(len(example.response))], example.response):
        part = escape(tokenizer.decode(ids))
        part = f"«{part}»" if marks and is_trained else part
        text.append(part, style=f"not dim {_TRAINED}" if is_trained else _READ)
    return text


def _runs(flags: list[bool], ids: list[int]) -> list[tuple[bool, list[int]]]:
    """Consecutive ids of the same flag, together."""
    runs: list[tuple[bool, list[int]]] = []
    for flag, token in zip(flags, ids, strict=True):
        if runs and runs[-1][0] == flag:
            runs[-1][1].append(token)
        else:
            runs.append((flag, [token]))
    return runs

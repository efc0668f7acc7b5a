"""Check a recipe completely and show what it would do, without training and without writing anything.

Models are loaded, as `distill` loads them. `understudy doctor` examines a recipe without them.
"""

from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

from rich import get_console
from rich.console import Console

from ..recipe import Recipe
from ..terminal import is_first_process, show, working
from .arguments import training_arguments
from .build import build
from .first_example import show_first_example
from .folder import RunFolder
from .overview import lengths, show_overview


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
        show_first_example(run.train, sorted(run.trainer.method.authors), run.tokenizer, console)
        show(f"checked; nothing was trained, and nothing was written to {folder.path}", console)

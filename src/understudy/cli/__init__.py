"""The command line. Heavy imports happen inside the commands, so that help and usage errors appear at once."""

import sys
import traceback
from typing import Annotated

import typer

from . import commands, environment, listings, shipped
from .serve import serve

app = typer.Typer(
    name="understudy",
    help="Distil a large language model (teacher) into a small one (student).",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    epilog="Add --debug to any command for the whole traceback of an error.",
)


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=environment.print_version, is_eager=True)
    ] = False,
) -> None:
    """Distil a large language model (teacher) into a small one (student)."""


_COMMANDS = (
    commands.demo,
    commands.doctor,
    commands.distill,
    commands.evaluate,
    commands.compare,
    commands.cache,
    commands.report,
    serve,
)
for _command in _COMMANDS:
    app.command()(_command)
app.add_typer(shipped.app, name="recipes", rich_help_panel="Lists, as YAML for a recipe")
for _listing in (listings.methods, listings.teachers, listings.rollouts, listings.divergences, listings.metrics):
    app.command(rich_help_panel="Lists, as YAML for a recipe")(_listing)
app.command()(environment.env)


def main() -> None:
    """Run the command line. An error is one sentence with exit code 2; --debug prints its traceback before it."""
    from ..run.output import lasting_output
    from ..terminal import INTERRUPTED, explain, leave_process_group, prepare

    prepare()
    arguments = [a for a in sys.argv[1:] if a != "--debug"]
    with lasting_output():
        try:
            code = app(arguments, standalone_mode=False)
            leave_process_group()
            if code == INTERRUPTED:  # some versions of typer return this after Ctrl-C
                raise KeyboardInterrupt
        except Exception as error:
            if "--debug" in sys.argv:
                traceback.print_exc()
            code = explain(error)
        except KeyboardInterrupt:
            code = INTERRUPTED
            typer.echo("interrupted", err=True)
    sys.exit(code or 0)

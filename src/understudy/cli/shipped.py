"""`understudy recipes`: list, show and copy the recipes that come with the package."""

import shutil
import textwrap
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(help="List, show or copy the recipes that come with understudy.", no_args_is_help=False)

_Name = Annotated[str, typer.Argument(help="A recipe's name, such as playground/gkd.", show_default=False)]


@app.callback(invoke_without_command=True)
def recipes(context: typer.Context) -> None:
    """List, show or copy the recipes that come with understudy."""
    if context.invoked_subcommand is None:
        list_recipes()


@app.command("list")
def list_recipes() -> None:
    """List the recipes by the names that distill and compare take."""
    from ..recipe import shipped

    names = shipped.names()
    width = max(map(len, names), default=0)
    room = max(20, shutil.get_terminal_size((120, 24)).columns - width - 2)
    for name in names:
        comment = shipped.named(name).read_text(encoding="utf-8").partition("\n")[0].lstrip("# ")
        typer.echo(f"{name:{width}}  {textwrap.shorten(comment, room, placeholder=' …')}")


@app.command("show")
def show_recipe(name: _Name) -> None:
    """Print a recipe."""
    from ..recipe import shipped

    typer.echo(shipped.named(name).read_text(encoding="utf-8"), nl=False)


@app.command("copy")
def copy_recipe(
    name: _Name,
    target: Annotated[Path | None, typer.Argument(help="A file or folder; by default NAME.yaml here.")] = None,
) -> None:
    """Copy a recipe to a file of your own, to change it there."""
    from ..recipe import shipped
    from ..terminal import show

    source = shipped.named(name)
    target = target or Path(source.name)
    target = target / source.name if target.is_dir() else target
    try:
        with target.open("x", encoding="utf-8") as file:
            file.write(source.read_text(encoding="utf-8"))
    except FileExistsError:
        raise FileExistsError(f"{target} exists already: name another file") from None
    except OSError as error:
        raise OSError(f"{target} cannot be written ({error.strerror}): name another file") from None
    show(f"{target}: try it with `understudy distill {target} --dry-run`")

"""`understudy methods`, `teachers`, `rollouts`, `divergences` and `metrics`: lists in YAML, to paste into a recipe."""

import dataclasses
import inspect
import typing
from typing import TYPE_CHECKING, Any

import typer
import yaml

if TYPE_CHECKING:
    from ..registry import Registry

_REQUIRED = "…"
_TEACHERS = f"{{first: {{local: {{model: {_REQUIRED}}}}}, second: {{local: {{model: {_REQUIRED}}}}}}}"


def methods() -> None:
    """List the methods with their papers, options and default values."""
    from ..methods import METHODS

    _print_blocks(METHODS, "method")


def teachers() -> None:
    """List the teachers with their options and default values."""
    from ..teachers import TEACHERS

    _print_blocks(TEACHERS, "teacher")


def rollouts() -> None:
    """List the rollouts with their options and default values, sampling parameters and schedule first."""
    from ..rollouts import ROLLOUTS
    from ..sampling import Sampling, Schedule

    _print_blocks(ROLLOUTS, "rollout", _defaults(Sampling) | _defaults(Schedule))


def divergences() -> None:
    """List the divergences with their options and default values."""
    from ..divergences import Divergence
    from ..registry import Registry

    registry: Registry[Any] = Registry("divergence", Divergence.__module__, Divergence)
    for name in registry.names():
        fields = ", ".join(f"{field}: {words}" for field, words in _defaults(registry.get(name)).items())
        typer.echo(f"{_comment(registry.get(name))}\ndivergence: {f'{{{name}: {{{fields}}}}}' if fields else name}\n")


def metrics() -> None:
    """List the metrics of responses, for evaluate.metrics in a recipe and --metric."""
    from ..metrics import METRICS

    for name in METRICS.names():
        cls = METRICS.get(name)
        typer.echo(f"{_comment(cls)}\nevaluate: {{metrics: [{', '.join(cls.names)}]}}\n")


def _print_blocks(registry: "Registry[Any]", key: str, first_fields: dict[str, str] | None = None) -> None:
    """Print a recipe's block for every class of a registry, with its documentation as a comment."""
    from ..registry import UnknownName

    for name in registry.names():
        try:
            cls = registry.get(name)
        except UnknownName as error:  # an entry point of an installed package that cannot be imported
            typer.echo(f"# {name}: {error}\n")
            continue
        fields = {**(first_fields or {}), **_defaults(cls)}
        lines = [f"    {field}: {words}" for field, words in fields.items()]
        typer.echo("\n".join([_comment(cls), f"{key}:", f"  {name}:" if lines else f"  {name}: {{}}", *lines, ""]))


def _comment(cls: type) -> str:
    """A class's documentation as YAML comments."""
    text = inspect.getdoc(cls) or cls.__name__
    paper = getattr(cls, "paper", "")
    text += f"\n\nPaper: {paper}" if paper and str(paper) not in text else ""
    return "\n".join(f"# {line}".rstrip() for line in text.splitlines())


def _defaults(cls: type) -> dict[str, str]:
    """The arguments of a class that a recipe can set, with their default values in YAML."""
    from ..teacher import Teacher

    factories: dict[str, Any] = {}
    if dataclasses.is_dataclass(cls):
        factories = {f.name: f.default_factory for f in dataclasses.fields(cls)}
    fields = {}
    for name, parameter in inspect.signature(cls).parameters.items():
        if (
            name.startswith("_")
            or name == "reward"
            or parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL)
        ):
            continue
        factory = factories.get(name, dataclasses.MISSING)
        value = parameter.default if factory is dataclasses.MISSING else factory()
        required = _TEACHERS if Teacher in typing.get_args(parameter.annotation) else _REQUIRED
        fields[name] = f"{required}  # required" if value is parameter.empty else _words(value)
    return fields


def _words(value: Any) -> str:
    """A default value in the words of a recipe."""
    from ..registry import snake_case

    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        name, fields = snake_case(type(value).__name__), vars(value)
        return f"{{{name}: {{{', '.join(f'{n}: {_words(v)}' for n, v in fields.items())}}}}}" if fields else name
    if isinstance(value, tuple | list):
        return f"[{', '.join(map(_words, value))}]"
    return yaml.safe_dump(value, default_flow_style=True, width=1000).removesuffix("...\n").strip()

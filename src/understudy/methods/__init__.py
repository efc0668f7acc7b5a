"""Distillation methods, one file per paper; the file's name is the method's name in a recipe."""

import dataclasses
import inspect

from ..method import Method
from ..registry import Registry

METHODS: Registry[Method] = Registry("method", __name__, Method)


def describe(name: str) -> str:
    """A method's name, summary, paper and options with their defaults, as text."""
    method = METHODS.get(name)
    lines = [f"{name}: {inspect.getdoc(method)}"]
    if hasattr(method, "paper"):
        lines.append(f"  paper: {method.paper}")
    defaults = {p.name: p.default for p in inspect.signature(method).parameters.values()}
    if dataclasses.is_dataclass(method):
        factories = {f.name: f.default_factory for f in dataclasses.fields(method)}
        defaults |= {n: make() for n, make in factories.items() if make is not dataclasses.MISSING}
    for option, default in defaults.items():
        lines.append(f"  {option}" + (" (required)" if default is inspect.Parameter.empty else f" = {default!r}"))
    return "\n".join(lines)

"""One paper, one file; the file's name is the method's name."""

import dataclasses
import inspect

from ..method import Method
from ..registry import Registry

METHODS: Registry[Method] = Registry("method", __name__, Method)


def describe(name: str) -> str:
    """A method's name, sentence, paper and options with their defaults, for people to read."""
    method = METHODS.get(name)
    lines = [f"{name}: {inspect.getdoc(method)}", f"  paper: {method.paper}"]
    for field in dataclasses.fields(method):  # type: ignore[arg-type]
        default = field.default if field.default is not dataclasses.MISSING else field.default_factory()  # type: ignore[misc]
        lines.append(f"  {field.name} = {default!r}")
    return "\n".join(lines)

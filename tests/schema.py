"""Do two servers answer in the same schema? The types of JSON values, and what one has that the other has not."""

from itertools import chain
from typing import Any


def schema(value: Any) -> Any:
    """The types of a JSON value, with the names of objects; token ids as keys are one name."""
    if isinstance(value, dict):
        return {"<id>" if name.isdigit() else name: schema(part) for name, part in value.items()}
    if isinstance(value, list):
        return [schema(part) for part in value]
    return "number" if isinstance(value, int | float) else type(value).__name__


def missing(fake: Any, real: Any, path: str = "reply") -> list[str]:
    """What the fake server's reply has and the real one's has not, or has with another type."""
    if isinstance(fake, dict) and isinstance(real, dict):
        absent = [f"{path}.{name}" for name in fake.keys() - real.keys()]
        pairs = [(f"{path}.{name}", fake[name], real[name]) for name in fake.keys() & real.keys()]
    elif isinstance(fake, list) and isinstance(real, list) and len(fake) == len(real):
        absent, pairs = [], [(f"{path}[{i}]", f, r) for i, (f, r) in enumerate(zip(fake, real, strict=True))]
    else:
        return [] if fake == real else [f"{path}: {fake} is {real}"]
    return [*absent, *chain.from_iterable(missing(f, r, place) for place, f, r in pairs)]

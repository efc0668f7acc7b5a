"""Errors about datasets, the row that they are about, and how a value appears in them."""

from collections.abc import Mapping
from typing import Any, NamedTuple

LONGEST_MESSAGE = 1000  # characters


class DataError(ValueError):
    """An error in a dataset, in one sentence with the remedy."""

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))


class BadRow(DataError):
    """An error in one row, which may be skipped."""


class SourceRow(NamedTuple):
    """A row's columns and its place: file and line."""

    where: str
    columns: Mapping[str, Any]


class Unread:
    """A value of a column that is not read, such as the bytes of an image."""

    def __init__(self, kind: str) -> None:
        self.kind = kind

    def __repr__(self) -> str:
        return f"<{self.kind}>"


def printable(text: str) -> str:
    """The text on one line, with control characters as escapes such as \\x1b, and without its middle if it is long."""
    if len(text) > LONGEST_MESSAGE:
        text = f"{text[: LONGEST_MESSAGE - 250]} … {text[-200:]}"
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape", "surrogatepass").decode() for char in text
    )


def describe(value: Any) -> str:
    """A value in an error message: its JSON type, and the value cut to 40 characters."""
    if value is None:
        return "null"
    if isinstance(value, Unread):
        return value.kind
    names = {bool: "true/false", int: "a number", float: "a number", str: "a string", list: "a list", dict: "an object"}
    try:
        text = repr(value[:40] if isinstance(value, str | bytes) else value)
    except Exception:  # numbers of thousands of digits, lists of thousands of levels, objects of other libraries
        text = "too large to show"
    return f"{names.get(type(value), type(value).__name__)} ({text if len(text) <= 40 else text[:37] + '...'})"


def check_text(where: str, name: str, value: Any) -> str:
    """The value, if it is a string with more than white space in it.

    Raises:
        BadRow: naming the row and the column if it is not, or is not valid Unicode.
    """
    if not isinstance(value, str):
        raise BadRow(f'{where}: the "{name}" is {describe(value)}, not a string')
    if not value.strip():
        raise BadRow(f'{where}: the "{name}" is empty')
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise BadRow(f'{where}: the "{name}" is not valid UTF-8 after {value[: error.start][-20:]!r}') from error
    return value

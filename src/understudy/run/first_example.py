"""The first example of a run as the models read it, with the tokens that are trained on in colour."""

from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.text import Text

from ..batch import Example
from ..data.examples import Examples
from ..terminal import escape, show

_TRAINED, _READ = "bold green", "dim"  # styles of tokens
_AUTHORS = {
    "dataset": "the dataset's responses",
    "student": "responses that the student generates",
    "teacher": "responses that the teacher generates",
    "corpus": "the corpus",
}


def show_first_example(train: Examples, authors: Sequence[str], tokenizer: Any, console: Console) -> None:
    """Print whose responses are trained on, and the first example."""
    show("trains on " + " and ".join(_AUTHORS.get(author, author) for author in authors), console)
    example = train[0] if "dataset" in authors else train[0].last_turn()
    styles = Text("first example: ").append("read", style=_READ).append(", ").append("trained on", style=_TRAINED)
    console.print(styles if console.color_system else Text("first example, «trained on» in these marks:"))
    console.print(rendered(example, tokenizer, marks=not console.color_system), soft_wrap=True)
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

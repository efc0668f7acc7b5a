"""What a run depends on besides its recipe: hashes of weights, tokenizer, data and code, and versions of packages.

They are saved when a run begins and compared when it is resumed, because the recipe has only the names of these.
"""

import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from torch import nn

from ..data.examples import Examples
from ..files import file_digest
from ..models.fingerprint import fingerprint, tokenizer_fingerprint
from ..recipe import Recipe
from .differences import Input

_PACKAGES = ("torch", "transformers", "accelerate", "peft", "tokenizers", "datasets", "understudy")
_OBJECT = re.compile(r"([A-Za-z_][\w.]*):[A-Za-z_]\w*")


def run_inputs(
    recipe: Recipe,
    data: Mapping[str, Examples | None],
    models: Mapping[str, Any],
    tokenizers: Mapping[str, Any],
    processes: int,
    columns: Iterable[str] = (),
) -> list[Input]:
    """Everything that a run depends on besides its recipe.

    Args:
        data: datasets by the key that names them.
        models: models by the key that names them, or the fingerprints of those that are not in this process.
        tokenizers: the student's by the key `student.tokenizer`, and those of teachers with another one by their keys.
        columns: of the training data, whose values matter besides prompt and response.
    """
    titles = {
        "data.dataset": "the training data",
        "evaluate.dataset": "the held-out data",
        "corpus.dataset": "the corpus",
    }
    inputs = [
        Input(key, titles[key], examples.fingerprint, examples.source)
        for key, examples in data.items()
        if examples is not None
    ]
    for column in sorted(columns):
        for key, examples in data.items():
            if examples is not None and key != "corpus.dataset":
                name = f"the column {column} of {titles[key]}"
                inputs.append(Input(key, name, examples.column_fingerprint(column), examples.source))
    for key, model in models.items():
        if isinstance(model, nn.Module | str):
            start = "the student's weights at the start" if key == "student" else f"the weights of the {key}"
            inputs.append(Input(key, start, model if isinstance(model, str) else fingerprint(model)))
    for key, tokenizer in tokenizers.items():
        name = "the tokenizer" if key == "student.tokenizer" else f"the tokenizer of the {key}"
        inputs.append(Input(key, name, tokenizer_fingerprint(tokenizer)))
    inputs += [Input(key, f"the code of {module}", file_digest(path)) for key, module, path in _code(recipe)]
    inputs += [Input("", name, _version(name)) for name in _PACKAGES]
    python = ".".join(map(str, sys.version_info[:2]))
    return [*inputs, Input("", "Python", python), Input("", "the number of processes", str(processes))]


def _code(recipe: Recipe) -> Iterator[tuple[str, str, Path]]:
    """The modules outside the package that a recipe names as `my_module:MyMethod`, each with its key and file."""
    modules = {}
    for key, text in _texts(recipe.resolved()):
        if match := _OBJECT.fullmatch(text):
            modules.setdefault(match[1], key)
    for name, key in modules.items():
        file = getattr(sys.modules.get(name), "__file__", None)
        if file is not None and Path(file).is_file():
            yield key, name, Path(file)


def _texts(content: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """All texts in a recipe, keys included, each with the dotted key of its block."""
    if isinstance(content, str):
        yield key, content
    elif isinstance(content, Mapping):
        for name, value in content.items():
            yield key, str(name)
            yield from _texts(value, f"{key}.{name}".strip("."))
    elif isinstance(content, Sequence):
        for value in content:
            yield from _texts(value, key)


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"

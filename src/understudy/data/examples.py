"""Load a dataset as examples of token ids, for a Trainer or a DataLoader.

`rows.py` reads the rows, `formats.py` and `chat.py` render them as text, and `tokenize.py` turns the text into ids of
bounded length. Prompts and responses that are cut, and rows that are skipped, are counted and logged.
"""

import hashlib
import json
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from ..batch import Example
from .columns import quoted
from .errors import BadRow, DataError, SourceRow, describe
from .formats import Document, Format, Row, TrainOn
from .rows import TextAs, read_rows
from .tables import dataset_rows
from .teacher_prompt import TeacherPrompt
from .tokenize import ExampleBuilder

__all__ = ["BadRow", "DataError", "Examples", "Row", "examples_from_rows", "load_examples"]

ROWS_PER_CALL = 1000  # of the tokenizer


@dataclass(frozen=True, eq=False)
class Examples(Dataset[Example]):
    """A dataset of examples for a Trainer or a DataLoader (with `collate_fn=list`).

    `rows[i]` holds the texts of example i: the prompt and every reference.
    """

    examples: Sequence[Example]
    rows: Sequence[Row]
    source: str
    cut_prompts: int = 0
    cut_responses: int = 0
    cut_teacher_prompts: int = 0
    skipped: int = 0

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> Example:
        return self.examples[index]

    @cached_property
    def has_responses(self) -> bool:
        """Does every example have a response? One without is a prompt for a model to respond to."""
        return all(example.response for example in self.examples)

    def require_responses(self, by: str = "this method") -> None:
        """Check that every example has a response.

        Raises:
            DataError: with the number of rows that have one, and the first that has none.
        """
        missing = [index for index, example in enumerate(self.examples) if not example.response]
        if missing:
            count = "no row" if len(missing) == len(self) else f"only {len(self) - len(missing)} of {len(self)} rows"
            first = missing[0]
            raise DataError(
                f"{by} trains on responses, and {count} of {self.source} has one (the first without: "
                f"{self.rows[first].where}, with the columns {quoted(self.examples[first].columns)}); "
                "give a completion, output or answer column, or name it with columns"
            )

    @cached_property
    def fingerprint(self) -> str:
        """A hash of all tokens: 16 hexadecimal digits."""
        digest = hashlib.sha256()
        for example in self.examples:
            ids = array("q", [len(example.prompt), *example.prompt, len(example.response), *example.response])
            digest.update(ids.tobytes() if example.trained is None else ids.tobytes() + bytes(example.trained))
            if example.teacher_prompt is not None:
                digest.update(b"teacher" + array("q", example.teacher_prompt).tobytes())
        return digest.hexdigest()[:16]

    def column_fingerprint(self, name: str) -> str:
        """A hash of the values of a column in all rows: 16 hexadecimal digits."""
        values = [example.columns.get(name) for example in self.examples]
        return hashlib.sha256(json.dumps(values, default=str).encode()).hexdigest()[:16]


def load_examples(
    dataset: str | Path,
    tokenizer: PreTrainedTokenizerBase,
    *,
    split: str = "train",
    name: str | None = None,
    text_as: TextAs = "chunks",
    **options: Any,
) -> Examples:
    """Load a file, a folder or a dataset of the hub as examples.

    Args:
        split, name, text_as: as in `rows.read_rows`.
        options: as in `examples_from_rows`.

    Raises:
        DataError: if the dataset is missing or cannot be read, and as `examples_from_rows`.
    """
    return examples_from_rows(read_rows(dataset, split, name, text_as), tokenizer, source=str(dataset), **options)


def examples_from_rows(
    rows: Iterable[Mapping[str, Any] | SourceRow | BadRow],
    tokenizer: PreTrainedTokenizerBase,
    *,
    source: str = "rows",
    columns: Mapping[str, str] | None = None,
    template: str | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    train_on: TrainOn = "last",
    max_length: int = 512,
    max_prompt_length: int | None = None,
    reserve: int = 1,
    text_prompt: int = 32,
    on_bad_row: Literal["error", "skip"] = "error",
    on_long_prompt: Literal["cut", "skip", "error"] = "cut",
    teacher_prompt: str | None = None,
    teacher_system: str | None = None,
    teacher_max_length: int | None = None,
    limit: int | None = None,
) -> Examples:
    """Tokenize rows, which may be plain dictionaries or a `datasets.Dataset`, into examples.

    Args:
        source: the rows' origin, for errors.
        columns: from the column names of a format to the dataset's, such as {"prompt": "en", "completion": "de"}.
        template: a format string over the dataset's columns that gives the prompt; "chat" for the tokenizer's template.
        chat_template_kwargs: arguments of the tokenizer's chat template.
        train_on: of a conversation, the last message of the assistant or all of its messages.
        max_length: of prompt and response together, in tokens; longer responses lose their end.
        max_prompt_length: in tokens; longer prompts keep a BOS and their end. Default: `max_length - reserve`.
        reserve: tokens reserved for a response after every prompt, such as a rollout's max_new_tokens.
        text_prompt: the number of tokens of each chunk of plain text (column `text`) that are its prompt. A chunk has
            up to `max_length` tokens of whole lines; only a longer line is cut. Inside a document chunks end without a
            stop token.
        on_bad_row: stop at a malformed row, or skip and count it.
        on_long_prompt: cut, skip or refuse a prompt that is too long.
        teacher_prompt, teacher_system: what only the teacher reads, as in `TeacherPrompt`.
        teacher_max_length: of the teacher's prompt and the response, in tokens. Default: no limit.
        limit: take only the first `limit` examples.

    Raises:
        DataError: for a malformed row, lengths that leave no room, and a dataset without any example.
    """
    if limit is not None and limit < 1:
        raise DataError(f"limit is {limit}, and a dataset needs at least one example")
    lengths = (max_length, _longest_prompt(max_length, max_prompt_length, reserve), text_prompt)
    builder = ExampleBuilder(tokenizer, *lengths, on_bad_row, on_long_prompt, teacher_max_length, reserve)
    for_teacher = None if teacher_prompt is teacher_system is None else TeacherPrompt(teacher_prompt, teacher_system)
    form = Format(tokenizer, columns, template, chat_template_kwargs, train_on)
    is_table = hasattr(rows, "with_format") and hasattr(rows, "num_rows")  # without an import of datasets
    read = dataset_rows(rows, source) if is_table else rows
    texts = _texts(read, form, for_teacher, source, builder.report_bad_row)
    pairs = _tokenize(texts, builder, limit)
    if not pairs:
        raise DataError(_why_empty(source, builder.skipped))
    form.log_recognized(source)
    builder.log_counts(len(pairs), source, _remedy(max_length, max_prompt_length, reserve))
    examples = [replace(example, row=index) for index, (example, _) in enumerate(pairs)]
    counts = {name: getattr(builder, name) for name in ("cut_prompts", "cut_responses", "cut_teacher_prompts")}
    return Examples(examples, [row for _, row in pairs], source, skipped=len(builder.skipped), **counts)


def _longest_prompt(max_length: int, max_prompt_length: int | None, reserve: int) -> int:
    """The largest number of tokens of a prompt, such that `reserve` tokens of response fit after it."""
    room = max_length - reserve if max_prompt_length is None else max_prompt_length
    if reserve < 1 or room < 1 or room + reserve > max_length:
        prompt = "a prompt" if max_prompt_length is None else f"a prompt of max_prompt_length {max_prompt_length}"
        raise DataError(
            f"max_length {max_length} has no room for {prompt} and {reserve} tokens of response; raise max_length, or "
            "lower the others"
        )
    return room


def _remedy(max_length: int, max_prompt_length: int | None, reserve: int) -> str:
    """How to give prompts more room than `_longest_prompt`."""
    if max_prompt_length is not None:
        return f"raise max_prompt_length ({max_prompt_length})"
    return f"raise max_length ({max_length})" + (f" or lower max_new_tokens ({reserve})" if reserve > 1 else "")


def _texts(
    rows: Iterable[Mapping[str, Any] | SourceRow | BadRow],
    form: Format,
    for_teacher: TeacherPrompt | None,
    source: str,
    report_bad_row: Callable[[BadRow], None],
) -> Iterator[Row | Document]:
    """The texts of the rows, without bad rows, which are reported."""
    for number, row in enumerate(rows, 1):
        try:
            if isinstance(row, BadRow):
                raise row
            text = form.read(row if isinstance(row, SourceRow) else _source_row(source, number, row))
            if for_teacher is not None:
                text = for_teacher.add_to(text, form.chat_template)
        except BadRow as error:
            report_bad_row(error)
        else:
            yield text


def _source_row(source: str, number: int, row: Any) -> SourceRow:
    where = f"{source}, row {number}"
    if not isinstance(row, Mapping) or not all(isinstance(name, str) for name in row):
        raise BadRow(f"{where}: a row is a dictionary of columns by their names, not {describe(row)}")
    return SourceRow(where, row)


def _tokenize(texts: Iterator[Row | Document], builder: ExampleBuilder, limit: int | None) -> list[tuple[Example, Row]]:
    """The first `limit` examples, or all; no more texts are read than these need."""
    pairs: list[tuple[Example, Row]] = []
    while limit is None or len(pairs) < limit:
        batch = list(islice(texts, ROWS_PER_CALL if limit is None else min(ROWS_PER_CALL, limit - len(pairs))))
        if not batch:
            break
        pairs.extend(builder.examples(batch))
    return pairs[:limit]


def _why_empty(source: str, skipped: Sequence[BadRow]) -> str:
    if not skipped:
        return f"{source} has no rows: give another dataset or split"
    return f"{source} has no usable row: {len(skipped)} skipped, the first because {skipped[0]}"

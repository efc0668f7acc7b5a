"""Prompts from columns: format strings that the user writes, and the prompts of Stanford Alpaca."""

import re
import string
from typing import Any

from ..registry import did_you_mean
from .columns import quoted
from .errors import BadRow, DataError, SourceRow, check_text, describe

WIDEST = 10_000  # characters of a format string's field

# The prompts of Stanford Alpaca as the distillation papers use them (MiniLLM, DPKD, PromptKD), last newline included.
ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)
ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)


def alpaca_prompt(instruction: str, extra: str) -> str:
    """Alpaca's prompt for an instruction and its input, which may be empty."""
    return (ALPACA_WITH_INPUT if extra else ALPACA).format(instruction=instruction, input=extra)


class PromptTemplate:
    """A format string over columns, such as "Question: {question}".

    Raises:
        DataError: for a text that is not a format string, names no column, or has very wide fields.
    """

    def __init__(self, template: str) -> None:
        self.template = template
        try:
            parts = list(string.Formatter().parse(template))
        except ValueError as error:
            reason = f"is not a format string ({error}); write a brace that is text twice"
            raise DataError(f"the template {template!r} {reason}") from error
        self.fields = [field for _, field, _, _ in parts if field is not None]
        if not self.fields:
            raise DataError(f'the template {template!r} names no column; write one in braces, such as "{{question}}"')
        widths = [number for _, _, spec, _ in parts for number in re.findall(r"\d+", spec or "")]
        if any(len(number) > 9 or int(number) > WIDEST for number in widths):
            raise DataError(f"the template {template!r} has a field wider than {WIDEST:,} characters: make it narrower")

    def fill(self, row: SourceRow) -> str:
        """The prompt of a row.

        Raises:
            BadRow: for a column that is missing or holds no text.
        """
        texts = {}
        for name in self.fields:
            if name not in row.columns:
                raise BadRow(f'{row.where}: the template names the column "{name}", but {row_columns(row, name)}')
            texts[name] = sentences_as_text(row.columns[name])
            if not isinstance(texts[name], str | int | float):
                raise BadRow(f'{row.where}: the template\'s column "{name}" is {describe(texts[name])}, not text')
        try:
            prompt = _ByColumn().vformat(self.template, (), texts)
        except ValueError as error:
            raise BadRow(f"{row.where}: the template cannot be filled: {error}") from error
        return check_text(row.where, "template's prompt", prompt)


class _ByColumn(string.Formatter):
    """Fills a format string with columns by name, dots included; attributes are never read."""

    def get_field(self, field_name: str, args: Any, kwargs: Any) -> tuple[Any, str]:
        return kwargs[field_name], field_name


def sentences_as_text(value: Any) -> Any:
    """A list of strings, the sentences of a prompt, joined to one text; anything else unchanged."""
    sentences = isinstance(value, list) and value and all(isinstance(sentence, str) for sentence in value)
    return " ".join(value) if sentences else value


def row_columns(row: SourceRow, missing: str) -> str:
    """The columns that a row has, for an error about one that is missing."""
    return f"the row has {quoted(row.columns)}{did_you_mean(missing, row.columns)}"

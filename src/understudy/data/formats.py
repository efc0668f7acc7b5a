"""Dataset formats: from a row's columns to a prompt, the references and the response, as text.

A row may be a pair, a conversation, an instruction, a question or columns for a template. Each becomes a `Row`, whose
prompt the student reads and whose response it is trained to generate. This is the only file that knows column names.
"""

import string
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from transformers import PreTrainedTokenizerBase

from ..registry import did_you_mean
from .chat import ChatTemplate, Message, check_messages, is_conversation
from .rows import BadRow, DataError, SourceRow, check_text, describe

PAIRS = {"prompt": "completion", "instruction": "output", "question": "answer"}  # prompt column: answer column
COLUMNS = ["messages", "prompt", "completion", "instruction", "input", "output", "question", "answer", "text"]
FORMATS = "messages, prompt (+ completion), instruction (+ input, output), question (+ answer), text"

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


@dataclass(frozen=True)
class Row:
    """A prompt as the model reads it, with the dataset's references, if there are any.

    `response` is the text that the student is trained to generate: the first reference, in a chat followed by the
    template's end token.
    """

    where: str
    prompt: str
    references: tuple[str, ...] = ()
    response: str = ""
    chat: bool = False  # rendered by a chat template, which adds the special tokens itself
    columns: Mapping[str, Any] = field(default_factory=dict, repr=False, compare=False)  # of the dataset's row


@dataclass(frozen=True)
class Document:
    """A plain text without prompts, which is cut into chunks."""

    where: str
    text: str


class Format:
    """Recognises a row's format by its columns and renders it as text.

    Args:
        columns: from the format's column names to the dataset's, such as {"prompt": "en", "completion": "de"}.
        template: a format string over the dataset's columns, which gives the prompt, whatever the format.
        chat_template_kwargs: arguments of the tokenizer's chat template, such as enable_thinking.

    Raises:
        DataError: for an unknown name in `columns`, and for a template that is not a format string or has no columns.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        columns: Mapping[str, str] | None = None,
        template: str | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ):
        self.tokenizer = tokenizer
        self.columns = dict(columns or {})
        self.template = template
        self.chat_template = ChatTemplate(tokenizer, chat_template_kwargs or {})
        for name in self.columns:
            if name not in COLUMNS:
                names = ", ".join(COLUMNS)
                raise DataError(f'columns names "{name}", which is none of {names}{did_you_mean(name, COLUMNS)}')
        # Formats with a column in `columns` take precedence over formats whose columns happen to be there.
        kinds = ["messages", *PAIRS, "text"]
        self.kinds = [kind for kind in kinds if not self.columns.keys().isdisjoint(_columns_of(kind))] or kinds
        self.fields = [] if template is None else _fields(template)

    def read(self, row: SourceRow) -> Row | Document:
        """Prompt, references and response of a row, or its plain text.

        Raises:
            BadRow: with the row's place and what is wrong with it.
            DataError: for a conversation if the tokenizer has no chat template.
        """
        row = SourceRow(row.where, {**row.columns, **_dotted_columns(row.columns)})
        row = SourceRow(row.where, {**row.columns, **self._renamed(row)})
        text = self._text(row)
        return replace(text, columns=row.columns) if isinstance(text, Row) else text

    def _text(self, row: SourceRow) -> Row | Document:
        where = row.where
        if self.template is not None:
            return _pair(where, self._fill(row), self._references(row, self._answer_column(row)))
        kind = self._kind(row)
        if kind == "messages":
            return self._conversation(where, row.columns["messages"])
        if kind == "text":
            return Document(where, check_text(where, "text", row.columns["text"]))
        references = self._references(row, PAIRS[kind])
        if kind == "instruction":
            return self._instruction(row, references)
        if kind == "prompt" and is_conversation(row.columns["prompt"]):
            return self._chat(where, check_messages(where, "prompt", row.columns["prompt"], last="user"), references)
        return _pair(where, check_text(where, kind, _as_text(row.columns[kind])), references)

    # Which columns are read

    def _renamed(self, row: SourceRow) -> dict[str, Any]:
        for name, column in self.columns.items():
            if column not in row.columns:
                raise BadRow(f'{row.where}: {name} should be in the column "{column}", but {_row_columns(row, column)}')
        return {name: row.columns[column] for name, column in self.columns.items()}

    def _kind(self, row: SourceRow) -> str:
        present = [kind for kind in self.kinds if kind in row.columns]
        for kind in present:  # a prompt with an answer takes precedence over one without
            if kind == "messages" or PAIRS.get(kind) in row.columns:
                return kind
        if present:
            return present[0]
        names = [column for kind in self.kinds for column in _columns_of(kind)]
        guesses = [guess for column in row.columns if (guess := did_you_mean(column, names))]
        raise BadRow(
            f"{row.where}: no supported format ({FORMATS}) has the columns {_quoted(row.columns)}; "
            f"name yours with columns or template{guesses[0] if guesses else ''}"
        )

    def _answer_column(self, row: SourceRow) -> str:
        answers = list(PAIRS.values())
        renamed = [answer for answer in answers if answer in self.columns]
        return next((answer for answer in [*renamed, *answers] if answer in row.columns), "completion")

    # From values to text

    def _fill(self, row: SourceRow) -> str:
        assert self.template is not None
        for name in self.fields:
            if name not in row.columns:
                raise BadRow(f'{row.where}: the template names the column "{name}", but {_row_columns(row, name)}')
            value = _as_text(row.columns[name])
            if not isinstance(value, str | int | float):
                raise BadRow(f'{row.where}: the template\'s column "{name}" is {describe(value)}, not text')
        try:
            texts = {name: _as_text(row.columns[name]) for name in self.fields}
            prompt = _ByColumn().vformat(self.template, (), texts)
        except ValueError as error:
            raise BadRow(f"{row.where}: the template cannot be filled: {error}") from error
        return check_text(row.where, "template's prompt", prompt)

    def _references(self, row: SourceRow, column: str) -> tuple[str, ...]:
        """The references: a string, a list of strings, or a list of one assistant message; () without the column."""
        if column not in row.columns:
            return ()
        value = row.columns[column]
        if not isinstance(value, list):
            return (check_text(row.where, column, value),)
        if not value:
            raise BadRow(f'{row.where}: the "{column}" is an empty list')
        if is_conversation(value):
            if len(value) > 1 or value[0].get("role") != "assistant":
                raise BadRow(f'{row.where}: the "{column}" should be one message of the role assistant')
            return (check_text(row.where, f"{column}'s content", value[0].get("content")),)
        return tuple(check_text(row.where, f"{column}[{index}]", answer) for index, answer in enumerate(value))

    def _instruction(self, row: SourceRow, references: tuple[str, ...]) -> Row:
        instruction = check_text(row.where, "instruction", row.columns["instruction"])
        extra = row.columns.get("input")
        extra = check_text(row.where, "input", extra) if extra not in (None, "") else ""
        if self.tokenizer.chat_template:
            content = f"{instruction}\n\n{extra}" if extra else instruction
            return self._chat(row.where, [{"role": "user", "content": content}], references)
        alpaca = ALPACA_WITH_INPUT if extra else ALPACA
        return _pair(row.where, alpaca.format(instruction=instruction, input=extra), references)

    def _conversation(self, where: str, value: Any) -> Row:
        messages = check_messages(where, "messages", value)
        if messages[-1]["role"] == "user":
            return self._chat(where, messages, ())
        return self._chat(where, messages[:-1], (messages[-1]["content"],), answer=messages[-1])

    def _chat(
        self, where: str, messages: list[Message], references: tuple[str, ...], answer: Message | None = None
    ) -> Row:
        if not references:
            return Row(where, self.chat_template.render_prompt(where, messages), chat=True)
        answer = answer or {"role": "assistant", "content": references[0]}
        prompt, response = self.chat_template.render_pair(where, messages, answer)
        return Row(where, prompt, references, response, chat=True)


def _fields(template: str) -> list[str]:
    try:
        fields = [field for _, field, _, _ in string.Formatter().parse(template) if field is not None]
    except ValueError as error:
        reason = f"is not a format string ({error}); write a brace that is text twice"
        raise DataError(f"the template {template!r} {reason}") from error
    if not fields:
        raise DataError(f'the template {template!r} names no column; write one in braces, such as "{{question}}"')
    return fields


class _ByColumn(string.Formatter):
    """Fills a format string with columns by name, dots included; attributes are never read."""

    def get_field(self, field_name: str, args: Any, kwargs: Any) -> tuple[Any, str]:
        return kwargs[field_name], field_name


def _as_text(value: Any) -> Any:
    """A list of strings, the sentences of a prompt, joined to one text; anything else unchanged."""
    sentences = isinstance(value, list) and value and all(isinstance(sentence, str) for sentence in value)
    return " ".join(value) if sentences else value


def _dotted_columns(columns: Mapping[str, Any]) -> dict[str, Any]:
    """The values inside columns that hold objects, by dotted names such as translation.de."""
    values = {}
    for name, value in columns.items():
        if isinstance(value, Mapping):
            inner = {str(key): x for key, x in value.items()}
            values |= {f"{name}.{key}": x for key, x in {**inner, **_dotted_columns(inner)}.items()}
    return values


def _columns_of(kind: str) -> set[str]:
    return {kind, *([PAIRS[kind]] if kind in PAIRS else []), *(["input"] if kind == "instruction" else [])}


def _quoted(columns: Mapping[str, Any]) -> str:
    return ", ".join(f'"{column}"' for column in columns) or "(none)"


def _row_columns(row: SourceRow, missing: str) -> str:
    return f"the row has {_quoted(row.columns)}{did_you_mean(missing, row.columns)}"


def _pair(where: str, prompt: str, references: tuple[str, ...]) -> Row:
    return Row(where, prompt, references, references[0] if references else "")

"""Dataset formats: from a row's columns to a prompt, the references and the response, as text.

A row may be a pair, a conversation, an instruction, a question or columns for a template. Each becomes a `Row`, whose
prompt the student reads and whose response it is trained to generate. `columns.py` recognises the format.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

from ..registry import did_you_mean
from ..terminal import counted
from .chat import ChatTemplate, Span, Tools
from .columns import COLUMNS, MEANINGFUL, Recognized, answer_column, dotted_columns, quoted, recognize
from .errors import BadRow, DataError, SourceRow, Unread, check_text, printable
from .messages import Message, is_conversation, read_messages, read_tools, reasoning
from .prompt_template import PromptTemplate, alpaca_prompt, row_columns, sentences_as_text
from .token_ids import token_ids

logger = logging.getLogger(__name__)

TrainOn = Literal["last", "all"]
CHAT = "chat"  # the `template` that renders prompts by the tokenizer's chat template
MOST_NOTES = 5  # about the columns of a dataset


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
    ids: tuple[list[int], list[int]] | None = None  # of prompt and response, where they are known already
    turns: tuple[Span, ...] = ()  # the parts of the prompt that are trained on as well
    teacher_prompt: str | None = None  # what the teacher reads in place of `prompt`
    columns: Mapping[str, Any] = field(default_factory=dict, repr=False, compare=False)  # of the dataset's row
    conversation: Mapping[str, Any] | None = field(default=None, repr=False, compare=False)  # see `Example`


@dataclass(frozen=True)
class Document:
    """A plain text without prompts, which is cut into chunks."""

    where: str
    text: str


class Format:
    """Recognises a row's format by its columns and renders it as text.

    Args:
        columns: from the format's column names to the dataset's, such as {"prompt": "en", "completion": "de"}.
        template: a format string over the dataset's columns, which gives the prompt, whatever the format; or "chat", to
            render prompts as messages of the user.
        chat_template_kwargs: arguments of the tokenizer's chat template, such as enable_thinking.
        train_on: of a conversation, the last message of the assistant, or all of its messages.

    Raises:
        DataError: for an unknown name in `columns`, and for a template that is not a format string or has no columns.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        columns: Mapping[str, str] | None = None,
        template: str | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        train_on: TrainOn = "last",
    ):
        if train_on not in ("last", "all"):
            raise DataError(f'train_on is "{train_on}", and can be last or all')
        self.tokenizer = tokenizer
        self.columns = dict(columns or {})
        self.as_chat = template == CHAT
        self.template = None if template is None or self.as_chat else PromptTemplate(template)
        self.chat_template = ChatTemplate(tokenizer, chat_template_kwargs or {})
        self.train_on = train_on
        for name in self.columns:
            if name not in COLUMNS:
                names = ", ".join(COLUMNS)
                raise DataError(f'columns names "{name}", which is none of {names}{did_you_mean(name, COLUMNS)}')
        self._recognized: dict[tuple[str, ...], Recognized] = {}  # by the names of the columns
        self._plain_prompts = 0

    def read(self, row: SourceRow) -> Row | Document:
        """Prompt, references and response of a row, or its plain text.

        Raises:
            BadRow: with the row's place and what is wrong with it.
            DataError: for a conversation if the tokenizer has no chat template.
        """
        if (ids := token_ids(row, self.tokenizer, self._vocabulary)) is not None:
            return _row_of_ids(row, ids)
        row = SourceRow(row.where, {**row.columns, **dotted_columns(row.columns)})
        row = SourceRow(row.where, {**row.columns, **self._renamed(row)})
        text = self._text(row)
        return replace(text, columns=_without_bytes(row.columns)) if isinstance(text, Row) else text

    @cached_property
    def _vocabulary(self) -> int:
        return max(self.tokenizer.get_vocab().values(), default=-1) + 1

    def log_recognized(self, source: str) -> None:
        """Warn of columns of other names, of columns that look like text and are not read, and of plain prompts."""
        notes: dict[str, None] = {}
        for columns, recognized in self._recognized.items():
            if names := recognized.other_names():
                notes[" and ".join(f'{name} is read from "{column}"' for name, column in names.items())] = None
            is_chat = recognized.kind == "messages" or self.as_chat
            is_chat |= recognized.kind == "instruction" and bool(self.tokenizer.chat_template)
            read = {*recognized.columns(is_chat), *self.columns, *self.columns.values()}
            if ignored := [name for name in columns if name.strip().casefold() in MEANINGFUL and name not in read]:
                notes[f"not read: {quoted(ignored)}"] = None
        for note in list(notes)[:MOST_NOTES]:
            logger.warning("%s: %s", printable(source), printable(note))
        if self._plain_prompts and self.tokenizer.chat_template:
            logger.warning(
                "%s: %s plain text, which a chat model is not used to; set data.template: chat to render "
                "prompts as messages of the user",
                *(printable(source), counted(self._plain_prompts, "prompt is", "prompts are")),
            )

    def _text(self, row: SourceRow) -> Row | Document:
        where, columns = row
        if self.template is not None:
            return _pair(
                where, self.template.fill(row), self._plain_references(row, answer_column(columns, self.columns))
            )
        names = tuple(columns)
        recognized = self._recognized.get(names)
        if recognized is None:
            recognized = self._recognized[names] = recognize(where, names, self.columns)
        value = columns[recognized.prompt]
        if recognized.kind == "text":
            if self.as_chat:
                raise BadRow(f'{where}: template: chat renders prompts, and the column "text" is running text')
            return Document(where, check_text(where, recognized.prompt, value))
        if recognized.kind == "messages":
            return self._conversation(row, recognized)
        references = self._references(row, recognized.answer)
        if is_conversation(value):
            messages = self._with_system(
                row, recognized, read_messages(where, recognized.prompt, value, ("user", "tool"))
            )
            return self._chat(where, messages, references, self._answer(row, recognized), self._tools(row))
        prompt = check_text(where, recognized.prompt, sentences_as_text(value))
        if recognized.kind == "instruction":
            return self._instruction(row, recognized, prompt, references)
        if self.as_chat:
            return self._user_message(row, recognized, prompt, references)
        if row.columns.get("tools"):
            raise BadRow(f"{where}: tools are for chat templates, and the prompt is plain text; set template: chat")
        self._plain_prompts += 1
        return _pair(where, prompt, self._plain_references(row, recognized.answer))

    def _renamed(self, row: SourceRow) -> dict[str, Any]:
        for name, column in self.columns.items():
            if column not in row.columns:
                raise BadRow(f'{row.where}: {name} should be in the column "{column}", but {row_columns(row, column)}')
        return {name: row.columns[column] for name, column in self.columns.items()}

    # From values to text

    def _references(self, row: SourceRow, column: str | None) -> tuple[str, ...]:
        """The references: a string, a list of strings, or a list of one assistant message; () without the column."""
        if column is None or column not in row.columns:
            return ()
        value = row.columns[column]
        if not isinstance(value, list):
            return (check_text(row.where, column, value),)
        if not value:
            raise BadRow(f'{row.where}: the "{column}" is an empty list')
        if is_conversation(value):
            messages = read_messages(row.where, column, value, ("assistant",))
            if len(messages) > 1:
                raise BadRow(f'{row.where}: the "{column}" should be one message of the role assistant')
            return (messages[0]["content"],)
        return tuple(check_text(row.where, f"{column}[{index}]", answer) for index, answer in enumerate(value))

    def _plain_references(self, row: SourceRow, column: str | None) -> tuple[str, ...]:
        """The references after a prompt that no chat template renders."""
        value = None if column is None else row.columns.get(column)
        if is_conversation(value):
            [message] = read_messages(row.where, column or "", value, ("assistant",))[-1:]
            if message.get("tool_calls") or reasoning(message):
                what = "tool calls" if message.get("tool_calls") else "reasoning"
                raise BadRow(
                    f'{row.where}: {what} of the "{column}" can only be rendered by a chat template, and the prompt is '
                    "plain text; give the prompt as messages too, or set template: chat"
                )
        return self._references(row, column)

    def _answer(self, row: SourceRow, recognized: Recognized) -> Message | None:
        """The answer of a row whose answer is a message; None where it is a text."""
        value = None if recognized.answer is None else row.columns[recognized.answer]
        return (
            read_messages(row.where, recognized.answer or "", value, ("assistant",))[0]
            if is_conversation(value)
            else None
        )

    def _tools(self, row: SourceRow) -> Tools:
        if row.columns.get("functions"):
            raise BadRow(f'{row.where}: "functions" are not understood; give them as a column "tools"')
        return read_tools(row.where, row.columns.get("tools"))

    def _with_system(self, row: SourceRow, recognized: Recognized, messages: list[Message]) -> list[Message]:
        """The messages after the system prompt in a column of its own, if there is one."""
        value = None if recognized.system is None else row.columns[recognized.system]
        if value in (None, "") or messages[0]["role"] in ("system", "developer"):
            return messages
        return [{"role": "system", "content": check_text(row.where, recognized.system or "", value)}, *messages]

    def _user_message(self, row: SourceRow, recognized: Recognized, prompt: str, references: tuple[str, ...]) -> Row:
        messages = self._with_system(row, recognized, [{"role": "user", "content": prompt}])
        return self._chat(row.where, messages, references, self._answer(row, recognized), self._tools(row))

    def _instruction(self, row: SourceRow, recognized: Recognized, text: str, references: tuple[str, ...]) -> Row:
        extra = None if recognized.context is None else row.columns[recognized.context]
        extra = check_text(row.where, recognized.context or "", extra) if extra not in (None, "") else ""
        if self.tokenizer.chat_template:
            return self._user_message(row, recognized, f"{text}\n\n{extra}" if extra else text, references)
        if self.as_chat:
            return self._user_message(row, recognized, text, references)  # which says that there is no chat template
        return _pair(row.where, alpaca_prompt(text, extra), references)

    def _conversation(self, row: SourceRow, recognized: Recognized) -> Row:
        messages = read_messages(row.where, recognized.prompt, row.columns[recognized.prompt])
        messages, tools = self._with_system(row, recognized, messages), self._tools(row)
        if self.train_on == "all":
            messages = _up_to_last_answer(messages)
        if messages[-1]["role"] != "assistant":
            return self._chat(row.where, messages, (), None, tools)
        *before, answer = messages
        pair = self._chat(row.where, before, (answer["content"],), answer, tools)
        if self.train_on == "last":
            return pair
        return replace(pair, turns=tuple(self.chat_template.earlier_turns(row.where, before, pair.prompt, tools)))

    def _chat(
        self, where: str, messages: list[Message], references: tuple[str, ...], answer: Message | None, tools: Tools
    ) -> Row:
        conversation = {"messages": messages, "tools": tools}
        if not references:
            prompt = self.chat_template.render_prompt(where, messages, tools)
            return Row(where, prompt, chat=True, conversation=conversation)
        answer = answer or {"role": "assistant", "content": references[0]}
        prompt, response = self.chat_template.render_pair(where, messages, answer, tools)
        if answer.get("tool_calls"):
            references = (response.removesuffix(self.chat_template.response_end.end),)
        return Row(where, prompt, references, response, chat=True, conversation=conversation)


def _without_bytes(columns: Mapping[str, Any]) -> dict[str, Any]:
    """The columns that are kept in memory for rewards: all but bytes, which may be images, and what is not read."""
    return {name: value for name, value in columns.items() if not _has_bytes(value)}


def _has_bytes(value: Any, depth: int = 0) -> bool:
    if isinstance(value, str | int | float | None):
        return False
    if depth > 20:
        return True
    if isinstance(value, Mapping):
        return any(_has_bytes(x, depth + 1) for x in value.values())
    if isinstance(value, list | tuple):
        return any(_has_bytes(x, depth + 1) for x in value)
    return isinstance(value, bytes | bytearray | memoryview | Unread) or not type(value).__module__.startswith(
        ("datetime", "decimal", "uuid", "numpy")
    )


def _up_to_last_answer(messages: list[Message]) -> list[Message]:
    """The messages without those after the assistant's last one, where that one answers something."""
    answers = [index for index, message in enumerate(messages) if index and message["role"] == "assistant"]
    return messages[: answers[-1] + 1] if answers else messages


def _row_of_ids(row: SourceRow, ids: tuple[list[int], list[int]]) -> Row:
    """A row whose texts are only shown, and compared with its references, if it has a list of them."""
    prompt, response, references = (row.columns.get(name, "") for name in ("prompt", "response", "references"))
    texts = tuple(map(str, references)) if isinstance(references, list) else ()
    return Row(row.where, str(prompt), texts, str(response), ids=ids, columns=_without_bytes(row.columns))


def _pair(where: str, prompt: str, references: tuple[str, ...]) -> Row:
    return Row(where, prompt, references, references[0] if references else "")

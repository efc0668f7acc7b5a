"""What a row's columns mean: a prompt and the right answers to it, as text.

The one idea: whatever kind a row is (pair, conversation, instruction, question, a template's columns), it becomes a
`Row` of two strings, what the student reads and what it is to write. Only here are there column names, roles and
chat templates.
"""

import re
import string
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from transformers import PreTrainedTokenizerBase

from ..registry import did_you_mean
from .rows import BadRow, DataError, SourceRow, describe

PAIRS = {"prompt": "completion", "instruction": "output", "question": "answer"}  # the prompt's column: the answer's
COLUMNS = ["messages", "prompt", "completion", "instruction", "input", "output", "question", "answer", "text"]
UNDERSTOOD = "messages, prompt (+ completion), instruction (+ input, output), question (+ answer), text"

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

Message = dict[str, Any]


@dataclass(frozen=True)
class Row:
    """A prompt as the model reads it, and the answers that are right, as the dataset gives them (none: a prompt alone).

    `response` is what the student is to write: the first reference, in a chat with the template's end token.
    """

    where: str
    prompt: str
    references: tuple[str, ...] = ()
    response: str = ""
    chat: bool = False  # rendered by a chat template, which writes the special tokens itself
    columns: Mapping[str, Any] = field(default_factory=dict, repr=False, compare=False)  # as the dataset has them


@dataclass(frozen=True)
class Document:
    """A running text without prompts; it is cut into windows."""

    where: str
    text: str


@dataclass(frozen=True)
class Ending:
    """How a chat template goes on behind an answer (`tail`), and how far the answer itself reaches into that (`end`).

    Qwen's tail is "<|im_end|>\\n", its end "<|im_end|>": the student stops there and never writes the newline. Phi's
    tail has two tokens, "<|end|>\\n<|endoftext|>"; the first one ends the answer.
    """

    tail: str = ""
    end: str = ""
    token: str | None = None

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> "Ending":
        """Found out by rendering an answer; empty without a chat template, and with one that refuses."""
        if not tokenizer.chat_template:
            return cls()
        answer = "understudy"
        chat = [{"role": "user", "content": "Who plays?"}, {"role": "assistant", "content": answer}]
        try:
            tail = _rendered(tokenizer, chat).rpartition(answer)[2]
        except Exception:  # a template raises what it likes; rows that are conversations will show it
            return cls()
        added: Any = tokenizer.get_added_vocab  # which transformers' base class does not declare
        tokens = sorted({*added(), *tokenizer.all_special_tokens}, key=len, reverse=True)
        token = re.search("|".join(map(re.escape, tokens)), tail) if tokens else None
        return cls(tail, tail[: token.end()], token.group()) if token else cls(tail)


def stop_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids that end a response: the tokenizer's end-of-sequence token, and its chat template's end of an answer.

    Raises:
        DataError: for a tokenizer without an end-of-sequence token.
    """
    if tokenizer.eos_token_id is None:
        raise DataError("the tokenizer has no end-of-sequence token, so no response could end; set tokenizer.eos_token")
    token = Ending.of(tokenizer).token
    ids = [tokenizer.eos_token_id, *([] if token is None else [tokenizer.convert_tokens_to_ids(token)])]
    return sorted(set(ids))


class Format:
    """Reads rows: recognises each one's kind by its columns, and renders it.

    `columns` says what the data calls our columns ({"prompt": "en", "completion": "de"}). `template` is a format string
    over the data's columns that writes the prompt in place of any other rule. `chat_template_kwargs` go to the
    tokenizer's chat template (enable_thinking and the like).

    Raises:
        DataError: for a name in `columns` that is none of ours, and for a template that is no format string or names
            no column.
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
        self.chat_template_kwargs = dict(chat_template_kwargs or {})
        for ours in self.columns:
            if ours not in COLUMNS:
                known = ", ".join(COLUMNS)
                raise DataError(f'columns names "{ours}", which is none of {known}{did_you_mean(ours, COLUMNS)}')
        # Kinds that `columns` has a name for, if any, go before kinds whose columns merely happen to be there.
        kinds = ["messages", *PAIRS, "text"]
        self.kinds = [kind for kind in kinds if not self.columns.keys().isdisjoint(_columns_of(kind))] or kinds
        self.fields = [] if template is None else _fields(template)

    def read(self, row: SourceRow) -> Row | Document:
        """The prompt and answers of `row`.

        Raises:
            BadRow: with what is wrong with it, and where it stands.
            DataError: for a conversation where the tokenizer has no chat template.
        """
        row = SourceRow(row.where, {**row.columns, **_nested(row.columns)})
        row = SourceRow(row.where, {**row.columns, **self._renamed(row)})
        text = self._text(row)
        return replace(text, columns=row.columns) if isinstance(text, Row) else text

    def _text(self, row: SourceRow) -> Row | Document:
        where = row.where
        if self.template is not None:
            return _pair(where, self._fill(row), self._references(row, self._answer_beside_template(row)))
        kind = self._kind(row)
        if kind == "messages":
            return self._conversation(where, row.columns["messages"])
        if kind == "text":
            return Document(where, _string(where, "text", row.columns["text"]))
        references = self._references(row, PAIRS[kind])
        if kind == "instruction":
            return self._instruction(row, references)
        if kind == "prompt" and _is_conversation(row.columns["prompt"]):
            return self._chat(where, _messages(where, "prompt", row.columns["prompt"], last="user"), references)
        return _pair(where, _string(where, kind, _joined(row.columns[kind])), references)

    # Which columns count

    def _renamed(self, row: SourceRow) -> dict[str, Any]:
        for ours, theirs in self.columns.items():
            if theirs not in row.columns:
                raise BadRow(f'{row.where}: {ours} should be in the column "{theirs}", but {_there(row, theirs)}')
        return {ours: row.columns[theirs] for ours, theirs in self.columns.items()}

    def _kind(self, row: SourceRow) -> str:
        present = [kind for kind in self.kinds if kind in row.columns]
        for kind in present:  # a kind with an answer goes before prompts alone
            if kind == "messages" or PAIRS.get(kind) in row.columns:
                return kind
        if present:
            return present[0]
        known = [column for kind in self.kinds for column in _columns_of(kind)]
        guesses = [guess for column in row.columns if (guess := did_you_mean(column, known))]
        raise BadRow(
            f"{row.where}: no kind of row that is understood ({UNDERSTOOD}) has the columns "
            f"{_listed(row.columns)}; name yours with columns or template{guesses[0] if guesses else ''}"
        )

    def _answer_beside_template(self, row: SourceRow) -> str:
        answers = list(PAIRS.values())
        named = [answer for answer in answers if answer in self.columns]
        return next((answer for answer in [*named, *answers] if answer in row.columns), "completion")

    # What their values mean

    def _fill(self, row: SourceRow) -> str:
        assert self.template is not None
        for name in self.fields:
            if name not in row.columns:
                raise BadRow(f'{row.where}: the template names the column "{name}", but {_there(row, name)}')
            value = _joined(row.columns[name])
            if not isinstance(value, str | int | float):
                raise BadRow(f'{row.where}: the template\'s column "{name}" is {describe(value)}, not text')
        try:
            texts = {name: _joined(row.columns[name]) for name in self.fields}
            prompt = _ByColumn().vformat(self.template, (), texts)
        except ValueError as error:
            raise BadRow(f"{row.where}: the template cannot be filled: {error}") from error
        return _string(row.where, "template's prompt", prompt)

    def _references(self, row: SourceRow, column: str) -> tuple[str, ...]:
        """A string, a list of strings (several right answers), or a list of one assistant message; () for none."""
        if column not in row.columns:
            return ()
        value = row.columns[column]
        if not isinstance(value, list):
            return (_string(row.where, column, value),)
        if not value:
            raise BadRow(f'{row.where}: the "{column}" is an empty list')
        if _is_conversation(value):
            if len(value) > 1 or value[0].get("role") != "assistant":
                raise BadRow(f'{row.where}: the "{column}" should be one message of the role assistant')
            return (_string(row.where, f"{column}'s content", value[0].get("content")),)
        return tuple(_string(row.where, f"{column}[{index}]", answer) for index, answer in enumerate(value))

    def _instruction(self, row: SourceRow, references: tuple[str, ...]) -> Row:
        instruction = _string(row.where, "instruction", row.columns["instruction"])
        extra = row.columns.get("input")
        extra = _string(row.where, "input", extra) if extra not in (None, "") else ""
        if self.tokenizer.chat_template:
            content = f"{instruction}\n\n{extra}" if extra else instruction
            return self._chat(row.where, [{"role": "user", "content": content}], references)
        alpaca = ALPACA_WITH_INPUT if extra else ALPACA
        return _pair(row.where, alpaca.format(instruction=instruction, input=extra), references)

    def _conversation(self, where: str, value: Any) -> Row:
        messages = _messages(where, "messages", value)
        if messages[-1]["role"] == "user":
            return self._chat(where, messages, ())
        return self._chat(where, messages[:-1], (messages[-1]["content"],), answer=messages[-1])

    def _chat(
        self, where: str, messages: list[Message], references: tuple[str, ...], answer: Message | None = None
    ) -> Row:
        """Render a conversation. What the template writes behind its own generation prompt is the response."""
        prompt = self._render(where, messages, add_generation_prompt=True)
        if not references:
            return Row(where, prompt, chat=True)
        whole = self._render(where, [*messages, answer or {"role": "assistant", "content": references[0]}])
        if not whole.startswith(prompt):
            raise BadRow(
                f"{where}: the chat template writes the conversation with its answer otherwise than without, so where "
                "the answer begins is unknown; give such rows as prompt and completion strings, or another template"
            )
        response = whole.removeprefix(prompt)
        if response.endswith(self.ending.tail):
            response = response.removesuffix(self.ending.tail) + self.ending.end
        return Row(where, prompt, references, response, chat=True)

    @cached_property
    def ending(self) -> Ending:
        """How the tokenizer's chat template ends an answer."""
        return Ending.of(self.tokenizer)

    def _render(self, where: str, messages: list[Message], add_generation_prompt: bool = False) -> str:
        if not self.tokenizer.chat_template:
            raise DataError(
                f"{where}: a conversation needs a tokenizer with a chat template, and this one has none; "
                "set tokenizer.chat_template or give prompt and completion as strings"
            )
        try:
            options = {**self.chat_template_kwargs, "add_generation_prompt": add_generation_prompt}
            return _rendered(self.tokenizer, messages, **options)
        except Exception as error:  # a template raises what it likes, e.g. "System role not supported"
            raise BadRow(f"{where}: the chat template refuses the conversation: {error}") from error


def _rendered(tokenizer: PreTrainedTokenizerBase, messages: list[Message], **options: Any) -> str:
    text = tokenizer.apply_chat_template(messages, tokenize=False, **options)
    assert isinstance(text, str)
    return text


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
    """Fills in columns by their whole names, dots included, and reads no attribute of anything."""

    def get_field(self, field_name: str, args: Any, kwargs: Any) -> tuple[Any, str]:
        return kwargs[field_name], field_name


def _joined(value: Any) -> Any:
    """A prompt that is kept as a list of its sentences as one text; anything else as it is."""
    sentences = isinstance(value, list) and value and all(isinstance(sentence, str) for sentence in value)
    return " ".join(value) if sentences else value


def _nested(columns: Mapping[str, Any]) -> dict[str, Any]:
    """The values of columns that hold objects, under dotted names, such as translation.de."""
    found = {}
    for name, value in columns.items():
        if isinstance(value, Mapping):
            inner = {str(key): x for key, x in value.items()}
            found |= {f"{name}.{key}": x for key, x in {**inner, **_nested(inner)}.items()}
    return found


def _columns_of(kind: str) -> set[str]:
    return {kind, *([PAIRS[kind]] if kind in PAIRS else []), *(["input"] if kind == "instruction" else [])}


def _listed(columns: Mapping[str, Any]) -> str:
    return ", ".join(f'"{column}"' for column in columns) or "(none)"


def _there(row: SourceRow, wanted: str) -> str:
    return f"the row has {_listed(row.columns)}{did_you_mean(wanted, row.columns)}"


def _pair(where: str, prompt: str, references: tuple[str, ...]) -> Row:
    return Row(where, prompt, references, references[0] if references else "")


def _string(where: str, name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise BadRow(f'{where}: the "{name}" is {describe(value)}, not a string')
    if not value.strip():
        raise BadRow(f'{where}: the "{name}" is empty')
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise BadRow(f'{where}: the "{name}" is not valid UTF-8 behind {value[: error.start][-20:]!r}') from error
    return value


def _is_conversation(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and isinstance(value[0], dict)


def _messages(where: str, name: str, value: Any, last: str | None = None) -> list[Message]:
    """Check a conversation: perhaps a system message, then user and assistant in turn, each with text."""
    if not _is_conversation(value):
        raise BadRow(f'{where}: the "{name}" should be a list of messages with role and content, not {describe(value)}')
    for index, message in enumerate(value):
        which = f"message {index + 1} of the {name}"
        role = message.get("role") if isinstance(message, dict) else None
        if role not in ("system", "developer", "user", "assistant"):
            known = "system, user and assistant are understood"
            raise BadRow(f"{where}: {which} has the role {describe(role)}; {known}")
        before = value[index - 1]["role"] if index else None
        if role in ("system", "developer"):
            follows = before is None
        elif role == "user":
            follows = before in (None, "system", "developer", "assistant")
        else:
            follows = before == "user"
        if not follows:
            place = f"comes after the {before}'s" if before else "comes first"
            raise BadRow(
                f"{where}: {which} is the {role}'s and {place}; after a system message, which may be missing, "
                "user and assistant take turns, beginning with the user"
            )
        _string(where, f"content of {which}", message.get("content"))
    if value[-1]["role"] not in ([last] if last else ["user", "assistant"]):
        raise BadRow(f"{where}: the {name} should end with a message of the {last or 'user or the assistant'}")
    return value

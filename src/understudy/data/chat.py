"""Chat templates: check conversations, render them as prompt and response, and find the token that ends a response."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from transformers import PreTrainedTokenizerBase

from .rows import BadRow, DataError, check_text, describe

Message = dict[str, Any]


@dataclass(frozen=True)
class ResponseEnd:
    """What a chat template renders after a response (`suffix`), and the part that belongs to the response (`end`).

    Qwen's suffix is "<|im_end|>\\n", its end "<|im_end|>": the student stops there and never generates the newline.
    Phi's suffix holds two tokens, "<|end|>\\n<|endoftext|>"; the first one ends the response.
    """

    suffix: str = ""
    end: str = ""
    token: str | None = None

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> "ResponseEnd":
        """Render a short conversation and read what follows its response; empty without a template or if it fails."""
        if not tokenizer.chat_template:
            return cls()
        response = "understudy"
        messages = [{"role": "user", "content": "Who plays?"}, {"role": "assistant", "content": response}]
        try:
            suffix = _apply(tokenizer, messages).rpartition(response)[2]
        except Exception:  # templates raise anything; rows that are conversations will report it
            return cls()
        added: Any = tokenizer.get_added_vocab  # which transformers' base class does not declare
        tokens = {token for token in (*added(), *tokenizer.all_special_tokens) if token.strip()}
        tokens = sorted(tokens, key=len, reverse=True)
        token = re.search("|".join(map(re.escape, tokens)), suffix) if tokens else None
        return cls(suffix, suffix[: token.end()], token.group()) if token else cls(suffix)


def end_of_response_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids that end a response: the tokenizer's end-of-sequence token, and the chat template's end token.

    Raises:
        DataError: for a tokenizer without an end-of-sequence token.
    """
    if tokenizer.eos_token_id is None:
        raise DataError("the tokenizer has no end-of-sequence token, so no response could end; set tokenizer.eos_token")
    token = ResponseEnd.of(tokenizer).token
    ids = [tokenizer.eos_token_id, *([] if token is None else [tokenizer.convert_tokens_to_ids(token)])]
    return sorted(set(ids))


class ChatTemplate:
    """A tokenizer's chat template with its arguments, such as enable_thinking."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, arguments: Mapping[str, Any]) -> None:
        self.tokenizer, self.arguments = tokenizer, dict(arguments)

    def render_prompt(self, where: str, messages: list[Message]) -> str:
        """The messages followed by the template's generation prompt.

        Raises:
            DataError: if the tokenizer has no chat template.
            BadRow: if the template fails.
        """
        return self._render(where, messages, add_generation_prompt=True)

    def render_pair(self, where: str, messages: list[Message], response: Message) -> tuple[str, str]:
        """Prompt and response: the response is what the template renders after its own generation prompt.

        Raises:
            DataError: as `render_prompt`.
            BadRow: as `render_prompt`; and if the template renders the prompt differently when a response follows.
        """
        prompt = self.render_prompt(where, messages)
        conversation = self._render(where, [*messages, response])
        if not conversation.startswith(prompt):
            raise BadRow(
                f"{where}: the chat template renders the prompt differently when the answer follows, so it is unknown "
                "where the answer begins; give such rows as prompt and completion strings, or another template"
            )
        text = conversation.removeprefix(prompt)
        if text.endswith(self.response_end.suffix):
            text = text.removesuffix(self.response_end.suffix) + self.response_end.end
        return prompt, text

    @cached_property
    def response_end(self) -> ResponseEnd:
        """How the template ends a response."""
        return ResponseEnd.of(self.tokenizer)

    def _render(self, where: str, messages: list[Message], add_generation_prompt: bool = False) -> str:
        if not self.tokenizer.chat_template:
            raise DataError(
                f"{where}: a conversation needs a tokenizer with a chat template, and this one has none; "
                "set tokenizer.chat_template or give prompt and completion as strings"
            )
        try:
            options = {**self.arguments, "add_generation_prompt": add_generation_prompt}
            return _apply(self.tokenizer, messages, **options)
        except Exception as error:  # templates raise anything, e.g. "System role not supported"
            raise BadRow(f"{where}: the chat template refuses the conversation: {error}") from error


def _apply(tokenizer: PreTrainedTokenizerBase, messages: list[Message], **options: Any) -> str:
    text = tokenizer.apply_chat_template(messages, tokenize=False, **options)
    assert isinstance(text, str)
    return text


def is_conversation(value: Any) -> bool:
    """Is the value a list of messages, rather than a text or a list of texts?"""
    return isinstance(value, list) and bool(value) and isinstance(value[0], dict)


def check_messages(where: str, name: str, value: Any, last: str | None = None) -> list[Message]:
    """Check a conversation: an optional system message, then user and assistant alternating, each with text.

    Args:
        name: the column's; for errors.
        last: the role that the last message must have; None: the user's or the assistant's.

    Raises:
        BadRow: naming the message that is wrong.
    """
    if not is_conversation(value):
        raise BadRow(f'{where}: the "{name}" should be a list of messages with role and content, not {describe(value)}')
    for index, message in enumerate(value):
        which = f"message {index + 1} of the {name}"
        role = message.get("role") if isinstance(message, dict) else None
        if role not in ("system", "developer", "user", "assistant"):
            raise BadRow(f"{where}: {which} has the role {describe(role)}; use system, user or assistant")
        previous = value[index - 1]["role"] if index else None
        if role in ("system", "developer"):
            in_order = previous is None
        elif role == "user":
            in_order = previous in (None, "system", "developer", "assistant")
        else:
            in_order = previous == "user"
        if not in_order:
            place = f"comes after the {previous}'s" if previous else "comes first"
            raise BadRow(
                f"{where}: {which} is the {role}'s and {place}; after a system message, which may be missing, "
                "user and assistant take turns, beginning with the user"
            )
        check_text(where, f"content of {which}", message.get("content"))
    if value[-1]["role"] not in ([last] if last else ["user", "assistant"]):
        raise BadRow(f"{where}: the {name} should end with a message of the {last or 'user or the assistant'}")
    return value

"""Chat templates: render conversations as prompt and response, and find the token that ends a response."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from .errors import BadRow, DataError
from .messages import Message, reasoning, tool_names
from .template_limits import check_template, within_limit

Tools = list[dict[str, Any]] | None
Span = tuple[int, int]  # from the first character to the one after the last


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
        """Render a short conversation and read what follows its response; empty without a template or if it fails.

        Raises:
            DataError: for a template beyond the limits of `template_limits`.
        """
        if not tokenizer.chat_template:
            return cls()
        response = "understudy"
        messages = [{"role": "user", "content": "Who plays?"}, {"role": "assistant", "content": response}]
        try:
            suffix = _apply(tokenizer, messages).rpartition(response)[2]
        except DataError:
            raise
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


_OWN_ARGUMENTS = {
    *(
        "messages",
        "conversation",
        "tools",
        "documents",
        "chat_template",
        "add_generation_prompt",
        "tokenize",
        "padding",
    ),
    *("continue_final_message", "truncation", "max_length", "return_tensors", "return_dict", "tokenizer_kwargs"),
    *("return_assistant_tokens_mask", "tokenizer"),
}


class ChatTemplate:
    """A tokenizer's chat template with its arguments, such as enable_thinking.

    Raises:
        DataError: for an argument that rendering sets itself.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, arguments: Mapping[str, Any]) -> None:
        self.tokenizer, self.arguments = tokenizer, dict(arguments)
        if taken := sorted(_OWN_ARGUMENTS & self.arguments.keys()):
            raise DataError(
                f"chat_template_kwargs sets {taken[0]}, which is set here by what is rendered: leave it out"
            )

    def render_prompt(self, where: str, messages: list[Message], tools: Tools = None) -> str:
        """The messages followed by the template's generation prompt.

        Raises:
            DataError: if the tokenizer has no chat template, or one beyond the limits of `template_limits`.
            BadRow: if the template fails, or leaves out a message, a tool or a tool call.
        """
        prompt = self._render(where, messages, tools, add_generation_prompt=True)
        for number, message in enumerate(messages, 1):
            if message["role"] != "assistant" and not _is_in(prompt, message["content"]):
                raise BadRow(f"{where}: the chat template leaves out message {number}, the {message['role']}'s")
            _check_names(where, f"the tool calls of message {number}", tool_names(message), prompt)
        _check_names(where, "the tools", tool_names(tools), prompt)
        return prompt

    def render_pair(
        self, where: str, messages: list[Message], response: Message, tools: Tools = None
    ) -> tuple[str, str]:
        """Prompt and response: the response is what the template renders after its own generation prompt.

        Raises:
            DataError: as `render_prompt`.
            BadRow: as `render_prompt`; and if the template renders the prompt differently when a response follows.
        """
        prompt = self.render_prompt(where, messages, tools)
        conversation = self._render(where, [*messages, response], tools)
        if not conversation.startswith(prompt):
            raise BadRow(
                f"{where}: the chat template renders the prompt differently when the answer follows, so it is unknown "
                "where the answer begins; give such rows as prompt and completion strings, or another template"
            )
        text = conversation.removeprefix(prompt)
        _check_names(where, "the tool calls of the last message", tool_names(response), text)
        if reasoning(response).strip() not in text:
            raise BadRow(
                f"{where}: the reasoning of the last message is not rendered by the chat template; use one that "
                "renders it, or write it into the content"
            )
        return prompt, self._without_suffix(text)

    def earlier_turns(self, where: str, messages: list[Message], prompt: str, tools: Tools = None) -> list[Span]:
        """The spans of a rendered prompt that the assistant's earlier messages take up.

        Where the template marks them by `{% generation %}`, these marks count. Else a turn begins where the messages
        before it and a generation prompt end, and ends as a response does. A message without any before it is no turn,
        as it answers nothing.

        Raises:
            BadRow: if the template renders an earlier turn in another way than as the last one.
        """
        template = self.tokenizer.chat_template
        if isinstance(template, str) and re.search(r"\{%-?\s*generation\s*-?%\}", template):
            return within_limit(_marked_spans, self.tokenizer, messages, tools, self.arguments)
        spans = []
        for index, message in enumerate(messages):
            if index and message["role"] == "assistant":
                start = len(self._prefix(where, index, prompt, messages[:index], tools, add_generation_prompt=True))
                turns = self._prefix(where, index, prompt, messages[: index + 1], tools)
                spans.append((start, start + len(self._without_suffix(turns[start:]))))
        return spans

    @cached_property
    def response_end(self) -> ResponseEnd:
        """How the template ends a response."""
        return ResponseEnd.of(self.tokenizer)

    def _without_suffix(self, text: str) -> str:
        end = self.response_end
        return text.removesuffix(end.suffix) + end.end if text.endswith(end.suffix) else text

    def _prefix(
        self, where: str, index: int, prompt: str, messages: list[Message], tools: Tools, **options: Any
    ) -> str:
        """The rendered messages, which the prompt begins with."""
        text = self._render(where, messages, tools, **options)
        if not prompt.startswith(text):
            raise BadRow(
                f"{where}: the chat template renders message {index + 1}, an earlier answer, differently when others "
                "follow, so it is unknown which tokens to train on; use train_on: last, or a template with "
                "{% generation %}"
            )
        return text

    def _render(
        self, where: str, messages: list[Message], tools: Tools = None, add_generation_prompt: bool = False
    ) -> str:
        if not self.tokenizer.chat_template:
            raise DataError(
                f"{where}: a conversation needs a tokenizer with a chat template, and this one has none; "
                "set tokenizer.chat_template or give prompt and completion as strings"
            )
        options = {**self.arguments, "add_generation_prompt": add_generation_prompt}
        if tools is not None:
            options["tools"] = tools
        try:
            return _apply(self.tokenizer, messages, **options)
        except DataError as error:
            raise DataError(f"{where}: {error}") from error
        except Exception as error:  # templates raise anything, e.g. "System role not supported"
            raise BadRow(f"{where}: the chat template refuses the conversation: {error}") from error


def _apply(tokenizer: PreTrainedTokenizerBase, messages: list[Message], **options: Any) -> str:
    template = tokenizer.chat_template
    for text in template.values() if isinstance(template, dict) else [template]:
        if text not in _checked:
            check_template(text)
            _checked.add(text)
    text = within_limit(tokenizer.apply_chat_template, messages, tokenize=False, **options)
    assert isinstance(text, str)
    return text


_checked: set[str] = set()


def _marked_spans(
    tokenizer: PreTrainedTokenizerBase, messages: list[Message], tools: Tools, arguments: Mapping[str, Any]
) -> list[Span]:
    """The spans that the template marks by `{% generation %}`."""
    options = {**tokenizer.special_tokens_map, **arguments, "add_generation_prompt": True}
    template: Any = tokenizer.chat_template
    render: Any = render_jinja_template  # which declares a text as its result
    _, [spans] = render([messages], tools, chat_template=template, return_assistant_tokens_mask=True, **options)
    return spans[1:] if messages[0]["role"] == "assistant" else spans


def _is_in(text: str, content: str) -> bool:
    """Is the content in the text, up to white space around it, as it is or as JSON?"""
    as_json = [json.dumps(content, ensure_ascii=ascii_only)[1:-1] for ascii_only in (True, False)]
    return any(form in text for form in (content.strip(), *as_json))


def _check_names(where: str, what: str, names: list[str], text: str) -> None:
    for name in names:
        if name not in text:
            raise BadRow(
                f'{where}: {what} are not rendered by the chat template ("{name}" is missing from the text); use a '
                "tokenizer whose template renders them"
            )

"""Conversations as people store them, as the messages that chat templates read.

A message has a role and content; ShareGPT writes `from` and `value`. Content may be a list of text parts, and an
assistant's message may have tool calls and reasoning. What no chat template could render as it is meant is refused by
name.
"""

import json
from collections.abc import Mapping
from typing import Any

from .errors import BadRow, check_text, describe
from .text_files import load_json

Message = dict[str, Any]

ROLES = ("system", "developer", "user", "assistant", "tool")
SHAREGPT_ROLES = {
    **{role: role for role in ROLES},
    **dict.fromkeys(("human",), "user"),
    **dict.fromkeys(("gpt", "chatgpt", "bing", "bard", "model", "bot"), "assistant"),
    **dict.fromkeys(("observation", "function_response"), "tool"),
}
ANY_END = ("user", "assistant", "tool")  # the roles that a conversation's last message may have
REASONING = ("reasoning_content", "reasoning", "thinking")
WEIGHTS = ("weight", "train", "loss")  # in other tools: whether a message is trained on
NOT_UNDERSTOOD = ("function_call", "images", "image", "audio", "videos", "video", "refusal")


def is_conversation(value: Any) -> bool:
    """Is the value a list of messages, rather than a text or a list of texts?"""
    return isinstance(value, list) and bool(value) and isinstance(value[0], Mapping)


def read_messages(
    where: str, name: str, value: Any, last: tuple[str, ...] = ("user", "assistant", "tool")
) -> list[Message]:
    """The messages of a conversation, with the keys that chat templates read.

    Args:
        value: a list of messages, or its JSON text.
        name: the column's; for errors.
        last: the roles that the last message may have.

    Raises:
        BadRow: naming the message that is wrong.
    """
    value = _parsed(value)
    if not is_conversation(value):
        raise BadRow(f'{where}: the "{name}" should be a list of messages with role and content, not {describe(value)}')
    messages = [_message(where, f"message {number} of the {name}", item) for number, item in enumerate(value, 1)]
    roles = [message["role"] for message in messages]
    for number, role in enumerate(roles[1:], 2):
        after = roles[number - 2]
        if role in ("system", "developer"):
            raise BadRow(f"{where}: message {number} of the {name} is the {role}'s, which should come first")
        if role == "tool" and after not in ("assistant", "tool"):
            raise BadRow(f"{where}: message {number} of the {name} is a tool's result, but follows the {after}'s")
    if roles[-1] not in last:
        names = "the user" if last[0] == "user" else "the assistant"
        others = " or the assistant" if "assistant" in last[1:] else ""
        raise BadRow(f"{where}: the {name} should end with a message of {names}{others}")
    if roles == ["assistant"] and "user" in last:
        raise BadRow(f"{where}: message 1 of the {name} is the assistant's and comes first, so there is no prompt")
    return messages


def read_tools(where: str, value: Any) -> list[dict[str, Any]] | None:
    """The tools that a row offers the assistant: a list of JSON schemas, or its JSON text; None without tools.

    Raises:
        BadRow: for anything else.
    """
    value = _parsed(value)
    if value is None or value == [] or value == "":
        return None
    if not isinstance(value, list) or not all(isinstance(tool, Mapping) and _name(tool) for tool in value):
        raise BadRow(f'{where}: "tools" should be a list of functions with name and parameters, not {describe(value)}')
    return [dict(tool) for tool in value]


def tool_names(message_or_tools: Message | list[dict[str, Any]] | None) -> list[str]:
    """The names of the tools that a message calls, or that a list describes."""
    calls = message_or_tools.get("tool_calls", []) if isinstance(message_or_tools, dict) else message_or_tools or []
    return [name for call in calls if (name := _name(call))]


def reasoning(message: Message) -> str:
    """The reasoning of an assistant's message apart from its content; empty without any."""
    return next((message[key] for key in REASONING if message.get(key)), "")


def _parsed(value: Any) -> Any:
    """The value of a JSON text of a list; any other value unchanged."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            return load_json(value)
        except ValueError:
            return value
    return value


def _name(tool: Mapping[str, Any]) -> str | None:
    function = tool.get("function", tool)
    name = function.get("name") if isinstance(function, Mapping) else None
    return name if isinstance(name, str) and name else None


def _message(where: str, which: str, item: Any) -> Message:
    if not isinstance(item, Mapping):
        raise BadRow(f"{where}: {which} is {describe(item)}, not a message with role and content")
    message = {key: value for key, value in item.items() if value is not None}
    if "from" in message and "role" not in message:
        message = _from_sharegpt(where, which, message)
    role = message.get("role")
    if not isinstance(role, str) or role not in ROLES:
        raise BadRow(f"{where}: {which} has the role {describe(role)}; use system, user, assistant or tool")
    for key in NOT_UNDERSTOOD:
        if message.get(key):
            remedy = "; use tool_calls" if key == "function_call" else ""
            raise BadRow(f'{where}: {which} has "{key}", which is not understood{remedy}')
    for key in WEIGHTS:
        if message.get(key, 1) not in (1, True):
            reason = "weights of single messages are not understood: leave them out, or see data.train_on"
            raise BadRow(f'{where}: {which} has "{key}" {describe(message[key])}; {reason}')
    if "tool_calls" in message:
        message["tool_calls"] = _tool_calls(where, which, role, message["tool_calls"])
        if not message["tool_calls"]:
            del message["tool_calls"]
    for key in REASONING:
        if message.get(key):
            check_text(where, f"{key} of {which}", message[key])
    content = _content(where, which, message.get("content", ""))
    may_be_empty = "tool_calls" in message or role == "tool"
    if may_be_empty and isinstance(content, str) and not content.strip():
        return {**message, "content": ""}
    return {**message, "content": check_text(where, f"content of {which}", content if "content" in message else None)}


def _from_sharegpt(where: str, which: str, message: Message) -> Message:
    """A message with `from` and `value`, with role and content in their place."""
    author, content = message.pop("from"), message.pop("value", None)
    if author == "function_call":
        call = _object(content)
        if call is None:
            raise BadRow(f"{where}: {which} is a function_call, and its value is {describe(content)}, not one in JSON")
        return {**message, "role": "assistant", "content": "", "tool_calls": [call]}
    if isinstance(author, str) and author in SHAREGPT_ROLES:
        return {**message, "role": SHAREGPT_ROLES[author], "content": content}
    raise BadRow(f'{where}: {which} is from {describe(author)}; use "system", "human", "gpt" or "tool"')


def _content(where: str, which: str, content: Any) -> Any:
    """The text of a list of text parts; any other content unchanged."""
    if not isinstance(content, list) or not content:
        return content
    texts = []
    for number, part in enumerate(content, 1):
        kind = part.get("type") if isinstance(part, Mapping) else None
        what = f"{where}: part {number} of the content of {which}"
        if kind != "text":
            is_named = isinstance(kind, str)
            raise BadRow(
                f"{what} is {f'of the type {json.dumps(kind)}' if is_named else describe(part)}, and only parts of the "
                'type "text" are understood'
            )
        if not isinstance(part.get("text"), str):
            raise BadRow(f'{what} has the "text" {describe(part.get("text"))}, which is not a string')
        texts.append(part["text"])
    return "".join(texts)


def _tool_calls(where: str, which: str, role: str, calls: Any) -> list[dict[str, Any]]:
    """The calls, with their arguments as objects, which is what chat templates read."""
    calls = _parsed(calls)
    if not isinstance(calls, list) or not all(isinstance(call, Mapping) and _name(call) for call in calls):
        raise BadRow(f"{where}: the tool_calls of {which} should be a list of functions with name and arguments")
    if calls and role != "assistant":
        raise BadRow(f"{where}: {which} is the {role}'s and has tool_calls, which only the assistant makes")
    result = []
    for call in calls:
        function = dict(call.get("function", call))
        arguments = function.get("arguments", {})
        function["arguments"] = _object(arguments) if isinstance(arguments, str) else arguments
        if not isinstance(function["arguments"], Mapping):
            raise BadRow(f"{where}: the arguments of a tool call of {which} are {describe(arguments)}, not an object")
        others = {key: value for key, value in call.items() if key in ("id", "index") and value is not None}
        result.append({**others, "type": "function", "function": function})
    return result


def _object(text: Any) -> dict[str, Any] | None:
    try:
        value = load_json(text) if isinstance(text, str) else text
    except ValueError:
        return None
    return value if isinstance(value, dict) else None

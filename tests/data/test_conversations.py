"""Conversations in the forms in which people store them, with reasoning, tools and several trained turns."""

import json

import pytest
from rows_of_text import CHATML, byte_level, texts

from understudy.data.examples import DataError, examples_from_rows

SYSTEM = {"role": "system", "content": "Be brief."}
USER, ASSISTANT = {"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Me."}
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Rome"}}}
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}
CALLING = {"role": "assistant", "content": "", "tool_calls": [CALL]}
RESULT = {"role": "tool", "content": "12 °C"}
# As Qwen's, in short: tools before the messages, reasoning and tool calls inside those of the assistant.
TOOLS = (
    "{% if tools %}<tools>{% for tool in tools %}{{ tool | tojson }}{% endfor %}</tools>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}{{ m.content }}"
    "{% for call in m.tool_calls or [] %}<call>{{ call.function.name }} {{ call.function.arguments | tojson }}</call>"
    "{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="module")
def tools():
    return byte_level(chat=TOOLS)


def fingerprint(row, tokenizer):
    return examples_from_rows([row], tokenizer).fingerprint


def test_sharegpt_conversations_are_messages(chatml):
    shared = [{"from": "human", "value": "Who?"}, {"from": "gpt", "value": "Me."}]
    expected = fingerprint({"messages": [USER, ASSISTANT]}, chatml)
    assert fingerprint({"conversations": shared}, chatml) == expected
    assert fingerprint({"messages": shared}, chatml) == expected
    assert fingerprint({"conversation": [USER, ASSISTANT]}, chatml) == expected
    assert fingerprint({"messages": json.dumps([USER, ASSISTANT])}, chatml) == expected
    with_system = {"system": "Be brief.", "conversations": shared}
    assert fingerprint(with_system, chatml) == fingerprint({"messages": [SYSTEM, USER, ASSISTANT]}, chatml)


def test_a_sharegpt_author_that_is_unknown_is_explained(chatml):
    with pytest.raises(DataError, match=r"message 1 of the conversations is from a string \('narrator'\); use"):
        examples_from_rows([{"conversations": [{"from": "narrator", "value": "x"}]}], chatml)


def test_text_parts_are_one_text_and_other_parts_are_refused_by_name(chatml):
    parts = [{"type": "text", "text": "Wh"}, {"type": "text", "text": "o?"}]
    row = {"messages": [{"role": "user", "content": parts}, ASSISTANT]}
    assert fingerprint(row, chatml) == fingerprint({"messages": [USER, ASSISTANT]}, chatml)
    image = {"type": "image_url", "image_url": {"url": "a.png"}}
    for part, message in {
        "image": (image, 'is of the type "image_url", and only parts of the type "text" are understood'),
        "number": ({"type": "text", "text": 3}, r'has the "text" a number \(3\), which is not a string'),
        "string": ("o?", r"is a string \('o\?'\), and only parts of the type"),
    }.values():
        with pytest.raises(DataError, match=f"part 2 of the content of message 1 of the messages {message}"):
            examples_from_rows([{"messages": [{"role": "user", "content": [*parts[:1], part]}]}], chatml)


@pytest.mark.parametrize(
    "messages",
    [[ASSISTANT, USER, ASSISTANT], [USER, USER, ASSISTANT], [SYSTEM, ASSISTANT], [USER, ASSISTANT, ASSISTANT]],
)
def test_a_greeting_assistant_and_two_turns_of_one_are_rendered_as_they_are(messages, chatml):
    [example] = examples_from_rows([{"messages": messages}], chatml)
    before = "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in messages[:-1])
    assert texts(chatml, example) == (f"{before}<|im_start|>assistant\n", "Me.<|im_end|>")


def test_reasoning_is_rendered_or_refused(tools, chatml):
    thinking = {**ASSISTANT, "reasoning_content": "Hm."}
    for row in ({"messages": [USER, thinking]}, {"prompt": [USER], "completion": [thinking]}):
        [example] = loaded = examples_from_rows([row], tools)
        assert texts(tools, example)[1] == "<think>Hm.</think>Me.<|im_end|>"
        assert loaded.rows[0].references == ("Me.",)
        with pytest.raises(DataError, match="the reasoning of the last message is not rendered by the chat template"):
            examples_from_rows([row], chatml)
    with pytest.raises(DataError, match='reasoning of the "completion" can only be rendered by a chat template'):
        examples_from_rows([{"prompt": "Who?", "completion": [thinking]}], tools)


def test_tools_calls_and_results_are_rendered(tools):
    [example] = examples_from_rows([{"tools": [TOOL], "messages": [USER, CALLING, RESULT, ASSISTANT]}], tools)
    prompt, response = texts(tools, example)
    assert prompt.startswith(f"<tools>{json.dumps(TOOL)}</tools>\n<|im_start|>user\nWho?")
    assert '<call>weather {"city": "Rome"}</call><|im_end|>\n<|im_start|>tool\n12 °C<|im_end|>' in prompt
    assert response == "Me.<|im_end|>"


def test_a_tool_call_can_be_the_response(tools):
    [example] = loaded = examples_from_rows([{"tools": json.dumps([TOOL]), "messages": [USER, CALLING]}], tools)
    call = '<call>weather {"city": "Rome"}</call>'
    assert texts(tools, example)[1] == f"{call}<|im_end|>"
    assert loaded.rows[0].references == (call,)


def test_tool_calls_as_openai_and_sharegpt_write_them_are_the_same(tools):
    expected = fingerprint({"messages": [USER, CALLING]}, tools)
    text = {**CALL, "id": "1", "function": {"name": "weather", "arguments": '{"city": "Rome"}'}}
    assert (
        fingerprint({"messages": [USER, {"role": "assistant", "content": None, "tool_calls": [text]}]}, tools)
        == expected
    )
    shared = [{"from": "human", "value": "Who?"}, {"from": "function_call", "value": json.dumps(CALL["function"])}]
    assert fingerprint({"conversations": shared}, tools) == expected


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"tools": [TOOL], "messages": [USER, ASSISTANT]}, "row 1: the tools are not rendered by the chat template"),
        ({"messages": [USER, CALLING]}, "the tool calls of the last message are not rendered by the chat template"),
        ({"messages": [USER, CALLING, RESULT, ASSISTANT]}, "the tool calls of message 2 are not rendered"),
        ({"tools": "a hammer", "messages": [USER]}, '"tools" should be a list of functions'),
        ({"tools": [TOOL], "prompt": "Who?"}, "tools are for chat templates, and the prompt is plain text"),
        ({"messages": [{**USER, "tool_calls": [CALL]}]}, "is the user's and has tool_calls, which only the assistant"),
        ({"messages": [USER, {**CALLING, "tool_calls": ["x"]}]}, "the tool_calls of message 2 .* should be a list of"),
        (
            {"messages": [{**USER, "images": ["a.png"]}]},
            'message 1 of the messages has "images", which is not',
        ),
        (
            {"messages": [USER, {**ASSISTANT, "function_call": {"name": "f"}}]},
            '"function_call", .*; use tool_calls',
        ),
        ({"messages": [USER, {**ASSISTANT, "weight": 0}]}, 'message 2 of the messages has "weight" a number'),
    ],
)
def test_what_is_not_supported_is_refused_by_name(row, message, chatml):
    with pytest.raises(DataError, match=message):
        examples_from_rows([row], chatml)


def test_a_message_that_the_template_leaves_out_is_refused():
    template = CHATML.replace("{% for m in messages %}", "{% for m in messages if m.role != 'system' %}")
    with pytest.raises(DataError, match="the chat template leaves out message 1, the system's"):
        examples_from_rows([{"messages": [SYSTEM, USER]}], byte_level(chat=template))


# Which turns are trained on

LONG_CHAT = [SYSTEM, USER, ASSISTANT, {"role": "user", "content": "And now?"}, {"role": "assistant", "content": "You."}]


def trained_text(tokenizer, example):
    """The response's parts that are trained on, separated by a bar."""
    parts, last = [], -2
    for place in example.trained_tokens:
        parts += [""] if place > last + 1 else []
        last = place
        parts[-1] += tokenizer.decode(example.response[place])
    return "|".join(parts)


@pytest.mark.parametrize("marked", [False, True])
def test_all_turns_of_the_assistant_can_be_trained_on(marked):
    turn = "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}{% else %}"
    newline = "{{ '\\n' }}"  # one after a block would be removed
    template = CHATML.replace("{{ m.content }}<|im_end|>\n", turn + "{{ m.content }}<|im_end|>{% endif %}" + newline)
    tokenizer = byte_level(chat=template if marked else CHATML)
    [last] = loaded = examples_from_rows([{"messages": LONG_CHAT}], tokenizer)
    [example] = every = examples_from_rows([{"messages": LONG_CHAT}], tokenizer, train_on="all")
    assert example.prompt + example.response == last.prompt + last.response
    assert texts(tokenizer, example)[0].endswith("Who?<|im_end|>\n<|im_start|>assistant\n")
    assert trained_text(tokenizer, example) == "Me.<|im_end|>|You.<|im_end|>"
    assert (example.last_turn().prompt, example.last_turn().response) == (last.prompt, last.response)
    assert every.rows[0].prompt == loaded.rows[0].prompt, "a model generates the last turn"
    assert every.fingerprint != loaded.fingerprint


def test_a_greeting_is_not_trained_on_and_a_single_turn_is_as_ever(chatml):
    [example] = examples_from_rows([{"messages": [ASSISTANT, USER, ASSISTANT]}], chatml, train_on="all")
    assert example.trained is None
    assert example.last_turn() is example


def test_of_prompt_and_completion_only_the_completion_is_trained_on(chatml):
    [example] = examples_from_rows([{"prompt": LONG_CHAT[:-1], "completion": LONG_CHAT[-1:]}], chatml, train_on="all")
    assert example.trained is None
    assert texts(chatml, example)[1] == "You.<|im_end|>"


def test_a_cut_conversation_trains_on_the_turns_that_are_complete(chatml):
    [whole] = examples_from_rows([{"messages": LONG_CHAT}], chatml, train_on="all")
    behind_first = len(whole.prompt) + 1
    longest = len(whole.last_turn().prompt)
    for cut in range(1, longest):
        options = {"max_prompt_length": longest - cut, "train_on": "all"}
        [example] = examples_from_rows([{"messages": LONG_CHAT}], chatml, **options)
        expected = "Me.<|im_end|>|You.<|im_end|>" if cut < behind_first - 1 else "You.<|im_end|>"
        assert trained_text(chatml, example) == expected
        assert len(example.last_turn().prompt) == longest - cut


def test_a_template_that_renders_earlier_answers_differently_is_refused():
    template = CHATML.replace("{{ m.content }}", "{{ m.content if loop.last or m.role != 'assistant' else 'old' }}")
    tokenizer = byte_level(chat=template)
    examples_from_rows([{"messages": LONG_CHAT}], tokenizer)
    with pytest.raises(DataError, match=r"message 3, an earlier answer, differently .*; use train_on: last"):
        examples_from_rows([{"messages": LONG_CHAT}], tokenizer, train_on="all")


def test_train_on_is_last_or_all(chatml):
    with pytest.raises(DataError, match='train_on is "first", and can be last or all'):
        examples_from_rows([{"messages": LONG_CHAT}], chatml, train_on="first")


def test_with_all_messages_a_conversation_that_ends_with_the_user_is_trained_on_up_to_the_last_answer(chatml):
    question = {"role": "user", "content": "Why?"}
    conversation = [USER, ASSISTANT, USER, ASSISTANT]
    [open_ended] = examples_from_rows([{"messages": [*conversation, question]}], chatml, train_on="all")
    [answered] = examples_from_rows([{"messages": conversation}], chatml, train_on="all")
    assert (open_ended.prompt, open_ended.response) == (answered.prompt, answered.response)
    [prompt] = examples_from_rows([{"messages": [USER]}], chatml, train_on="all")
    assert not prompt.response


def test_functions_in_a_column_of_their_own_are_refused(chatml):
    with pytest.raises(DataError, match='"functions" are not understood; give them as a column "tools"'):
        examples_from_rows([{"messages": [USER, ASSISTANT], "functions": [{"name": "f"}]}], chatml)


@pytest.mark.parametrize("name", ["tokenize", "messages", "add_generation_prompt", "tools"])
def test_arguments_of_the_template_that_rendering_sets_are_refused(name, chatml):
    with pytest.raises(DataError, match=f"chat_template_kwargs sets {name}, which is set here"):
        examples_from_rows([{"messages": [USER, ASSISTANT]}], chatml, chat_template_kwargs={name: False})

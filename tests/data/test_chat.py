"""Conversations are rendered by the chat template, and malformed ones are explained."""

import pytest
from rows_of_text import CHATML, byte_level, texts

from understudy.data.chat import end_of_response_ids
from understudy.data.examples import DataError, examples_from_rows


def test_a_chat_template_brings_its_own_bos(llama):
    row = {"messages": [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Me"}]}
    [example] = examples_from_rows([row], llama)
    assert example.prompt.count(llama.bos_token_id) == 1
    assert example.prompt[0] == llama.bos_token_id
    assert example.response[-1] == llama.eos_token_id
    assert example.response.count(llama.eos_token_id) == 1
    as_the_template_writes_it = "<s> [INST] Who? [/INST] Me </s>"
    assert llama.decode(example.prompt + example.response) == as_the_template_writes_it


def test_a_chat_answer_ends_with_the_template_s_end_token_and_nothing_behind_it(chatml):
    row = {"messages": [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Me"}]}
    [example] = examples_from_rows([row], chatml)
    end = chatml.convert_tokens_to_ids("<|im_end|>")
    assert example.response[-1] == end
    assert end_of_response_ids(chatml) == sorted([end, chatml.eos_token_id])


def test_the_first_of_two_end_tokens_ends_the_answer():
    template = CHATML.replace("<|im_end|>", "<|end|>").replace("{% endif %}", "{% else %}{{ eos_token }}{% endif %}")
    tokenizer = byte_level(chat=template)
    row = {"messages": [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Me"}]}
    [example] = examples_from_rows([row], tokenizer)
    assert tokenizer.decode(example.response) == "Me<|end|>"


def test_a_template_without_an_end_token_gets_the_tokenizer_s():
    tokenizer = byte_level(chat="{% for m in messages %}{{ m.role }}: {{ m.content }}\n\n{% endfor %}"
                                "{% if add_generation_prompt %}assistant: {% endif %}")  # fmt: skip
    row = {"messages": [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Me"}]}
    [example] = examples_from_rows([row], tokenizer)
    assert texts(tokenizer, example) == ("user: Who?\n\nassistant: ", "Me<|endoftext|>")
    assert end_of_response_ids(tokenizer) == [tokenizer.eos_token_id]


def test_arguments_reach_the_chat_template():
    template = CHATML.replace("assistant\n{% endif %}", "assistant\n{% if not think %}<s>{% endif %}{% endif %}")
    row = {"prompt": [{"role": "user", "content": "Who?"}]}
    [example] = examples_from_rows([row], byte_level(chat=template), chat_template_kwargs={"think": True})
    assert not byte_level().decode(example.prompt).endswith("<s>")


def test_a_template_that_rewrites_the_prompt_is_refused():
    template = CHATML.replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}")
    row = {"messages": [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Me"}]}
    with pytest.raises(DataError, match="it is unknown where the answer begins"):
        examples_from_rows([row], byte_level(chat=template))


def test_a_conversation_without_a_chat_template_is_refused_even_when_bad_rows_are_skipped(gpt2):
    with pytest.raises(DataError, match="needs a tokenizer with a chat template"):
        examples_from_rows([{"messages": [{"role": "user", "content": "Hi"}]}], gpt2, on_bad_row="skip")


def test_the_error_of_a_chat_template_is_in_the_message(llama):
    row = {"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]}
    with pytest.raises(DataError, match="row 1: the chat template refuses the conversation: no system role"):
        examples_from_rows([row], llama)


@pytest.mark.parametrize(
    ("turns", "message"),
    [
        (["bot"], r"message 1 of the messages has the role a string \(\'bot\'\); use system, user, assistant or tool"),
        (["assistant"], "message 1 of the messages is the assistant's and comes first"),
        (["user", "system"], "message 2 of the messages is the system's"),
        (["user", "tool"], "message 2 of the messages is a tool's result, but follows the user's"),
        (["system"], "should end with a message of the user or the assistant"),
    ],
)
def test_a_conversation_out_of_order_is_explained(turns, message, chatml):
    with pytest.raises(DataError, match=message):
        examples_from_rows([{"messages": [{"role": role, "content": "x"} for role in turns]}], chatml)


@pytest.mark.parametrize("content", ["", None, 3, [], [{"type": "text", "text": " "}]])
def test_a_message_without_text_is_explained(content, chatml):
    with pytest.raises(DataError, match='the "content of message 1 of the messages" is '):
        examples_from_rows([{"messages": [{"role": "user", "content": content}]}], chatml)


def test_a_conversational_prompt_must_end_with_the_user(chatml):
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    with pytest.raises(DataError, match="the prompt should end with a message of the user"):
        examples_from_rows([{"prompt": turns}], chatml)
    with pytest.raises(DataError, match="should be one message of the role assistant"):
        examples_from_rows([{"prompt": turns[:1], "completion": turns}], chatml)

"""Rows of every format become prompts and responses."""

import pytest
from rows_of_text import PAIR, texts

from understudy.data.examples import DataError, examples_from_rows


def test_question_and_answer_are_taken_as_they_are(gpt2):
    [example] = examples_from_rows([{"question": "Who?", "answer": "The star"}], gpt2)
    assert texts(gpt2, example) == ("Who?", "The star<|endoftext|>")


def test_an_instruction_takes_the_alpaca_prompt_without_a_chat_template(gpt2):
    add, sing = {"instruction": "Add", "input": "2, 2"}, {"instruction": "Sing", "input": ""}
    rows = [{**add, "output": "4"}, {**sing, "output": "La"}]
    first, second = examples_from_rows(rows, gpt2).rows
    assert first.prompt.endswith("### Instruction:\nAdd\n\n### Input:\n2, 2\n\n### Response:\n")
    assert second.prompt.startswith("Below is an instruction that describes a task. Write a response")
    assert "Input" not in second.prompt


def test_an_instruction_is_a_chat_where_there_is_a_chat_template(chatml):
    [example] = examples_from_rows([{"instruction": "Add", "input": "2, 2", "output": "4"}], chatml)
    prompt = "<|im_start|>user\nAdd\n\n2, 2<|im_end|>\n<|im_start|>assistant\n"
    assert texts(chatml, example) == (prompt, "4<|im_end|>")


def test_a_conversation_answers_with_its_last_message_alone(chatml):
    turns = [("system", "Be brief."), ("user", "Hi"), ("assistant", "Ho"), ("user", "Who?"), ("assistant", "Me.")]
    [example] = loaded = examples_from_rows([{"messages": [{"role": r, "content": c} for r, c in turns]}], chatml)
    prompt, response = texts(chatml, example)
    assert "Ho<|im_end|>" in prompt
    assert prompt.endswith("<|im_start|>assistant\n")
    assert response == "Me.<|im_end|>"
    assert loaded.rows[0].references == ("Me.",)


def test_conversational_prompt_and_completion_are_a_chat(chatml):
    user, assistant = {"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Me."}
    pair = examples_from_rows([{"prompt": [user], "completion": [assistant]}], chatml)
    assert pair.fingerprint == examples_from_rows([{"messages": [user, assistant]}], chatml).fingerprint


@pytest.mark.parametrize("row", [{"prompt": "Who?"}, {"question": "Who?"}, {"instruction": "Sing"}])
def test_a_prompt_alone_has_an_empty_response(row, gpt2):
    [example] = loaded = examples_from_rows([row], gpt2)
    assert example.prompt
    assert example.response == []
    assert not loaded.has_responses


@pytest.mark.parametrize("column", ["messages", "prompt"])
def test_a_conversation_that_ends_with_the_user_is_a_prompt_alone(column, chatml):
    [example] = examples_from_rows([{column: [{"role": "user", "content": "Who?"}]}], chatml)
    assert texts(chatml, example) == ("<|im_start|>user\nWho?<|im_end|>\n<|im_start|>assistant\n", "")


def test_a_method_that_needs_responses_refuses_rows_without(gpt2):
    examples_from_rows([PAIR], gpt2).require_responses("sft")
    with pytest.raises(DataError, match=r"sft trains on responses, and no row of mine has one"):
        examples_from_rows([{"prompt": "a"}], gpt2, source="mine").require_responses("sft")
    with pytest.raises(DataError, match=r"only 1 of 2 rows of mine has one \(the first without: mine, row 2\)"):
        examples_from_rows([PAIR, {"prompt": "a"}], gpt2, source="mine").require_responses()


def test_columns_can_be_named_and_a_list_is_several_references(gpt2):
    row = {"en": "I like cake.", "de": ["Ich mag Kuchen.", "Kuchen mag ich."], "question": "?", "answer": "!"}
    loaded = examples_from_rows([row], gpt2, columns={"prompt": "en", "completion": "de"})
    assert texts(gpt2, loaded[0]) == ("I like cake.", "Ich mag Kuchen.<|endoftext|>")
    assert loaded.rows[0].references == ("Ich mag Kuchen.", "Kuchen mag ich.")


def test_questions_become_chats_by_naming_them_instructions(chatml):
    columns = {"instruction": "question", "output": "answer"}
    [example] = examples_from_rows([{"question": "Who?", "answer": "Me."}], chatml, columns=columns)
    assert texts(chatml, example) == ("<|im_start|>user\nWho?<|im_end|>\n<|im_start|>assistant\n", "Me.<|im_end|>")


def test_a_template_writes_the_prompt_over_any_columns(chatml):
    row = {"instruction": "Add", "numbers": 22, "output": "4"}
    [example] = examples_from_rows([row], chatml, template="{instruction}: {numbers}\nAnswer:")
    assert texts(chatml, example) == ("Add: 22\nAnswer:", "4<|endoftext|>")


def test_a_prompt_of_several_sentences_is_one_text(gpt2):
    row = {"prompt": ["One.", "Two."], "completion": ["A.", "B."]}
    [example] = examples_from_rows([row], gpt2).rows
    assert (example.prompt, example.references) == ("One. Two.", ("A.", "B."))
    [example] = examples_from_rows([row], gpt2, template="{prompt} TL;DR:").rows
    assert example.prompt == "One. Two. TL;DR:"
    with pytest.raises(DataError, match='the "prompt" is a list'):
        examples_from_rows([{"prompt": ["One.", 2]}], gpt2)


def test_a_template_reads_columns_and_no_attributes(gpt2):
    row = {"translation": {"en": "Who?", "deep": {"de": "Wer?"}}}
    options = {"template": "{translation.en} ", "columns": {"completion": "translation.deep.de"}}
    [example] = examples_from_rows([row], gpt2, **options).rows
    assert (example.prompt, example.response) == ("Who? ", "Wer?")
    with pytest.raises(DataError, match=r'names the column "translation\.__class__", but'):
        examples_from_rows([row], gpt2, template="{translation.__class__}")


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{questions}", r'row 1: the template names the column "questions", but .*mean "question"\?'),
        ("Q: {", "is not a format string"),
        ("Q: ", "names no column"),
        ("{}", 'the template names the column ""'),
        ("{question:d}", "the template cannot be filled"),
    ],
)
def test_a_template_that_does_not_fit_is_explained(template, message, gpt2):
    with pytest.raises(DataError, match=message):
        examples_from_rows([{"question": "Who?", "answer": "Me"}], gpt2, template=template)


def test_unknown_names_in_columns_are_explained(gpt2):
    with pytest.raises(DataError, match=r'columns names "prompts", .*did you mean "prompt"\?'):
        examples_from_rows([PAIR], gpt2, columns={"prompts": "en"})
    with pytest.raises(DataError, match=r'prompt should be in the column "em", but the row has "english"'):
        examples_from_rows([{"english": "a"}], gpt2, columns={"prompt": "em"})

"""Rows of every format become prompts and responses."""

import pytest
from rows_of_text import PAIR, texts

from understudy.data.examples import DataError, examples_from_rows, load_examples


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
    with pytest.raises(DataError, match=r"only 1 of 2 rows of mine has one \(the first without: mine, row 2, with"):
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


# Other names of columns


@pytest.mark.parametrize(
    ("columns", "prompt", "answer"),
    [
        ("prompt response", "prompt", "response"),
        ("prompt answer", "prompt", "answer"),
        ("query response type", "query", "response"),
        ("question response", "question", "response"),
        ("problem solution level", "problem", "solution"),
        ("input output", "input", "output"),
        ("prompt completion response", "prompt", "completion"),
        ("question answer solution", "question", "answer"),
        ("query", "query", None),
    ],
)
def test_other_names_of_prompt_and_answer_are_recognised_where_only_one_can_be_meant(
    columns, prompt, answer, gpt2, caplog
):
    [row] = examples_from_rows([{name: f"the {name}" for name in columns.split()}], gpt2).rows
    assert (row.prompt, row.response) == (f"the {prompt}", f"the {answer}" if answer else "")
    own = {"prompt": "completion", "question": "answer"}
    assert ("is read from" in caplog.text) == (own.get(prompt, prompt) != answer)


def test_what_is_read_from_which_column_is_said(gpt2, caplog):
    examples_from_rows([{"query": "a", "response": "b", "context": "c", "id": "d"}], gpt2, source="mine")
    assert 'mine: prompt is read from "query" and completion is read from "response"' in caplog.text
    assert 'mine: not read: "context"' in caplog.text


def test_several_columns_that_could_be_meant_are_refused_until_one_is_named(gpt2):
    row = {"prompt": "a", "response": "b", "solution": "c"}
    with pytest.raises(DataError, match=r'several columns could be the answer: "response", "solution"; name the one'):
        examples_from_rows([row], gpt2)
    [example] = examples_from_rows([row], gpt2, columns={"prompt": "prompt", "completion": "solution"}).rows
    assert example.response == "c"
    [example] = examples_from_rows([row], gpt2, columns={"prompt": "prompt"}).rows
    assert example.response == ""


def test_dolly_s_context_is_the_input_of_its_instruction(gpt2):
    row = {"instruction": "Add", "context": "2, 2", "response": "4", "category": "sums"}
    same = {"instruction": "Add", "input": "2, 2", "output": "4"}
    assert examples_from_rows([row], gpt2).fingerprint == examples_from_rows([same], gpt2).fingerprint


# Prompts for chat models


@pytest.mark.parametrize("row", [{"prompt": "Who?", "response": "Me."}, {"question": "Who?", "answer": "Me."}])
def test_plain_prompts_become_messages_where_the_template_is_chat(row, chatml):
    [example] = examples_from_rows([{**row, "system": "Be brief."}], chatml, template="chat")
    prompt = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nWho?<|im_end|>\n<|im_start|>assistant\n"
    assert texts(chatml, example) == (prompt, "Me.<|im_end|>")


def test_capitals_and_spaces_in_the_names_of_columns_are_ignored(tmp_path, gpt2, caplog):
    (tmp_path / "a.csv").write_text("Prompt, completion ,TEXT\nWho?,Me.,x\n")
    [example] = load_examples(tmp_path / "a.csv", gpt2)
    assert texts(gpt2, example) == ("Who?", "Me.<|endoftext|>")
    assert 'prompt is read from "Prompt" and completion is read from " completion "' in caplog.text
    assert 'not read: "TEXT"' in caplog.text
    [example] = examples_from_rows([{"Q": "Who?", "Answer": "Me."}], gpt2, template="{Q}")
    assert texts(gpt2, example) == ("Who?", "Me.<|endoftext|>")
    [example] = examples_from_rows([{"prompt": "Who?", "Prompt": "x", "completion": "Me."}], gpt2)
    assert texts(gpt2, example) == ("Who?", "Me.<|endoftext|>")
    with pytest.raises(DataError, match=r'has the columns "Prompt", "PROMPT"'):
        examples_from_rows([{"Prompt": "Who?", "PROMPT": "x"}], gpt2)


def test_plain_prompts_for_a_chat_model_are_warned_about(chatml, gpt2, caplog):
    examples_from_rows([{"prompt": "Who?"}], gpt2)
    examples_from_rows([{"prompt": "Who?"}], chatml, template="chat")
    examples_from_rows([{"prompt": "Who?"}], chatml, template="{prompt}")
    assert not caplog.text
    examples_from_rows([{"prompt": "Who?"}, {"question": "Me?"}], chatml)
    assert "rows: 2 prompts are plain text, which a chat model is not used to; set data.template: chat" in caplog.text


def test_a_chat_template_that_is_not_there_is_asked_for(gpt2):
    for row in ({"prompt": "Who?"}, {"instruction": "Sing"}):
        with pytest.raises(DataError, match="needs a tokenizer with a chat template"):
            examples_from_rows([row], gpt2, template="chat")
    with pytest.raises(DataError, match="template: chat renders prompts"):
        examples_from_rows([{"text": "a"}], gpt2, template="chat")


def test_bytes_are_not_kept_in_memory_and_are_no_text(gpt2):
    row = {"prompt": "Who?", "completion": "Me", "image": {"bytes": b"x" * 9, "path": "a.png"}, "score": 3}
    [example] = examples_from_rows([row], gpt2)
    assert example.columns == {"prompt": "Who?", "completion": "Me", "score": 3, "image.path": "a.png"}
    with pytest.raises(DataError, match=r'row 1: the "prompt" is bytes \(b\'x\'\), not a string'):
        examples_from_rows([{"prompt": b"x"}], gpt2)


@pytest.mark.parametrize("value", [None, float("nan"), 7, True, {"a": 1}, "", " ", 10**5000, [[[]]]], ids=type)
@pytest.mark.parametrize("column", ["prompt", "completion", "instruction", "text"])
def test_a_value_that_is_no_text_is_one_sentence_and_can_be_skipped(column, value, gpt2):
    good = {"prompt": "a", "completion": "b"}
    bad = {
        **({"completion": "b"} if column == "prompt" else {"prompt": "b"} if column == "completion" else {}),
        column: value,
    }
    with pytest.raises(DataError, match=rf'row 2: the "{column}(\[0\])?" is ') as caught:
        examples_from_rows([good, bad], gpt2)
    assert len(str(caught.value)) < 200
    assert examples_from_rows([good, bad], gpt2, on_bad_row="skip").skipped == 1


def test_a_row_that_is_no_dictionary_is_explained(gpt2):
    for row in ("text", {1: "a"}, None):
        with pytest.raises(DataError, match="row 1: a row is a dictionary of columns by their names"):
            examples_from_rows([row], gpt2)


def test_a_template_cannot_fill_the_memory(gpt2):
    with pytest.raises(DataError, match=r"has a field wider than 10,000 characters"):
        examples_from_rows([{"prompt": "a"}], gpt2, template="{prompt:>1000000000}")

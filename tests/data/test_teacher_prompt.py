"""The prompt that only the teacher reads: templates, columns, chats, lengths."""

import pytest
from rows_of_text import CHATML, byte_level

from understudy.data.errors import DataError
from understudy.data.examples import examples_from_rows

ROW = {"question": "1 + 1?", "answer": "2", "hint": "Count!", "chat": [{"role": "user", "content": "Add one to one."}]}
SYSTEM, USER = {"role": "system", "content": "Be brief."}, {"role": "user", "content": "Who?"}
CHAT = {"messages": [SYSTEM, USER, {"role": "assistant", "content": "You."}], "document": "It is you."}


def prompts(row, tokenizer, **options):
    """The texts of the student's and the teacher's prompt, special tokens included."""
    [example] = examples_from_rows([row], tokenizer, **options)
    teacher_prompt = example.teacher_prompt
    return tokenizer.decode(example.prompt), None if teacher_prompt is None else tokenizer.decode(teacher_prompt)


def test_a_template_has_the_prompt_the_first_reference_and_columns(gpt2):
    student, teacher = prompts(ROW, gpt2, teacher_prompt="{hint} {completion} {prompt}")
    assert (student, teacher) == ("1 + 1?", "Count! 2 1 + 1?")


def test_the_prompt_of_a_template_is_what_the_student_reads(gpt2):
    row = {"prompt": "the column", "x": "y"}
    assert prompts(row, gpt2, template="{x}!", teacher_prompt="{prompt}?")[1] == "y!?"


def test_a_text_without_braces_is_a_column(gpt2):
    assert prompts(ROW, gpt2, teacher_prompt="hint") == ("1 + 1?", "Count!")


def test_the_response_is_the_same_and_no_teacher_prompt_is_the_default(gpt2):
    plain, other = (examples_from_rows([ROW], gpt2, **options) for options in ({}, {"teacher_prompt": "hint"}))
    assert (plain[0].response, plain[0].teacher_prompt) == (other[0].response, None)


def test_the_fingerprint_of_the_data_includes_the_teachers_prompts(gpt2):
    texts = [None, "hint", "question"]
    assert len({examples_from_rows([ROW], gpt2, teacher_prompt=text).fingerprint for text in texts}) == 3


def test_a_plain_prompt_begins_with_the_tokenizers_bos(llama):
    [example] = examples_from_rows([ROW], llama, teacher_prompt="hint")
    assert example.prompt[0] == example.teacher_prompt[0] == llama.bos_token_id


def test_in_a_chat_a_text_takes_the_place_of_the_last_message_of_the_user():
    student, teacher = prompts(CHAT, byte_level(chat=CHATML), teacher_prompt="{document} {prompt}")
    assert "Be brief." in student
    assert teacher == student.replace("Who?", "It is you. Who?")


def test_messages_in_a_column_take_the_place_of_the_conversation():
    tokenizer = byte_level(chat=CHATML)
    teacher = prompts(CHAT | {"other": ROW["chat"]}, tokenizer, teacher_prompt="other")[1]
    assert teacher == prompts({"messages": ROW["chat"]}, tokenizer)[0]


@pytest.mark.parametrize("messages", [CHAT["messages"], CHAT["messages"][1:]])
def test_a_system_message_is_for_the_teacher_alone(messages):
    tokenizer = byte_level(chat=CHATML)
    student, teacher = prompts({"messages": messages}, tokenizer, teacher_system="Rhyme.")
    assert "Rhyme." not in student
    assert teacher == prompts({"messages": [{"role": "system", "content": "Rhyme."}, *messages[-2:]]}, tokenizer)[0]


def test_a_system_message_may_have_columns_and_the_question_may_change_too():
    tokenizer = byte_level(chat=CHATML)
    teacher = prompts(CHAT, tokenizer, teacher_system="Read: {document}", teacher_prompt="{prompt} Really?")[1]
    changed = [{"role": "system", "content": "Read: It is you."}, {"role": "user", "content": "Who? Really?"}]
    assert teacher == prompts({"messages": changed}, tokenizer)[0]


def test_a_prompt_too_long_for_the_teacher_loses_its_beginning_and_is_counted(llama, caplog):
    options = {"teacher_prompt": "{hint}{hint}{hint}{hint}{hint}{hint}", "teacher_max_length": 20, "reserve": 6}
    examples = examples_from_rows([ROW], llama, max_length=64, **options)
    whole = examples_from_rows([ROW], llama, max_length=64, teacher_prompt=options["teacher_prompt"])[0].teacher_prompt
    cut = examples[0].teacher_prompt
    room = 20 - max(6, len(examples[0].response))
    assert cut == [llama.bos_token_id, *whole[len(whole) - room + 1 :]]
    assert examples.cut_teacher_prompts == 1
    assert "too long for the teacher's context window (20)" in caplog.text


def test_a_prompt_too_long_for_the_teacher_is_skipped_or_refused_if_asked_for(llama):
    options = {"teacher_prompt": "{hint}{hint}{hint}", "teacher_max_length": 9}
    skipped = examples_from_rows([ROW, ROW | {"hint": "a"}], llama, **options, on_long_prompt="skip")
    assert (len(skipped), skipped.skipped) == (1, 1)
    with pytest.raises(DataError, match=r"the teacher's prompt has .* tokens, and .* fit into its context window"):
        examples_from_rows([ROW], llama, **options, on_long_prompt="error")


MISTAKES = {
    'row 1: teacher_prompt names the column "hnit", but the row has .*; did you mean "hint"': (
        ROW,
        {"teacher_prompt": "hnit"},
    ),
    'the template names the column "hnit"': (ROW, {"teacher_prompt": "{hnit}"}),
    "is not a format string": (ROW, {"teacher_prompt": "{hint"}),
    "teacher_system is for chats": (ROW, {"teacher_system": "Rhyme."}),
    "this is running text": ({"text": "Once upon a time there was."}, {"teacher_prompt": "{prompt}"}),
    "holds token ids": ({"prompt_tokens": [5], "tokens": [6]}, {"teacher_prompt": "{prompt}"}),
    "set train_on: last": (
        {"messages": [USER, CHAT["messages"][2], USER, CHAT["messages"][2]]},
        {"teacher_prompt": "{prompt}", "train_on": "all"},
    ),
    'the "hint" is empty': (ROW | {"hint": ""}, {"teacher_prompt": "hint"}),
}


@pytest.mark.parametrize("message", MISTAKES)
def test_a_mistake_is_one_sentence(message):
    row, options = MISTAKES[message]
    with pytest.raises(DataError, match=message):
        examples_from_rows([row], byte_level(chat=CHATML), **options)

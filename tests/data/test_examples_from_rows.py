"""Rows of every format become examples, and an error of a dataset is one sentence."""

import csv
import doctest
import gzip
import json
import logging
import re
import time
from pathlib import Path
from string import printable

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch.utils.data import DataLoader
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from understudy.data.chat import end_of_response_ids
from understudy.data.examples import DataError, examples_from_rows, load_examples

ROOT = Path(__file__).parents[2]
SHARED = ROOT / ".." / "shared"
SENTENCES = [
    "The understudy learns the part of the star.",
    "Question: What is two plus two?\nAnswer: four",
    "Translate into German: I like cake. Ich mag Kuchen.",
]
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA2 = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system role') }}"
    "{% elif m.role == 'user' %}{{ bos_token }}[INST] {{ m.content }} [/INST]"
    "{% else %} {{ m.content }} {{ eos_token }}{% endif %}{% endfor %}"
)


def byte_level(*, bos: bool = False, eos: bool = False, chat: str | None = None, **specials) -> PreTrainedTokenizerFast:
    """A byte-level BPE as GPT-2's, with one token that is both end and padding; perhaps a post-processor."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    names = ["<|endoftext|>", "<s>", "<|im_start|>", "<|im_end|>", "<|end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=names, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    backend.train_from_iterator(SENTENCES, trainer)
    if bos or eos:
        single = f"{'<s> ' if bos else ''}$A{' <|endoftext|>' if eos else ''}"
        tokens = [(name, backend.token_to_id(name)) for name in ("<s>", "<|endoftext|>")]
        backend.post_processor = processors.TemplateProcessing(single=single, special_tokens=tokens)
    specials = {"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>", **specials}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", **specials)
    tokenizer.chat_template = chat
    return tokenizer


@pytest.fixture(scope="module")
def gpt2():
    return byte_level()


@pytest.fixture(scope="module")
def llama():
    """As Llama 2's: a BOS by the post-processor, and a space before every text."""
    backend = Tokenizer(models.BPE(unk_token="<unk>"))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    trainer = trainers.BpeTrainer(
        vocab_size=200, special_tokens=["<unk>", "<s>", "</s>"], initial_alphabet=list(printable), show_progress=False
    )
    backend.train_from_iterator(SENTENCES, trainer)
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="</s>", unk_token="<unk>"
    )
    tokenizer.chat_template = LLAMA2
    return tokenizer


@pytest.fixture(scope="module")
def chatml():
    """A base model's: its chat template ends answers with <|im_end|>, its end-of-sequence token is another."""
    return byte_level(chat=CHATML)


def write(path: Path, *rows) -> Path:
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def texts(tokenizer, example) -> tuple[str, str]:
    return tokenizer.decode(example.prompt), tokenizer.decode(example.response)


PAIR = {"prompt": "Two plus two?", "completion": " four"}


# Files, folders and the hub


@pytest.mark.parametrize("ending", ["jsonl", "json", "csv", "parquet", "jsonl.gz", "json.gz", "csv.gz"])
def test_every_kind_of_file_gives_the_same_examples(ending, tmp_path, gpt2):
    rows = [PAIR, {"prompt": 'He said "no",\ntwice', "completion": " why ü?"}]
    path = tmp_path / f"data.{ending}"
    if ending == "parquet":
        import pyarrow

        pyarrow.parquet = pytest.importorskip("pyarrow.parquet")
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        with (gzip.open if path.suffix == ".gz" else open)(path, "wt", encoding="utf-8", newline="") as file:
            if "csv" in ending:
                writer = csv.DictWriter(file, ["prompt", "completion"])
                writer.writeheader()
                writer.writerows(rows)
            elif "jsonl" in ending:
                file.writelines(json.dumps(row) + "\n" for row in rows)
            else:
                json.dump(rows, file, indent=2)
    loaded = load_examples(path, gpt2)
    assert [(row.prompt, row.response) for row in loaded.rows] == [(row["prompt"], row["completion"]) for row in rows]
    assert texts(gpt2, loaded[1]) == (rows[1]["prompt"], rows[1]["completion"] + "<|endoftext|>")
    assert loaded.fingerprint == examples_from_rows(rows, gpt2).fingerprint


def test_a_json_file_may_hold_lines(tmp_path, gpt2):
    assert len(load_examples(write(tmp_path / "rows.json", PAIR, PAIR), gpt2)) == 2


def test_a_byte_order_mark_and_windows_line_ends_are_accepted(tmp_path, gpt2):
    (tmp_path / "a.csv").write_bytes("\ufeffprompt,completion\r\na,b\r\n\r\nc,d\r\n".encode())
    loaded = load_examples(tmp_path / "a.csv", gpt2)
    assert [(row.prompt, row.response) for row in loaded.rows] == [("a", "b"), ("c", "d")]


def test_a_folder_is_read_in_the_order_of_names_whatever_the_kinds(tmp_path, gpt2):
    write(tmp_path / "b.jsonl", PAIR)
    write(tmp_path / "a.csv", "question,answer", "Who?,me")
    write(tmp_path / "README.md", "not data")
    assert [row.prompt for row in load_examples(tmp_path, gpt2).rows] == ["Who?", "Two plus two?"]


def test_a_folder_with_a_file_for_each_split_gives_one_split(tmp_path, gpt2):
    write(tmp_path / "train.jsonl", PAIR)
    write(tmp_path / "test-00000-of-00001.jsonl", {"prompt": "secret", "completion": "answer"})
    assert [row.prompt for row in load_examples(tmp_path, gpt2).rows] == ["Two plus two?"]
    assert [row.prompt for row in load_examples(tmp_path, gpt2, split="test").rows] == ["secret"]
    with pytest.raises(DataError, match="has files of the splits test, train, and none of the split dev"):
        load_examples(tmp_path, gpt2, split="dev")


def test_a_folder_without_data_is_an_error(tmp_path, gpt2):
    with pytest.raises(DataError, match=r"has no data files \(\.jsonl, \.json"):
        load_examples(tmp_path, gpt2)


@pytest.mark.parametrize("dataset", ["./prompt", "prompt.jsonl", "prompt.csv.gz", "/no/such", "a/b/c", "~/no such"])
def test_a_missing_path_is_an_error_without_a_request_to_the_hub(dataset, gpt2, monkeypatch):
    monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: pytest.fail("a request to the hub"))
    with pytest.raises(DataError, match="there is no file or folder"):
        load_examples(dataset, gpt2)


def test_a_missing_file_names_its_neighbour(tmp_path, gpt2):
    write(tmp_path / "prompts.jsonl", PAIR)
    with pytest.raises(DataError, match=r'did you mean "prompts.jsonl"\?'):
        load_examples(tmp_path / "prompt.jsonl", gpt2)


def test_an_unsupported_kind_of_file_is_refused(tmp_path, gpt2):
    write(tmp_path / "a.xml", "<a/>")
    with pytest.raises(DataError, match=r"a.xml.* is not a supported kind of file; use one of .jsonl"):
        load_examples(tmp_path / "a.xml", gpt2)


def test_a_dataset_of_the_hub_is_loaded_by_id_name_and_split(gpt2, monkeypatch):
    calls = []
    monkeypatch.setattr("datasets.load_dataset", lambda *args, **kwargs: calls.append((args, kwargs)) or [PAIR])
    loaded = load_examples("openai/gsm8k", gpt2, name="main", split="test")
    assert calls == [(("openai/gsm8k", "main"), {"split": "test"})]
    assert loaded.rows[0].where == "openai/gsm8k (test), row 1"


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ConnectionError("Couldn't reach the Hub"), "the Hugging Face hub could not be reached"),
        ("DatasetNotFoundError", "the Hugging Face hub has no such dataset"),
        (ValueError('Unknown split "tran".\nShould be train'), 'could not be loaded: Unknown split "tran". Should'),
    ],
)
def test_a_failed_look_up_says_that_neither_file_nor_hub_has_it(error, message, gpt2, monkeypatch):
    import datasets.exceptions

    def refuse(*_, **__):
        raise datasets.exceptions.DatasetNotFoundError() if isinstance(error, str) else error

    monkeypatch.setattr("datasets.load_dataset", refuse)
    with pytest.raises(DataError, match='there is no file or folder "my-data", and ') as caught:
        load_examples("my-data", gpt2)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


# Formats of rows


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


# Special tokens and chat templates


def test_a_response_ends_with_one_end_of_sequence_token_even_when_it_is_the_padding_token(gpt2):
    assert gpt2.pad_token_id == gpt2.eos_token_id
    rows = [PAIR, {**PAIR, "completion": " four<|endoftext|>"}]
    first, second = examples_from_rows(rows, gpt2)
    assert first.response == second.response
    assert first.response.count(gpt2.eos_token_id) == 1
    assert first.response[-1] == gpt2.eos_token_id


def test_a_prompt_begins_with_one_bos_and_never_ends_with_an_eos():
    tokenizer = byte_level(bos=True, eos=True)
    for prompt in ("Who?", "<s>Who?"):
        [example] = examples_from_rows([{"prompt": prompt, "completion": "Me"}], tokenizer)
        assert texts(tokenizer, example) == ("<s>Who?", "Me<|endoftext|>")


def test_an_eos_behind_every_text_is_not_taken_for_a_bos():
    tokenizer = byte_level(eos=True)
    [example] = examples_from_rows([PAIR], tokenizer)
    assert texts(tokenizer, example) == ("Two plus two?", " four<|endoftext|>")


def test_a_chat_template_brings_its_own_bos(llama):
    row = {"messages": [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Me"}]}
    [example] = examples_from_rows([row], llama)
    assert example.prompt.count(llama.bos_token_id) == 1
    assert example.prompt[0] == llama.bos_token_id
    assert example.response[-1] == llama.eos_token_id
    assert example.response.count(llama.eos_token_id) == 1
    as_the_template_writes_it = "<s> [INST] Who? [/INST] Me </s>"
    assert llama.decode(example.prompt + example.response) == as_the_template_writes_it


def test_no_space_comes_between_prompt_and_response_even_where_the_tokenizer_begins_texts_with_one(llama):
    for completion in ("four", " four", "\nfour"):
        [example] = examples_from_rows([{"prompt": "Answer:", "completion": completion}], llama)
        assert llama.decode(example.prompt + example.response) == f"<s> Answer:{completion}</s>"


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


def test_a_tokenizer_without_an_end_token_is_refused():
    with pytest.raises(DataError, match="no end-of-sequence token"):
        examples_from_rows([PAIR], byte_level(eos_token=None))


# Lengths


LONG = {"prompt": "The understudy learns the part. What is two plus two?", "completion": " It is four, as all know."}


def test_a_prompt_longer_than_the_limit_keeps_its_end(gpt2, caplog):
    uncut = examples_from_rows([LONG], gpt2)[0].prompt
    loaded = examples_from_rows([LONG, PAIR], gpt2, max_length=40, max_prompt_length=6)
    assert loaded[0].prompt == uncut[-6:]
    assert loaded.cut_prompts == 2 - (len(loaded[1].prompt) < 6)
    assert "prompts of rows are longer than 6 tokens and lost their beginning; raise max_prompt" in caplog.text


def test_a_cut_prompt_keeps_its_bos():
    tokenizer = byte_level(bos=True)
    uncut = examples_from_rows([LONG], tokenizer)[0].prompt
    [example] = examples_from_rows([LONG], tokenizer, max_prompt_length=6)
    assert example.prompt == [tokenizer.bos_token_id, *uncut[-5:]]


def test_a_prompt_leaves_the_reserved_tokens_free(gpt2, caplog):
    [example] = examples_from_rows([{"prompt": LONG["prompt"]}], gpt2, max_length=20, reserve=12)
    assert len(example.prompt) == 8
    assert "lost their beginning; raise max_length (20) or lower max_new_tokens (12)" in caplog.text


def test_a_response_that_does_not_fit_loses_its_end_and_its_stop_token(gpt2, caplog):
    uncut = examples_from_rows([LONG], gpt2)[0]
    [example] = loaded = examples_from_rows([LONG], gpt2, max_length=len(uncut) - 1)
    assert example.truncated
    assert example.response == uncut.response[:-1]
    assert gpt2.eos_token_id not in example.response
    assert loaded.cut_responses == 1
    assert "responses of rows reach beyond max_length" in caplog.text
    assert loaded.rows[0].references == (LONG["completion"],)
    [example] = loaded = examples_from_rows([LONG], gpt2, max_length=len(uncut))
    assert (example, loaded.cut_responses) == (uncut, 0)


@pytest.mark.parametrize(
    "lengths", [{"max_prompt_length": 64}, {"reserve": 64}, {"max_prompt_length": 40, "reserve": 30}]
)
def test_lengths_that_leave_no_room_are_refused(lengths, gpt2):
    with pytest.raises(DataError, match=r"max_length 64 has no room for a prompt.* tokens of response"):
        examples_from_rows([PAIR], gpt2, max_length=64, **lengths)


def test_long_prompts_can_be_skipped_or_refused(gpt2):
    loaded = examples_from_rows([LONG, {"prompt": "Who"}], gpt2, max_prompt_length=6, on_long_prompt="skip")
    assert [row.prompt for row in loaded.rows] == ["Who"]
    assert (loaded.skipped, loaded.cut_prompts) == (1, 0)
    with pytest.raises(DataError, match=r"rows, row 1: the prompt has \d+ tokens, and 6 fit"):
        examples_from_rows([LONG], gpt2, max_prompt_length=6, on_long_prompt="error")


# Malformed rows


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": "a", completion}', r"my\.jsonl:2: not valid JSON at column 17"),
        ("[1, 2]", r"my\.jsonl:2: a row is an object .*, not a list \(\[1, 2\]\)"),
        ('{"prompts": "a", "completion": "b"}', r'my\.jsonl:2: .*"prompts", "completion".*mean "prompt"\?'),
        ('{"prompt": 42, "completion": "b"}', r'my\.jsonl:2: the "prompt" is a number \(42\), not a string'),
        ('{"prompt": "a", "completion": null}', r'my\.jsonl:2: the "completion" is null, not a string'),
        ('{"prompt": "", "completion": "b"}', r'my\.jsonl:2: the "prompt" is empty'),
        ('{"prompt": "a", "completion": " \\n"}', r'my\.jsonl:2: the "completion" is empty'),
        ('{"prompt": "a", "completion": []}', r'my\.jsonl:2: the "completion" is an empty list'),
        ('{"prompt": "a", "completion": ["b", 1]}', r'my\.jsonl:2: the "completion\[1\]" is a number \(1\)'),
        ('{"prompt": "a\\ud800", "completion": "b"}', r"my\.jsonl:2: the \"prompt\" is not valid UTF-8 after 'a'"),
        ('{"messages": "hello"}', r"my\.jsonl:2: the \"messages\" should be a list of messages with role and content"),
        ('{"messages": []}', r"my\.jsonl:2: the \"messages\" should be a list of messages"),
    ],
)
def test_a_malformed_row_names_file_line_and_reason(line, message, tmp_path, gpt2):
    path = write(tmp_path / "my.jsonl", PAIR, line, PAIR)
    with pytest.raises(DataError, match=message) as caught:
        load_examples(path, gpt2)
    assert "\n" not in str(caught.value)
    assert isinstance(caught.value, ValueError)
    skipping = load_examples(path, gpt2, on_bad_row="skip")
    assert (len(skipping), skipping.skipped) == (2, 1)


@pytest.mark.parametrize(
    ("turns", "message"),
    [
        (["bot"], r"message 1 of the messages has the role a string \(\'bot\'\); use system, user or assistant"),
        (["assistant"], "message 1 of the messages is the assistant's and comes first"),
        (["user", "user"], "message 2 of the messages is the user's and comes after the user's"),
        (["user", "system"], "message 2 of the messages is the system's"),
        (["system", "assistant"], "message 2 of the messages is the assistant's"),
        (["system"], "should end with a message of the user or the assistant"),
    ],
)
def test_a_conversation_out_of_order_is_explained(turns, message, chatml):
    with pytest.raises(DataError, match=message):
        examples_from_rows([{"messages": [{"role": role, "content": "x"} for role in turns]}], chatml)


@pytest.mark.parametrize("content", ["", None, 3, [{"type": "text", "text": "x"}]])
def test_a_message_without_text_is_explained(content, chatml):
    with pytest.raises(DataError, match='the "content of message 1 of the messages" is '):
        examples_from_rows([{"messages": [{"role": "user", "content": content}]}], chatml)


def test_a_conversational_prompt_must_end_with_the_user(chatml):
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    with pytest.raises(DataError, match="the prompt should end with a message of the user"):
        examples_from_rows([{"prompt": turns}], chatml)
    with pytest.raises(DataError, match="should be one message of the role assistant"):
        examples_from_rows([{"prompt": turns[:1], "completion": turns}], chatml)


def test_bytes_that_are_not_utf_8_make_only_their_row_bad(tmp_path, gpt2):
    path = tmp_path / "latin.csv"
    path.write_bytes("prompt,completion\na,b\nMüll,c\n".encode("latin-1"))
    with pytest.raises(DataError, match=r"latin.csv:3: the \"prompt\" is not valid UTF-8 after 'M'"):
        load_examples(path, gpt2)
    assert len(load_examples(path, gpt2, on_bad_row="skip")) == 1
    text = tmp_path / "latin.txt"
    text.write_bytes("fine\nMüll\n".encode("latin-1"))
    with pytest.raises(DataError, match=r"latin.txt:2: not valid UTF-8"):
        load_examples(text, gpt2)


def test_a_csv_row_with_too_few_fields_is_named_by_its_first_line(tmp_path, gpt2):
    path = write(tmp_path / "a.csv", "prompt,completion", '"two\nlines",b', "alone", "c,d")
    with pytest.raises(DataError, match=r"a.csv:4: has 1 fields where the header has 2"):
        load_examples(path, gpt2)


def test_a_broken_file_is_an_error_even_when_bad_rows_are_skipped(tmp_path, gpt2):
    (tmp_path / "a.jsonl.gz").write_bytes(b"no gzip")
    write(tmp_path / "b.json", '[{"prompt": "a"},', "oops]")
    (tmp_path / "c.parquet").write_bytes(b"no parquet")
    messages = {"a.jsonl.gz": "cannot be read", "b.json": "b.json:2: not valid", "c.parquet": "as Parquet"}
    for name, message in messages.items():
        with pytest.raises(DataError, match=message):
            load_examples(tmp_path / name, gpt2, on_bad_row="skip")


def test_skipped_rows_are_counted_and_reported(tmp_path, gpt2, caplog):
    loaded = load_examples(write(tmp_path / "a.jsonl", "{", PAIR, "{"), gpt2, on_bad_row="skip")
    assert loaded.skipped == 2
    assert loaded[0].row == 0
    assert loaded.rows[0].where.endswith("a.jsonl:2")
    assert "2 rows of" in caplog.text
    assert "a.jsonl:1: not valid JSON" in caplog.text


def test_an_empty_dataset_is_an_error(tmp_path, gpt2):
    with pytest.raises(DataError, match=r"a.jsonl has no rows"):
        load_examples(write(tmp_path / "a.jsonl"), gpt2)
    with pytest.raises(DataError, match=r"has no usable row: 2 skipped, the first because .*b.jsonl:1: not valid"):
        load_examples(write(tmp_path / "b.jsonl", "{", "{"), gpt2, on_bad_row="skip")


@pytest.mark.parametrize("option", [{"on_bad_row": "ignore"}, {"on_long_prompt": "keep"}, {"limit": 0}])
def test_an_option_out_of_its_range_is_an_error(option, gpt2):
    with pytest.raises(DataError, match=next(iter(option))):
        examples_from_rows([PAIR], gpt2, **option)


# Plain text


STORY = "".join(f"The star learns part {number}.\nAnd so on.\n\n" for number in range(40))


def test_a_text_is_cut_into_chunks_that_begin_at_lines_without_losing_text(tmp_path, gpt2):
    path = tmp_path / "story.txt"
    path.write_text(STORY)
    loaded = load_examples(path, gpt2, max_length=60, text_prompt=5)
    assert all(len(example) <= 60 and len(example.prompt) == 5 for example in loaded)
    assert len(loaded) > 5
    chunks = ["".join(texts(gpt2, example)) for example in loaded]
    lines = {line for line in STORY.splitlines() if line}
    assert all(chunk.splitlines()[0] in lines for chunk in chunks)
    assert re.sub(r"\n+", "\n", "".join(chunks)) == re.sub(r"\n+", "\n", STORY.strip()) + "<|endoftext|>"
    assert [example.truncated for example in loaded] == [True] * (len(loaded) - 1) + [False]
    assert (loaded.rows[0].prompt, *loaded.rows[0].references) == texts(gpt2, loaded[0])


def test_a_line_longer_than_a_chunk_is_cut_inside(gpt2):
    line = "The star learns the part. " * 30
    loaded = examples_from_rows([{"text": line}], gpt2, max_length=40, text_prompt=2)
    assert "".join("".join(texts(gpt2, example)) for example in loaded) == line.strip() + "<|endoftext|>"


def test_documents_are_separated_and_end_each_with_an_eos(tmp_path, gpt2):
    path = tmp_path / "two.txt"
    path.write_text("The first part is long.\n<|endoftext|>\nThe second part\nis longer.\n")
    loaded = load_examples(path, gpt2, text_prompt=2)
    assert [row.where.rpartition(":")[2] for row in loaded.rows] == ["1", "3"]
    first, second = (texts(gpt2, example)[1] for example in loaded)
    assert first.endswith("is long.<|endoftext|>")
    assert second.endswith("is longer.<|endoftext|>")
    assert not any(example.truncated for example in loaded)


def test_every_chunk_begins_with_a_bos(llama):
    loaded = examples_from_rows([{"text": STORY}], llama, max_length=60, text_prompt=5)
    assert all(example.prompt[0] == llama.bos_token_id and len(example) <= 60 for example in loaded)


def test_a_text_too_short_for_a_response_is_skipped(gpt2):
    with pytest.raises(DataError, match=r"no usable row: 1 skipped, .* is no longer than text_prompt"):
        examples_from_rows([{"text": "The star"}], gpt2)
    with pytest.raises(DataError, match="text_prompt is 64, and a prompt can have 1 to 63 tokens"):
        examples_from_rows([{"text": STORY}], gpt2, max_length=64, text_prompt=64)


# Examples


def test_examples_have_their_rows_and_work_in_a_data_loader(gpt2):
    loaded = examples_from_rows([PAIR, LONG, PAIR], gpt2)
    assert [example.row for example in loaded] == [0, 1, 2]
    assert loaded.has_responses
    [first, second] = DataLoader(loaded, batch_size=2, collate_fn=list)
    assert first == [loaded[0], loaded[1]]
    assert second == [loaded[2]]


def test_a_limit_takes_examples_from_the_beginning_and_reads_no_further(tmp_path, gpt2):
    path = write(tmp_path / "a.jsonl", PAIR, LONG, "broken")
    assert [row.prompt for row in load_examples(path, gpt2, limit=2).rows] == [PAIR["prompt"], LONG["prompt"]]
    assert len(examples_from_rows([{"text": STORY}], gpt2, max_length=60, limit=3)) == 3


def test_the_fingerprint_tells_datasets_apart(gpt2):
    fingerprint = examples_from_rows([PAIR, LONG], gpt2).fingerprint
    assert re.fullmatch("[0-9a-f]{16}", fingerprint)
    assert fingerprint == examples_from_rows([PAIR, LONG], gpt2).fingerprint
    moved = {"prompt": PAIR["prompt"] + PAIR["completion"][:2], "completion": PAIR["completion"][2:]}
    different = ([LONG, PAIR], [PAIR], [moved, LONG])
    assert fingerprint not in {examples_from_rows(rows, gpt2).fingerprint for rows in different}


def test_many_rows_are_fast(gpt2):
    rows = [{"prompt": f"What is {number} plus two?", "completion": f" {number + 2}"} for number in range(10_000)]
    began = time.process_time()
    assert len(examples_from_rows(rows, gpt2)) == 10_000
    assert time.process_time() - began < 5  # about one second


# Real files, if they lie beside the repository


def shared(path: str) -> Path:
    if not (SHARED / path).exists():
        pytest.skip(f"{path} does not lie beside the repository")
    return SHARED / path


def test_dolly_s_own_prompts_are_our_alpaca_prompts(gpt2):
    path = shared("data/instructions/dolly__dev.jsonl")
    loaded = load_examples(path, gpt2, limit=200)
    prompts = [json.loads(line)["prompt"] for line in path.read_text().splitlines()[:200]]
    assert [row.prompt for row in loaded.rows] == prompts


def test_gsm8k_with_a_template(gpt2):
    path = shared("data/gsm8k/train.jsonl")
    loaded = load_examples(path, gpt2, template="Question: {question}\nAnswer:", max_length=1024, limit=200)
    assert loaded.has_responses
    assert all(re.search(r"#### \S+$", row.references[0]) for row in loaded.rows)


def test_tatoeba_with_several_references():
    path = shared("data/tatoeba-en-de/dev.jsonl.gz")
    tokenizer = AutoTokenizer.from_pretrained(shared("models/translation-en-de"))
    loaded = load_examples(path, tokenizer, template="<bos>{en}<de>", columns={"completion": "de"})
    assert len(loaded) > 1000
    assert loaded.cut_prompts == loaded.cut_responses == loaded.skipped == 0
    assert max(len(row.references) for row in loaded.rows) > 1
    assert {(example.prompt[0], example.prompt[-1], example.response[-1]) for example in loaded} == {(1, 3, 2)}


def test_tiny_stories_as_running_text():
    path = shared("data/tinystories/tiny_stories_944k.txt")
    tokenizer = AutoTokenizer.from_pretrained(shared("data/tinystories/TinyStories-656K"))
    began = time.perf_counter()
    loaded = load_examples(path, tokenizer, max_length=256)
    assert time.perf_counter() - began < 10  # about 1.5 seconds
    assert len(loaded) > 1000
    assert all(example.prompt[0] == tokenizer.bos_token_id for example in loaded)
    assert loaded[-1].response[-1] == tokenizer.eos_token_id


# The documentation


def test_the_examples_of_the_data_page_do_what_it_says(tmp_path, gpt2, chatml, monkeypatch, caplog):
    caplog.set_level(logging.ERROR)
    page = (ROOT / "docs" / "data.md").read_text()
    for name, content in re.findall(r"^```\w+ name=(\S+)\n(.*?)^```", page, flags=re.DOTALL | re.MULTILINE):
        (tmp_path / name).write_text(content)
    monkeypatch.chdir(tmp_path)
    plain = re.sub(r"^```.*$", "", page, flags=re.MULTILINE)  # a fence would count as expected output
    names = {"tokenizer": gpt2, "chat_tokenizer": chatml}
    test = doctest.DocTestParser().get_doctest(plain, names, "data.md", "docs/data.md", 0)
    output: list[str] = []
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    results = runner.run(test, out=output.append)
    assert results.attempted > 10
    assert results.failed == 0, "".join(output)

"""Rows are read from files, folders and the hub."""

import csv
import gzip
import json
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet as parquet
import pytest
from rows_of_text import PAIR, byte_level, texts, write

from understudy.data.examples import DataError, examples_from_rows, load_examples


@pytest.mark.parametrize("ending", ["jsonl", "json", "csv", "parquet", "jsonl.gz", "json.gz", "csv.gz"])
def test_every_kind_of_file_gives_the_same_examples(ending, tmp_path, gpt2):
    rows = [PAIR, {"prompt": 'He said "no",\ntwice', "completion": " why ü?"}]
    path = tmp_path / f"data.{ending}"
    if ending == "parquet":
        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
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
    table = datasets.Dataset.from_list([PAIR])
    monkeypatch.setattr("datasets.load_dataset", lambda *args, **kwargs: calls.append((args, kwargs)) or table)
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


def test_a_csv_field_may_be_long(tmp_path, gpt2):
    long = "The star learns. " * 20_000
    path = tmp_path / "long.csv"
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([("prompt", "completion"), (long, "a"), ("b", f"{long}\n{long}")])
    rows = load_examples(path, gpt2).rows
    assert [(row.prompt, row.response) for row in rows] == [(long, "a"), ("b", f"{long}\n{long}")]


@pytest.mark.parametrize("saved", ["dataset", "splits"])
def test_a_folder_that_datasets_saved_is_a_dataset(saved, tmp_path, gpt2):
    table = datasets.Dataset.from_list([PAIR, {"prompt": "Who?", "completion": "me"}])
    if saved == "splits":
        table = datasets.DatasetDict(train=table, test=table.select([1]))
    table.save_to_disk(str(tmp_path / "saved"))
    loaded = load_examples(tmp_path / "saved", gpt2)
    assert [row.prompt for row in loaded.rows] == ["Two plus two?", "Who?"]
    assert loaded.rows[1].where.endswith("saved, row 2")
    assert [row.prompt for row in load_examples(tmp_path / "saved", gpt2, split="train[1:]").rows] == ["Who?"]
    if saved == "splits":
        assert [row.prompt for row in load_examples(tmp_path / "saved", gpt2, split="test").rows] == ["Who?"]
        with pytest.raises(DataError, match="has the splits train, test, and none of dev"):
            load_examples(tmp_path / "saved", gpt2, split="dev")


def test_a_saved_folder_that_is_damaged_is_an_error(tmp_path, gpt2):
    datasets.Dataset.from_list([PAIR]).save_to_disk(str(tmp_path / "saved"))
    for damage in (lambda file: file.write_bytes(file.read_bytes()[:40]), Path.unlink):
        damage(next((tmp_path / "saved").glob("*.arrow")))
        with pytest.raises(DataError, match="was saved by datasets, but cannot be loaded"):
            load_examples(tmp_path / "saved", gpt2)


def test_a_dataset_of_the_library_datasets_is_rows(gpt2):
    table = datasets.Dataset.from_list([PAIR, PAIR])
    assert examples_from_rows(table, gpt2).fingerprint == examples_from_rows([PAIR, PAIR], gpt2).fingerprint


@pytest.mark.parametrize(
    ("split", "numbers"),
    [
        ("train[3:]", [3, 4]),
        ("train[:40%]", [0, 1]),
        ("train[-1:]", [4]),
        ("train[:1]+train[4:]", [0, 4]),
        ("train+test", [0, 1, 2, 3, 4, 9]),
    ],
)
def test_a_slice_of_a_split_is_taken_from_local_files(split, numbers, tmp_path, gpt2):
    write(tmp_path / "train.jsonl", *({"prompt": f"Row {number}"} for number in range(5)))
    write(tmp_path / "test.jsonl", {"prompt": "Row 9"})
    assert [row.prompt for row in load_examples(tmp_path, gpt2, split=split).rows] == [f"Row {n}" for n in numbers]


@pytest.mark.parametrize("split", ["train[", "train[a:b]", "train[1:2:3]", "[:3]", "train[:200%]", "+"])
def test_a_slice_that_cannot_be_taken_is_explained(split, tmp_path, gpt2):
    with pytest.raises(DataError, match="the split"):
        load_examples(write(tmp_path / "a.jsonl", PAIR), gpt2, split=split)


def test_each_line_or_each_file_may_be_a_prompt(tmp_path, gpt2):
    (tmp_path / "a.txt").write_text("Who?\r\n\nAnd what?\n", newline="")
    (tmp_path / "b.txt").write_text("How?\nAnd why?\n")
    lines = load_examples(tmp_path, gpt2, text_as="lines").rows
    assert [row.prompt for row in lines] == ["Who?", "And what?", "How?", "And why?"]
    assert lines[1].where.endswith("a.txt:3")
    files = load_examples(tmp_path, gpt2, text_as="files").rows
    assert [row.prompt for row in files] == ["Who?\n\nAnd what?", "How?\nAnd why?"]
    with pytest.raises(DataError, match=r"text_as: lines is for \.txt files, and .* has none"):
        load_examples(write(tmp_path / "c.jsonl", PAIR), gpt2, text_as="lines")
    with pytest.raises(DataError, match='text_as is "words", and can be chunks, lines or files'):
        load_examples(tmp_path, gpt2, text_as="words")


def test_columns_of_bytes_are_not_read_from_tables(tmp_path, gpt2):
    rows = [{**PAIR, "image": {"bytes": b"png", "path": "a.png"}, "list": [{"data": b"x"}], "n": 1}]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    [example] = load_examples(tmp_path / "a.parquet", gpt2)
    assert example.columns == {**PAIR, "n": 1}
    with pytest.raises(DataError, match='the "prompt" is bytes, which are not read, not a string'):
        load_examples(tmp_path / "a.parquet", gpt2, columns={"prompt": "image"})


def test_dates_and_texts_that_python_cannot_hold_do_not_stop_a_table(tmp_path, gpt2):
    dates = pyarrow.array([10**15, 0], pyarrow.timestamp("s"))
    odd = pyarrow.Array.from_buffers(pyarrow.string(), 2, pyarrow.array([b"a", b"M\xfc"], pyarrow.binary()).buffers())
    table = pyarrow.table({"prompt": ["a", "b"], "when": dates, "odd": odd})
    parquet.write_table(table, tmp_path / "a.parquet")
    first, second = load_examples(tmp_path / "a.parquet", gpt2)
    assert "when" not in first.columns
    assert second.columns["when"].year == 1970
    with pytest.raises(DataError, match="row 2: the \"prompt\" is not valid UTF-8 after 'M'"):
        load_examples(tmp_path / "a.parquet", gpt2, columns={"prompt": "odd"})
    with pytest.raises(DataError, match=r'row 1: the "prompt" is a timestamp\[.*\] that is out of range, not a string'):
        load_examples(tmp_path / "a.parquet", gpt2, columns={"prompt": "when"})


def test_objects_of_a_table_have_only_the_keys_that_are_theirs(tmp_path, chatml):
    call = {"type": "function", "function": {"name": "f", "arguments": {"city": "Rome"}}}
    messages = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "", "tool_calls": [call]}]
    template = chatml.chat_template.replace("{{ m.content }}", "{{ m.content }}{{ m.tool_calls | default('') }}")
    rows = [{"messages": messages}, {"messages": [messages[0], {"role": "assistant", "content": "Me."}]}]
    tokenizer = byte_level(chat=template)
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    loaded = load_examples(tmp_path / "a.parquet", tokenizer)
    assert loaded.fingerprint == examples_from_rows(rows, tokenizer).fingerprint

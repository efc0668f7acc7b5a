"""Rows are read from files, folders and the hub."""

import csv
import gzip
import json

import datasets
import pytest
from rows_of_text import PAIR, texts, write

from understudy.data.examples import DataError, examples_from_rows, load_examples


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

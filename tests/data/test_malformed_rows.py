"""A malformed row or file is explained by one sentence, and a malformed row can be skipped."""

import pytest
from rows_of_text import PAIR, write

from understudy.data.examples import DataError, examples_from_rows, load_examples


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

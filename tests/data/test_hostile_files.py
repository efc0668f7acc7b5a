"""Files that are no data, or far more than they seem: one sentence, no hang, and nothing reaches the terminal raw."""

import gzip
import json
import os
import time

import pytest
from rows_of_text import CHATML, PAIR, byte_level, write

from understudy.data import template_limits, text_files
from understudy.data.examples import DataError, examples_from_rows, load_examples

MESSAGES = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Me."}]


def error_of(path, tokenizer, **options) -> str:
    """The error of loading a file, which is one sentence."""
    with pytest.raises(DataError) as caught:
        load_examples(path, tokenizer, **options)
    message = str(caught.value)
    assert message.isprintable()
    assert len(message) < 1100
    return message


@pytest.mark.parametrize("name", ["a.jsonl", "folder"])
def test_pipes_and_devices_are_refused(name, tmp_path, gpt2):
    folder = tmp_path / name if name == "folder" else tmp_path
    folder.mkdir(exist_ok=True)
    os.mkfifo(folder / "a.jsonl")
    assert "is not a regular file, but a folder, a pipe or a device" in error_of(tmp_path / name, gpt2)
    os.symlink("/dev/zero", tmp_path / "zero.txt")
    assert "is not a regular file" in error_of(tmp_path / "zero.txt", gpt2)
    assert "is not a supported kind of file" in error_of("/dev/zero", gpt2)
    (tmp_path / "folders" / "b.csv").mkdir(parents=True)
    assert "is not a regular file" in error_of(tmp_path / "folders", gpt2)


@pytest.mark.parametrize("ending", ["jsonl", "json", "csv", "txt"])
def test_what_is_no_utf_8_text_is_named(ending, tmp_path, gpt2):
    path = tmp_path / f"a.{ending}"
    for encoding in ("utf-16", "utf-16-le", "utf-32"):
        path.write_bytes(json.dumps(PAIR).encode(encoding))
        message = error_of(path, gpt2, on_bad_row="skip")
        assert ("is UTF-16; save it as UTF-8" if encoding != "utf-16-le" else "has NUL bytes") in message
    path.write_bytes(bytes(100))
    assert "has NUL bytes, so it is no UTF-8 text" in error_of(path, gpt2)
    path.write_bytes(b"")
    assert "has no rows" in error_of(path, gpt2)


def test_lines_and_files_that_unpack_to_more_than_fits_are_refused(tmp_path, gpt2, monkeypatch):
    monkeypatch.setattr(text_files, "LONGEST_LINE", 1000)
    monkeypatch.setattr(text_files, "LONGEST_FILE", 2000)
    for ending, content in {"jsonl": '{"prompt": "' + "a" * 2000, "csv": "a" * 2000}.items():
        (tmp_path / f"a.{ending}.gz").write_bytes(gzip.compress(content.encode()))
        assert ":1: the line has more than 1,000 characters" in error_of(tmp_path / f"a.{ending}.gz", gpt2)
    for ending in ("json", "txt"):
        (tmp_path / f"a.{ending}.gz").write_bytes(gzip.compress(b" " * 3000))
        assert "has more than 2,000 characters; split it" in error_of(tmp_path / f"a.{ending}.gz", gpt2)
    (tmp_path / "half.jsonl.gz").write_bytes(gzip.compress(json.dumps(PAIR).encode())[:-10])
    assert "cannot be read" in error_of(tmp_path / "half.jsonl.gz", gpt2)


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ("[" * 100_000, "it is nested too deeply"),
        ('{"a":' * 100_000, "it is nested too deeply"),
        ("1" * 5000, "a number has thousands of digits"),
        ('{"b": 1, "b": 2}', 'an object has the key "b" twice'),
    ],
)
def test_json_that_python_does_not_read_is_a_malformed_row(value, reason, tmp_path, gpt2):
    path = write(tmp_path / "a.jsonl", PAIR, f'{{"prompt": "a", "completion": {value}}}', PAIR)
    assert error_of(path, gpt2).endswith(f"a.jsonl:2: not valid JSON: {reason}")
    assert load_examples(path, gpt2, on_bad_row="skip").skipped == 1
    path = write(tmp_path / "a.json", f"[{value}]")
    assert f"a.json: not valid JSON: {reason}" in error_of(path, gpt2)


def test_values_nested_deeply_or_too_large_to_show_are_described(gpt2):
    deep: list = []
    for _ in range(100_000):
        deep = [deep]
    columns: dict = {}
    for _ in range(900):
        columns = {"a": columns}
    for value in (deep, 10**5000, columns):
        with pytest.raises(DataError, match=r'row 1: the "prompt(\[0\])?" is an? (number|list|object) \('):
            examples_from_rows([{"prompt": value}], gpt2)
    assert examples_from_rows([{**PAIR, "deep": deep, "columns": columns}], gpt2)[0].columns == PAIR


def test_one_object_over_several_lines_is_no_list_of_rows(tmp_path, gpt2):
    path = write(tmp_path / "a.json", json.dumps({"prompt": ["a", "b"], "completion": ["c", "d"]}, indent=1))
    assert "is one object over several lines; a file holds a list of objects" in error_of(path, gpt2)
    for content in ("3", '"text"', "null"):
        assert "a.json:1: a row is an object" in error_of(write(tmp_path / "a.json", content), gpt2)


@pytest.mark.parametrize("line", ['"never closed,b', 'a,"b" c', '"a"b,c'])
def test_a_quote_out_of_place_ends_the_reading_of_a_csv_file(line, tmp_path, gpt2):
    path = write(tmp_path / "a.csv", "prompt,completion", "a,b", line, *["c,d"] * 50)
    message = error_of(path, gpt2, on_bad_row="skip")
    assert "a.csv:3: not valid CSV: " in message
    assert "quotes in it are written twice" in message


def test_two_columns_of_one_name_are_refused(tmp_path, gpt2):
    path = write(tmp_path / "a.csv", "prompt,prompt", "a,b")
    assert 'a.csv:1: the header has the column "prompt" twice; rename one' in error_of(path, gpt2)


def test_names_and_texts_with_escape_sequences_are_shown_as_text(tmp_path, gpt2, caplog):
    escape = "\x1b]0;title\x07\u202e"
    (tmp_path / f"a{escape}.jsonl").write_text(json.dumps({f"prompts{escape}": "a"}))
    assert r"a\x1b]0;title\x07\u202e.jsonl:1: no supported format" in error_of(tmp_path / f"a{escape}.jsonl", gpt2)
    message = error_of(write(tmp_path / "b.csv", f"prompt{escape},completion", "a,b"), gpt2)
    assert r'"prompt\x1b]0;title\x07\u202e"' in message
    rows = [{"query": "a", "response": "b"}, {escape: 1}]
    examples_from_rows(rows, gpt2, on_bad_row="skip", source=escape, max_length=2)
    assert "1 row of" in caplog.text
    assert "\x1b" not in caplog.text
    error_of(f"{escape}\0", gpt2)
    error_of("a" * 5000 + ".jsonl", gpt2)


ENDLESS = (
    "{% for i in range(99999) %}{% for j in range(99999) %}{% for k in range(99999) %}{% endfor %}" + "{% endfor %}" * 2
)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (ENDLESS, r"still rendering a conversation after 0\.3 s"),
        ("{% for i in range(10**9) %}a{% endfor %}", r"computes a power \(\*\*\)"),
        ("{{ 9**9**9 }}", "computes a power"),
        ("{{ 'a' * 99999 * 99999 }}", "multiplies by more than 1,000,000"),
    ],
)
def test_a_chat_template_cannot_run_for_ever_or_fill_the_memory(template, message, monkeypatch):
    monkeypatch.setattr(template_limits, "SECONDS", 0.3)
    for rows in ([{"messages": MESSAGES}], [PAIR]):
        with pytest.raises(DataError, match=message):
            examples_from_rows(rows, byte_level(chat=CHATML + template))


def test_a_range_beyond_jinja_s_own_limit_is_the_template_s_error():
    template = CHATML + "{% for i in range(1000000000) %}a{% endfor %}"
    with pytest.raises(DataError, match="the chat template refuses the conversation: Range too big"):
        examples_from_rows([{"messages": MESSAGES}], byte_level(chat=template))


def test_a_worker_that_was_ended_is_not_used_again(monkeypatch):
    monkeypatch.setattr(template_limits, "SECONDS", 0.05)
    with pytest.raises(DataError):
        template_limits.within_limit(time.sleep, 0.2)
    monkeypatch.setattr(template_limits, "SECONDS", 5)
    assert template_limits.within_limit(str, 3) == "3"
    with pytest.raises(ZeroDivisionError):
        template_limits.within_limit(lambda: 1 // 0)

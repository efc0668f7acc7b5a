"""Atomic text files, and JSONL files whose torn lines are ignored."""

import pytest

from understudy.files import append_jsonl, ends_in_torn_line, read_jsonl, split_lines, write_atomic, write_jsonl

SEPARATORS = "a\u2028b\u2029c\u0085d\x1ce\x0cf\rg"  # at each of these str.splitlines cuts a text


def test_a_file_is_replaced_as_a_whole_and_nothing_else_is_left(tmp_path):
    path = tmp_path / "run.json"
    write_atomic(path, "first, and longer")
    write_atomic(path, "sécond")
    assert path.read_text(encoding="utf-8") == "sécond"
    assert list(tmp_path.iterdir()) == [path]


def test_a_write_that_fails_leaves_the_old_file(tmp_path):
    path = tmp_path / "run.json"
    write_atomic(path, "old")
    with pytest.raises(UnicodeEncodeError):
        write_atomic(path, "lone surrogate \udcff")
    assert path.read_text() == "old"


def test_lines_are_read_back_unchanged(tmp_path):
    path = tmp_path / "lines.jsonl"
    values = [{"text": SEPARATORS}, {"number": float("inf")}, {"text": "日本語", "nested": [{"a": None}]}]
    append_jsonl(path, *values[:1])
    append_jsonl(path, *values[1:])
    assert read_jsonl(path) == values
    assert path.read_bytes().count(b"\n") == 3
    write_jsonl(path, values[:2])
    assert read_jsonl(path) == values[:2]


def test_no_file_has_no_lines(tmp_path):
    assert read_jsonl(tmp_path / "nowhere.jsonl") == []
    (tmp_path / "empty.jsonl").touch()
    assert read_jsonl(tmp_path / "empty.jsonl") == []
    assert not ends_in_torn_line(tmp_path / "empty.jsonl")


@pytest.mark.parametrize("separator", ["", "\u2028", "é"])
def test_a_line_torn_anywhere_is_ignored_and_not_joined_with_the_next(separator, tmp_path):
    path = tmp_path / "lines.jsonl"
    first, second, third = {"text": "one"}, {"text": f"tw{separator}o"}, {"text": "three"}
    append_jsonl(path, first)
    start = path.stat().st_size
    append_jsonl(path, second)
    content = path.read_bytes()
    for end in range(start, len(content) + 1):
        path.write_bytes(content[:end])
        complete = end >= len(content) - 1  # the object is all there, with or without the end of its line
        assert ends_in_torn_line(path) == (start < end < len(content))
        assert read_jsonl(path) == [first, second][: 1 + complete]
        append_jsonl(path, third)
        assert read_jsonl(path) == [*[first, second][: 1 + complete], third]


def test_lines_that_are_not_objects_are_left_out(tmp_path):
    path = tmp_path / "lines.jsonl"
    path.write_bytes(b'{"a": 1}\nnot JSON\n[1]\n\n3\n{"b": "\xff\xfe"}\n\x00\n{"c": 3}\r\n')
    assert read_jsonl(path) == [{"a": 1}, {"c": 3}]


def test_lines_end_at_a_newline_alone():
    content = f"{SEPARATORS}\ntorn".encode()
    lines, torn = split_lines(content)
    assert b"\n".join(lines) + b"\n" + torn == content
    assert (len(lines), torn) == (1, b"torn")
    assert split_lines(b"") == ([], b"")
    assert split_lines(b"\n") == ([b""], b"")

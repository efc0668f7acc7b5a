"""The file of responses: lines are read back unchanged, and a file of anything else is refused."""

import pytest

from understudy.batch import Example
from understudy.generation.response_file import ResponseFile

PROMPTS = [Example([4, 5, 6], [], row=0), Example([7, 8], [], row=1)]


def response(prompt, *tokens):
    return Example(prompt.prompt, list(tokens), row=prompt.row, truncated=len(tokens) > 2)


def test_lines_with_texts_in_any_script_are_read_back_unchanged(tmp_path):
    file = ResponseFile(tmp_path / "responses.jsonl", {"weights": "f00d"})
    lines = [
        file.line(1, response(PROMPTS[0], 9, 2), response="a\u2028b\u0085c\n日本語"),
        file.line(1, response(PROMPTS[1], 9, 9, 9), response=""),
    ]
    file.append(lines[:1])
    file.append(lines[1:])
    assert file.load() == lines
    assert [line["truncated"] for line in lines] == [False, True]


def test_an_id_changes_with_everything_that_a_response_depends_on():
    ids = [
        ResponseFile(None, depends_on).id(seed, prompt)
        for depends_on in ({"weights": "a"}, {"weights": "b"})
        for seed in (0, 1)
        for prompt in (*PROMPTS, Example([4, 5, 6], [], row=1))
    ]
    assert len(set(ids)) == len(ids)
    assert ResponseFile(None, {"a": 1, "b": 2}).id(0, PROMPTS[0]) == ResponseFile(None, {"b": 2, "a": 1}).id(
        0, PROMPTS[0]
    )


def test_a_torn_line_is_left_out_and_cut_off(tmp_path):
    path = tmp_path / "responses.jsonl"
    file = ResponseFile(path, {})
    lines = [file.line(0, response(prompt, 9, 2)) for prompt in PROMPTS]
    file.append(lines)
    content = path.read_bytes()
    path.write_bytes(content[:-7])
    assert file.load() == lines[:1]
    file.drop_torn_line()
    file.append(lines[1:])
    assert path.read_bytes() == content


@pytest.mark.parametrize("content", [b"notes", b'{"a": 1}\n', b"\xff\xfe\n", b"\n", b'{"seed": 0, "row": 0}'])
def test_a_file_of_anything_else_is_refused_and_stays(content, tmp_path):
    path = tmp_path / "mine.jsonl"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"mine\.jsonl:1 is not a response .*: give another file for the responses"):
        ResponseFile(path, {}).load()
    assert path.read_bytes() == content


def test_a_lock_excludes_other_processes_and_is_released_after_an_error(tmp_path):
    first, second = (ResponseFile(tmp_path / "deep" / "responses.jsonl", {}) for _ in range(2))
    with first.locked(), pytest.raises(ValueError, match="another process is writing responses"), second.locked():
        pass
    with pytest.raises(KeyboardInterrupt), first.locked():
        raise KeyboardInterrupt
    with second.locked():
        assert second.has_lock


def test_without_a_path_nothing_is_saved():
    file = ResponseFile(None, {})
    with file.locked():
        file.append([file.line(0, response(PROMPTS[0], 9, 2))])
    assert file.load() == []
    assert not file.has_lock

"""Responses are generated once, saved batch by batch, and resumed after an interruption."""

import copy
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from fakes import ScriptedRollout, tiny, words

import understudy
from understudy import Sampling
from understudy.data.examples import examples_from_rows
from understudy.evaluation.responses import BatchSizeSearch, fingerprint, generate_responses
from understudy.rollout import Rollout

TOKENIZER = words()
EXAMPLES = examples_from_rows(
    [{"prompt": " ".join(["w5"] * (1 + i % 7)), "completion": f"w{i + 4}"} for i in range(20)], TOKENIZER
)
MODEL = tiny("llama")
SAMPLING = Sampling(max_new_tokens=6)


class Portions(Rollout):
    """A rollout that generates `batch_size` responses at once, records them, and may fail."""

    def __init__(self, batch_size=8, dies_at=None, room=100):
        self._inner, self.batch_size = ScriptedRollout(), batch_size
        self._asked, self._sizes, self._dies_at, self._room = [], [], dies_at, room

    def bind(self, model, tokenizer, author="student"):
        bound = copy.copy(self)
        bound._inner = self._inner.bind(model, tokenizer, author)
        return bound

    def with_batch_size(self, batch_size):
        self._sizes.append(batch_size)
        return self

    def generate(self, prompts, sampling, step):
        if len(prompts) > self._room:
            raise torch.OutOfMemoryError("no room")
        if len(self._asked) == self._dies_at:
            raise KeyboardInterrupt
        self._asked.append([(step.seed, len(p.prompt), p.row) for p in prompts])
        return self._inner.generate(prompts, sampling, step)


def generate(path=None, rollout=None, sampling=SAMPLING, model=MODEL, examples=EXAMPLES, seeds=(1, 2), **options):
    def is_correct(text, row):
        return text in row.references

    arguments = (model, TOKENIZER, examples, rollout or Portions(), sampling, seeds, is_correct)
    return generate_responses(*arguments, path=path, **options)


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_responses_come_in_the_order_of_seeds_and_rows_and_are_generated_longest_prompt_first():
    rollout, counts = Portions(), []
    responses = generate(rollout=rollout, on_progress=counts.append).responses
    assert [(a.line["seed"], a.line["row"]) for a in responses] == [(s, r) for s in (1, 2) for r in range(20)]
    assert [a.line["prompt"] for a in responses[:20]] == [row.prompt for row in EXAMPLES.rows]
    for seed in (1, 2):
        widths = [width for portion in rollout._asked for s, width, _ in portion if s == seed]
        assert widths == sorted(widths, reverse=True)
    assert [len(portion) for portion in rollout._asked] == [8, 8, 4] * 2
    assert sum(counts) == 40


def test_an_interrupted_evaluation_resumes_and_generates_nothing_twice(tmp_path):
    path = tmp_path / "deep" / "responses.jsonl"
    with pytest.raises(KeyboardInterrupt):
        generate(path, Portions(dies_at=4))
    saved = lines(path)
    assert len(saved) == 8 + 8 + 4 + 8
    rollout = Portions()
    again = generate(path, rollout)
    assert sum(map(len, rollout._asked)) == 12
    assert lines(path)[:28] == saved
    assert sorted((line["seed"], line["row"]) for line in lines(path)) == [(s, r) for s in (1, 2) for r in range(20)]
    texts = [a.line["response"] for a in again.responses]
    assert texts == [a.line["response"] for a in generate().responses]
    assert [a.example for a in again.responses] == [a.example for a in generate().responses]
    third = generate(path, Portions(dies_at=0))
    assert (third.tokens, third.seconds) == (0, 0)


def test_a_torn_line_is_generated_again(tmp_path):
    path = tmp_path / "responses.jsonl"
    generate(path)
    content = path.read_bytes()
    for cut in (1, 20, len(content) - content.rfind(b"\n", 0, -1) - 1):
        path.write_bytes(content[:-cut])
        rollout = Portions()
        generate(path, rollout)
        assert sum(map(len, rollout._asked)) == 1
        assert path.read_bytes() == content


def foreign(content):
    """Contents of files that are not files of responses."""
    return {
        "no newline": b"the only copy",
        "a line without a newline": b'{"seed": 1, "row": 0}',
        "lines, the last without a newline": b'{"a": 1}\n{"a": 2}',
        "an empty line": b"\n",
        "bytes": b"\xff\xfe\n\x00",
        "a note behind responses": content + b"my own note",
        "a note before a torn response": b"my own note\n" + content[:-5],
        "responses of something else, torn": content.replace(b'"id": "', b'"id": "0')[:-5],
    }


@pytest.mark.parametrize("case", foreign(b""))
def test_a_foreign_file_is_refused_and_stays_as_it_is(case, tmp_path):
    generate(tmp_path / "whole.jsonl")
    path = tmp_path / "deep" / "mine.jsonl"
    path.parent.mkdir()
    path.write_bytes(foreign((tmp_path / "whole.jsonl").read_bytes())[case])
    before = path.read_bytes()
    with pytest.raises(ValueError, match=r"mine\.jsonl:\d+ is .*: give another file for the responses, or delete this"):
        generate(path, Portions(room=0))
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path], "not even a lock lies beside it"


def test_a_file_that_is_no_lock_is_left_alone(tmp_path):
    other = tmp_path / "responses.jsonl.lock"
    other.write_text("the only copy")
    with pytest.raises(ValueError, match=r"responses\.jsonl\.lock is not a lock, .*: give another file for"):
        generate(tmp_path / "responses.jsonl")
    assert other.read_text() == "the only copy"
    assert list(tmp_path.iterdir()) == [other]


def test_responses_may_go_into_an_empty_file(tmp_path):
    path = tmp_path / "responses.jsonl"
    path.touch()
    generate(path)
    assert len(lines(path)) == 40


def test_more_seeds_and_more_rows_are_appended(tmp_path):
    path = tmp_path / "responses.jsonl"
    few = replace(EXAMPLES, examples=EXAMPLES.examples[:5], rows=EXAMPLES.rows[:5])
    assert len(generate(path, examples=few, seeds=(1,)).responses) == 5
    rollout = Portions()
    assert len(generate(path, rollout).responses) == 40
    assert sum(map(len, rollout._asked)) == 35
    assert len(generate(path, Portions(dies_at=0), examples=few, seeds=(2,)).responses) == 5
    assert len(lines(path)) == 40


@pytest.mark.parametrize("change", ["model", "sampling", "prompt", "stranger"])
def test_responses_of_another_model_prompt_or_sampling_are_refused(change, tmp_path):
    path = tmp_path / "responses.jsonl"
    generate(path)
    before = path.read_bytes()
    options = {
        "model": {"model": tiny("llama", seed=1)},
        "sampling": {"sampling": replace(SAMPLING, temperature=0.5)},
        "prompt": {"examples": replace(EXAMPLES, examples=[replace(e, prompt=[4, *e.prompt]) for e in EXAMPLES])},
        "stranger": {},
    }[change]
    if change == "stranger":
        before += b'{"mine": 1}\n'
        path.write_bytes(before)
    with pytest.raises(ValueError, match=r"responses\.jsonl:\d+ is .*: give another file for the responses, or delete"):
        generate(path, **options)
    assert path.read_bytes() == before


def test_a_folder_is_no_file_for_responses(tmp_path):
    (tmp_path / "folder").mkdir()
    with pytest.raises(ValueError, match=r"is a folder: name a file for the responses, such as .*/responses\.jsonl"):
        generate(tmp_path / "folder")
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_correctness_follows_the_current_references(tmp_path):
    path = tmp_path / "responses.jsonl"
    first = generate(path).responses[0]
    rows = [replace(row, references=(first.line["response"],)) for row in EXAMPLES.rows]
    again = generate(path, Portions(dies_at=0), examples=replace(EXAMPLES, rows=rows)).responses[0]
    assert not first.line["correct"]
    assert again.line["correct"]
    assert again.line["references"] == [first.line["response"]]


def test_a_fingerprint_changes_with_a_step_of_training_and_with_nothing_else():
    model = tiny("llama")
    before = fingerprint(model)
    assert fingerprint(model.train()) == before == fingerprint(tiny("llama"))
    batch = torch.tensor([[4, 5, 6]])
    model(input_ids=batch, labels=batch).loss.backward()
    torch.optim.AdamW(model.parameters(), lr=1e-6).step()
    assert fingerprint(model) != before


def test_the_batch_size_doubles_as_long_as_that_is_faster_and_then_stays_with_the_fastest():
    search = BatchSizeSearch(8)
    sizes = []
    for speed in (100, 190, 300, 310, 500):
        sizes.append(search.size)
        search.record(search.size, speed, 1.0)
    assert sizes == [8, 16, 32, 64, 32]
    assert search.size == 32


def test_a_last_smaller_batch_does_not_change_the_batch_size():
    search = BatchSizeSearch(8)
    search.record(3, 1000, 1.0)
    assert search.size == 8


def test_out_of_memory_halves_the_batch_size():
    rollout, search = Portions(room=5), BatchSizeSearch(16)
    assert len(generate(rollout=rollout, search=search).responses) == 40
    assert max(map(len, rollout._asked)) == 4
    assert rollout._sizes[-1] == 4
    with pytest.raises(torch.OutOfMemoryError):
        generate(rollout=Portions(room=0), search=BatchSizeSearch(16))


def test_several_responses_a_prompt_need_several_seeds():
    with pytest.raises(ValueError, match="give several seeds"):
        generate(sampling=replace(SAMPLING, n=2))


SLOWLY = """
import sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[2])
import test_responses as w

class Portions(w.Portions):
    def generate(self, prompts, sampling, step):
        time.sleep(0.2)
        return super().generate(prompts, sampling, step)

w.generate(Path(sys.argv[1]), Portions(batch_size=2))
"""


def test_a_killed_evaluation_resumes_and_no_other_process_adds_to_its_file_while_it_lives(tmp_path):
    path = tmp_path / "responses.jsonl"
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(str(path.parents[1]) for path in (Path(understudy.__file__), Path(__file__))),
    }
    killed = subprocess.Popen([sys.executable, "-c", SLOWLY, str(path), str(Path(__file__).parent)], env=environment)
    for _ in range(2000):
        if path.exists() and path.stat().st_size > 1000:
            break
        time.sleep(0.05)
    with pytest.raises(ValueError, match=r"another process is writing responses to .*responses\.jsonl: let it end, or"):
        generate(path)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    count = len(path.read_bytes().splitlines())
    assert 0 < count < 40, "it was killed while writing"
    responses = generate(path).responses
    assert sorted((line["seed"], line["row"]) for line in lines(path)) == [(s, r) for s in (1, 2) for r in range(20)]
    assert [a.line["response"] for a in responses] == [a.line["response"] for a in generate().responses]

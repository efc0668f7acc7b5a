"""Responses generated once: the same over steps and runs, and never those of another prompt or sampling."""

import json
from dataclasses import replace

import pytest
from fakes import ScriptedRollout, ragged_examples

from understudy.generation.response_cache import CachedRollout
from understudy.rollout import Writer
from understudy.sampling import Sampling
from understudy.step import Step

PROMPTS = ragged_examples(6)


def cached(folder, **sampling):
    """The calls to the rollout below, and the cached one with its sampling."""
    rollout = ScriptedRollout()
    return rollout.calls, writer(rollout, folder, **sampling)


def writer(rollout, folder, weights="abc", **sampling):
    bound = CachedRollout(rollout, folder / "deep" / "responses.jsonl", weights).bind(None, None)
    return Writer(bound, Sampling(**{"max_new_tokens": 6, **sampling}))


def test_a_row_is_generated_once(tmp_path):
    calls, generate = cached(tmp_path)
    first = generate(PROMPTS, Step(0))
    assert generate(PROMPTS[::-1], Step(7)) == first[::-1]
    assert len(calls) == 1
    assert {e.author for e in first} == {"teacher"}


def test_a_response_does_not_depend_on_the_step_that_first_needed_it(tmp_path):
    assert cached(tmp_path / "a")[1](PROMPTS, Step(0)) == cached(tmp_path / "b")[1](PROMPTS, Step(9))


def test_a_repeated_row_gets_one_response(tmp_path):
    one, two = cached(tmp_path)[1]([PROMPTS[0], PROMPTS[0]], Step(0))
    assert one == two


def test_responses_outlive_the_run(tmp_path):
    first = cached(tmp_path)[1](PROMPTS, Step(0))
    calls, again = cached(tmp_path)
    assert again(PROMPTS, Step(3)) == first
    assert calls == []


def test_responses_of_other_weights_are_not_used(tmp_path):
    first = cached(tmp_path)[1](PROMPTS, Step(0))
    rollout = ScriptedRollout()
    writer(rollout, tmp_path, weights="xyz")(PROMPTS, Step(0))
    assert len(rollout.calls) == 1
    calls, again = cached(tmp_path)
    assert again(PROMPTS, Step(0)) == first
    assert calls == [], "those of the first weights are still there"


def test_a_response_that_was_changed_is_generated_again(tmp_path, caplog):
    first = cached(tmp_path)[1](PROMPTS, Step(0))
    file = tmp_path / "deep" / "responses.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    lines[1]["tokens"] = [5, 2]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    calls, again = cached(tmp_path)
    assert again(PROMPTS, Step(0)) == first
    assert len(calls) == 1
    assert "1 responses in" in caplog.text


def test_only_missing_responses_are_generated(tmp_path):
    cached(tmp_path)[1](PROMPTS[:4], Step(0))
    calls, again = cached(tmp_path)
    again(PROMPTS, Step(0))
    assert len(calls) == 1
    lines = (tmp_path / "deep" / "responses.jsonl").read_text().splitlines()
    assert [json.loads(line)["row"] for line in lines] == list(range(6))


def test_a_process_that_has_all_responses_still_calls_the_rollout_as_others_may_miss_some(tmp_path, monkeypatch):
    """A sharded model's weights are gathered by all processes together, or they wait for each other for ever."""
    first = cached(tmp_path)[1](PROMPTS, Step(0))
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    calls, again = cached(tmp_path)
    assert again(PROMPTS, Step(3)) == first
    assert calls == [0]


def test_a_torn_file_loses_its_last_response_only(tmp_path):
    first = cached(tmp_path)[1](PROMPTS, Step(0))
    file = tmp_path / "deep" / "responses.jsonl"
    for cut in (1, 3, len(file.read_text().splitlines()[-1])):
        file.write_text(file.read_text()[:-cut])
        assert cached(tmp_path)[1](PROMPTS, Step(0)) == first
        calls, later = cached(tmp_path)
        assert later(PROMPTS, Step(0)) == first
        assert calls == [], "what is appended after a torn line must be readable"


def test_lines_that_are_not_responses_are_ignored(tmp_path):
    first = cached(tmp_path)[1](PROMPTS, Step(0))
    file = tmp_path / "deep" / "responses.jsonl"
    file.write_text('12\n"x"\n[1]\nnull\n{}\n[1, 2\n' + file.read_text())
    calls, again = cached(tmp_path)
    assert again(PROMPTS, Step(0)) == first
    assert calls == []


def test_a_response_has_the_prompt_s_row_and_pair(tmp_path):
    [response] = cached(tmp_path)[1]([replace(PROMPTS[2], pair=5)], Step(0))
    assert (response.row, response.pair, response.prompt) == (2, 5, PROMPTS[2].prompt)


def test_a_held_out_row_does_not_get_a_trained_row_s_response(tmp_path):
    """Both are numbered from 0."""
    _, generate = cached(tmp_path)
    other = [replace(e, prompt=[9, *e.prompt]) for e in PROMPTS]
    first = generate(PROMPTS, Step(0))
    assert [e.prompt for e in generate(other, Step(0))] == [e.prompt for e in other]
    calls, again = cached(tmp_path)
    assert again(PROMPTS, Step(0)) == first
    again(other, Step(0))
    assert calls == []
    assert len((tmp_path / "deep" / "responses.jsonl").read_text().splitlines()) == 2 * len(PROMPTS)


@pytest.mark.parametrize(
    "change", [{"temperature": 0.5}, {"max_new_tokens": 5}, {"n": 2}, {"stop_ids": (3,)}, {"logprobs": True}], ids=str
)
def test_responses_of_another_sampling_are_not_used(change, tmp_path):
    first = cached(tmp_path)[1](PROMPTS, Step(0))
    calls, other = cached(tmp_path, **change)
    fresh = Writer(ScriptedRollout(author="teacher"), other.sampling)
    assert other(PROMPTS, Step(4)) == fresh(PROMPTS, Step(0))
    assert calls == [len(PROMPTS)]
    calls, again = cached(tmp_path)
    assert again(PROMPTS, Step(0)) == first
    assert calls == [], "both are in the file"


def test_responses_of_another_seed_are_not_used(tmp_path):
    cached(tmp_path)[1](PROMPTS, Step(0))
    fresh = Writer(ScriptedRollout(author="teacher"), Sampling(max_new_tokens=6))
    assert cached(tmp_path)[1](PROMPTS, Step(2, seed=1)) == fresh(PROMPTS, Step(0, seed=1))


def test_several_responses_and_their_log_probabilities_are_read_from_the_file(tmp_path):
    first = cached(tmp_path, n=3, logprobs=True)[1](PROMPTS, Step(0))
    assert [e.row for e in first] == [e.row for e in PROMPTS for _ in range(3)]
    assert all(len(e.streams["sampled_logprob"]) == len(e.response) for e in first)
    calls, again = cached(tmp_path, n=3, logprobs=True)
    assert again(PROMPTS, Step(9)) == first
    assert calls == []

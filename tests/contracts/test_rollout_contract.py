"""What every rollout promises, whatever writes; one test body, run over all of them, the fakes included."""

from dataclasses import replace

import pytest
import torch
from fakes import ScriptedRollout, ragged_examples, tiny, words

from understudy.answers import KeptAnswers
from understudy.rollouts.generate import GenerateRollout
from understudy.step import Step

STOP, LONGEST = 2, 6


def generate(**fields):
    return GenerateRollout(max_new_tokens=LONGEST, batch_size=3, **fields)


MAKE = {
    "scripted": lambda folder: ScriptedRollout(LONGEST),
    "generate": lambda folder: generate(),
    "generate, greedy": lambda folder: generate(temperature=0),
    "generate, restricted": lambda folder: generate(temperature=0.7, top_k=20, top_p=0.9),
    "kept answers": lambda folder: KeptAnswers(generate(), folder / "answers.jsonl"),
}
SEVERAL = {"scripted": lambda: ScriptedRollout(LONGEST, responses=3), "generate": lambda: generate(responses=3)}


def likely_to_stop():
    """Without this, a random model would end one response in fifty."""
    model = tiny("phi")
    with torch.no_grad():
        model.lm_head.bias[STOP] = 2.5
    return model


@pytest.fixture(params=MAKE)
def rollout(request, tmp_path):
    return MAKE[request.param](tmp_path).follow(likely_to_stop(), words())


PROMPTS = ragged_examples(12, seed=5)


def test_there_is_a_response_to_every_prompt_in_their_order(rollout):
    written = rollout.generate(PROMPTS, Step(0))
    assert [(e.prompt, e.row) for e in written] == [(e.prompt, e.row) for e in PROMPTS]


def test_nothing_in_a_response_comes_from_the_dataset_s(rollout):
    bare = [replace(e, response=[]) for e in PROMPTS]
    assert [e.response for e in rollout.generate(PROMPTS, Step(0))] == [
        e.response for e in rollout.generate(bare, Step(0))
    ]


def test_a_response_ends_with_the_first_stop_token_or_is_truncated(rollout):
    written = rollout.generate(PROMPTS, Step(0))
    for example in written:
        assert 1 <= len(example.response) <= LONGEST
        assert STOP not in example.response[:-1]
        assert example.truncated == (example.response[-1] != STOP)
        assert not example.truncated or len(example.response) == LONGEST
    assert {e.truncated for e in written} == {True, False}, "the test must see both"


def test_responses_are_plain_integers(rollout):
    for example in rollout.generate(PROMPTS[:2], Step(0)):
        assert type(example.response) is list
        assert {type(token) for token in example.response} == {int}


def test_the_same_step_writes_the_same(rollout):
    assert rollout.generate(PROMPTS, Step(3, 1)) == rollout.generate(PROMPTS, Step(3, 1))


def test_what_is_written_depends_on_nothing_but_the_row(rollout):
    together = rollout.generate(PROMPTS, Step(3, 1))
    torch.rand(3)
    assert [rollout.generate([prompt], Step(3, 1))[0] for prompt in PROMPTS] == together
    assert rollout.generate(PROMPTS[::-1], Step(3, 1)) == together[::-1]


def test_no_prompts_give_no_responses(rollout):
    assert rollout.generate([], Step(0)) == []


def test_prompts_are_left_as_they_are(rollout):
    before = [replace(e, prompt=list(e.prompt), response=list(e.response)) for e in PROMPTS]
    rollout.generate(PROMPTS, Step(0))
    assert before == PROMPTS


@pytest.mark.parametrize("name", SEVERAL)
def test_several_responses_to_a_prompt_are_consecutive_and_different(name):
    several = SEVERAL[name]().follow(likely_to_stop(), words())
    written = several.generate(PROMPTS, Step(0))
    assert [e.row for e in written] == [e.row for e in PROMPTS for _ in range(3)]
    assert [several.generate([prompt], Step(0)) for prompt in PROMPTS] == [written[i : i + 3] for i in range(0, 36, 3)]
    assert sum(len({tuple(e.response) for e in written[i : i + 3]}) > 1 for i in range(0, 36, 3)) > 9


@pytest.mark.parametrize("name", ["scripted", "generate"])
def test_another_step_seed_or_author_draws_something_else(name, tmp_path):
    rollout = MAKE[name](tmp_path).follow(likely_to_stop(), words())
    draws = [rollout.generate(PROMPTS, step) for step in (Step(0, 0), Step(1, 0), Step(0, 1))]
    draws.append(rollout.follow(likely_to_stop(), words(), "teacher").generate(PROMPTS, Step(0, 0)))
    assert {e.author for e in draws[0]} == {"student"}
    assert {e.author for e in draws[-1]} == {"teacher"}
    assert len({str([e.response for e in written]) for written in draws}) == len(draws)

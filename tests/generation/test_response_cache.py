"""Answers written once: kept over steps and runs, and never somebody else's."""

import json
from dataclasses import replace

from fakes import ScriptedRollout, ragged_examples

from understudy.generation.response_cache import KeptAnswers
from understudy.step import Step

PROMPTS = ragged_examples(6)


def kept(folder, **fields):
    writer = ScriptedRollout(**fields)
    return writer, KeptAnswers(writer, folder / "deep" / "answers.jsonl").follow(None, None)


def test_a_row_is_answered_once(tmp_path):
    writer, answers = kept(tmp_path)
    first = answers.generate(PROMPTS, Step(0))
    assert answers.generate(PROMPTS[::-1], Step(7)) == first[::-1]
    assert writer.asked == 1
    assert {e.author for e in first} == {"teacher"}


def test_an_answer_does_not_depend_on_the_step_it_was_first_asked_at(tmp_path):
    assert kept(tmp_path / "a")[1].generate(PROMPTS, Step(0)) == kept(tmp_path / "b")[1].generate(PROMPTS, Step(9))


def test_a_row_that_is_asked_twice_at_once_gets_its_one_answer(tmp_path):
    one, two = kept(tmp_path)[1].generate([PROMPTS[0], PROMPTS[0]], Step(0))
    assert one == two


def test_answers_outlive_the_run(tmp_path):
    first = kept(tmp_path)[1].generate(PROMPTS, Step(0))
    writer, again = kept(tmp_path)
    assert again.generate(PROMPTS, Step(3)) == first
    assert writer.asked == 0


def test_only_what_is_missing_is_written(tmp_path):
    kept(tmp_path)[1].generate(PROMPTS[:4], Step(0))
    writer, again = kept(tmp_path)
    again.generate(PROMPTS, Step(0))
    assert writer.asked == 1
    lines = (tmp_path / "deep" / "answers.jsonl").read_text().splitlines()
    assert [json.loads(line)[0] for line in lines] == list(range(6))


def test_a_file_that_was_cut_off_loses_its_last_answer_only(tmp_path):
    whole = kept(tmp_path)[1].generate(PROMPTS, Step(0))
    file = tmp_path / "deep" / "answers.jsonl"
    for cut in (1, 3, len(file.read_text().splitlines()[-1])):
        file.write_text(file.read_text()[:-cut])
        writer, again = kept(tmp_path)
        assert again.generate(PROMPTS, Step(0)) == whole
        _, later = kept(tmp_path)
        later.rollout = writer
        before = writer.asked
        assert later.generate(PROMPTS, Step(0)) == whole
        assert writer.asked == before, "what is appended after a cut must be readable"


def test_lines_that_are_no_answers_are_passed_over(tmp_path):
    whole = kept(tmp_path)[1].generate(PROMPTS, Step(0))
    file = tmp_path / "deep" / "answers.jsonl"
    file.write_text('12\n"x"\n[1]\nnull\n{}\n[1, 2\n' + file.read_text())
    writer, again = kept(tmp_path)
    assert again.generate(PROMPTS, Step(0)) == whole
    assert writer.asked == 0


def test_what_is_written_keeps_the_prompt_s_row_and_pair(tmp_path):
    from dataclasses import replace

    [answer] = kept(tmp_path)[1].generate([replace(PROMPTS[2], pair=5)], Step(0))
    assert (answer.row, answer.pair, answer.prompt) == (2, 5, PROMPTS[2].prompt)


def test_a_held_out_row_is_not_answered_with_a_trained_row_s_answer(tmp_path):
    """Both are numbered from 0."""
    _, answers = kept(tmp_path)
    other = [replace(e, prompt=[9, *e.prompt]) for e in PROMPTS]
    first = answers.generate(PROMPTS, Step(0))
    assert [e.prompt for e in answers.generate(other, Step(0))] == [e.prompt for e in other]
    writer, again = kept(tmp_path)
    assert again.generate(PROMPTS, Step(0)) == first
    again.generate(other, Step(0))
    assert writer.asked == 0
    assert len((tmp_path / "deep" / "answers.jsonl").read_text().splitlines()) == 2 * len(PROMPTS)

"""The playground's problems are correct, the same on every machine, and share no working between splits."""

import re
import subprocess
import sys
import zlib

import pytest

from understudy.metrics.final_answer import is_correct
from understudy.playground.arithmetic import problems
from understudy.playground.vocabulary import tokenizer

ROWS = problems(2000, seed=1)


def test_the_same_arguments_give_the_same_problems():
    assert problems(50, seed=7) == problems(50, seed=7)
    assert problems(50, seed=7) == problems(80, seed=7)[:50]
    assert problems(50, seed=7) != problems(50, seed=8)


def test_the_first_problem_is_the_same_on_every_machine():
    assert problems(1, seed=0) == [
        {
            "prompt": "Emma is 34 years old. Noah is 19 years older. How old was Noah 7 years ago?\n",
            "completion": "34+19=53\n53-7=46\n#### 46",
        }
    ]


def test_another_process_generates_the_same_problems():
    code = "from understudy.playground.arithmetic import problems; print(problems(20, seed=3))"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert output.strip() == str(problems(20, seed=3))


def test_no_working_occurs_in_two_splits():
    workings = [
        {row["completion"] for row in problems(count, seed, split)}
        for split, count in (("train", 5000), ("validation", 500), ("test", 500))
        for seed in ([0, 1] if split == "train" else [0])
    ]
    train, validation, test = workings[0] | workings[1], workings[2], workings[3]
    assert not train & validation
    assert not train & test
    assert not validation & test


def test_problems_of_a_call_are_all_different():
    assert len({row["prompt"] for row in ROWS}) == len(ROWS)


def test_an_unknown_split_is_refused():
    with pytest.raises(ValueError, match="train, validation and test"):
        problems(1, split="dev")  # type: ignore[arg-type]


def test_every_step_of_every_working_is_correct():
    for row in ROWS:
        *steps, result = row["completion"].split("\n")
        assert 2 <= len(steps) <= 4
        for step in steps:
            left, right = step.split("=")
            assert re.fullmatch(r"\d+[-+*/]\d+", left)
            assert eval(left) == int(right)
            assert 1 <= int(right) <= 100
        assert result == f"#### {steps[-1].split('=')[1]}"


def test_every_number_of_a_working_is_in_the_story_or_a_result():
    for row in ROWS:
        numbers = {int(number) for number in re.findall(r"\d+", row["prompt"])}
        numbers |= {2} if "half" in row["prompt"] else set()
        used = set()
        for step in row["completion"].split("\n")[:-1]:
            left, right, result = map(int, re.split(r"[-+*/=]", step))
            assert {left, right} <= numbers
            used |= {left, right}
            numbers.add(result)
        assert {int(number) for number in re.findall(r"\d+", row["prompt"])} <= used


def test_the_tokenizer_gives_every_text_back():
    reader = tokenizer()
    for text in (part for row in ROWS for part in (row["prompt"], row["completion"])):
        ids = reader(text)["input_ids"]
        assert reader.unk_token_id not in ids
        assert reader.decode(ids) == text


def test_the_vocabulary_keeps_its_ids_because_trained_models_depend_on_them():
    ids = tokenizer().get_vocab()
    assert len(ids) == 140
    listed = "\n".join(sorted(ids, key=ids.__getitem__))
    assert zlib.crc32(listed.encode()) == 3899065140


def test_an_unknown_word_is_one_unknown_token():
    reader = tokenizer()
    assert reader("Anna has 3 zeppelins.")["input_ids"].count(reader.unk_token_id) == 1


def test_padding_end_and_unknown_are_different_tokens():
    reader = tokenizer()
    assert len({reader.pad_token_id, reader.eos_token_id, reader.unk_token_id}) == 3
    assert reader.decode([*reader("Tom has").input_ids, reader.eos_token_id], skip_special_tokens=True) == "Tom has"


def test_the_tokenizer_survives_saving(tmp_path):
    from transformers import AutoTokenizer

    tokenizer().save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    text = ROWS[0]["prompt"] + ROWS[0]["completion"]
    assert loaded(text)["input_ids"] == tokenizer()(text)["input_ids"]
    assert loaded.decode(loaded(text)["input_ids"]) == text


def test_prompts_and_answers_are_short():
    reader = tokenizer()
    assert max(len(ids) for ids in reader([row["prompt"] for row in ROWS])["input_ids"]) <= 60
    assert max(len(ids) for ids in reader([row["completion"] for row in ROWS])["input_ids"]) <= 50


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("3*4=12\n#### 12", "12"),
        ("#### 1,234 coins", "1234"),
        ("#### 5\n#### 6", "6"),
        ("####7", "7"),
        ("#### -3.", "-3"),
        ("#### $2.50", "2.50"),
        ("the answer is 12", None),
        ("####", None),
    ],
)
def test_the_final_answer_follows_the_last_mark(text: str, answer: str | None):
    assert is_correct(text, [f"#### {answer}"]) == (answer is not None)


def test_only_the_final_answer_is_compared():
    assert is_correct("a guess\n#### 1234", ["1000+234=1234\n#### 1,234"])
    assert not is_correct("#### 12", ["#### 120"])
    assert not is_correct("12", ["#### 12"])
    assert not is_correct("12", ["12"])

"""The instruction task: right answers, splits that share nothing, a tokenizer that knows every word, lengths."""

import random
import re
import zlib
from pathlib import Path

import pytest

from understudy.evaluation.evaluate_model import evaluate_model
from understudy.evaluation.response_metrics import buckets
from understudy.evaluation.settings import EvalSettings
from understudy.models.load import load_model, load_tokenizer
from understudy.playground.instructions.rows import KINDS, instructions
from understudy.playground.instructions.words import ANIMALS, GROUPS, NAMES, PLURALS, WORDS
from understudy.playground.names import resolve, rows
from understudy.playground.ship import LIMITS
from understudy.playground.vocabulary import tokenizer
from understudy.recipe import Data

NAME = "playground:instructions"
ROWS = instructions(4000, seed=5)


def pairs(kind):
    """Requests and responses of a kind, 40 of them."""
    [kind] = [each for each in KINDS if each.name == kind]
    rng = random.Random(0)
    return [(row["prompt"].strip(), row["completion"]) for row in (kind.row(rng) for _ in range(40))]


def listed(text):
    """The list in a request: its words and digits that are no part of the wording."""
    return [word for word in re.findall(r"\w+", text) if word in WORDS or word.isdigit()]


ANSWERS = {  # kind: a second way to find the answer in the request
    "sort": lambda text: " ".join(sorted(listed(text))),
    "reverse": lambda text: " ".join(reversed(listed(text))),
    "first": lambda text: listed(text)[0],
    "last two": lambda text: " ".join(listed(text)[-2:]),
    "longest": lambda text: max(listed(text), key=len),
    "first letters": lambda text: " ".join(word[0] for word in listed(text)),
    "largest": lambda text: max(listed(text), key=int),
    "sort numbers": lambda text: " ".join(sorted(listed(text), key=int)),
    "twice": lambda text: next(word for word in listed(text) if listed(text).count(word) == 2),
    "plurals": lambda text: " ".join(PLURALS[word] for word in listed(text)),
    "spell": lambda text: " ".join(re.search(r"(?:word|of) (\w+)", text)[1]),
    "copy": lambda text: text.partition(": ")[2],
    "odd one": lambda text: next(word for of in GROUPS.values() for word in of if {*of} & {*listed(text)} == {word}),
}


@pytest.mark.parametrize("kind", ANSWERS)
def test_answers_are_right(kind):
    for text, answer in pairs(kind):
        assert ANSWERS[kind](text) == answer, text


def test_questions_about_a_sentence_are_answered_from_it():
    for text, answer in pairs("who has more"):
        amounts = {name: int(number) for name, number in re.findall(r"(\w+) has (\d+)", text)}
        assert answer.removesuffix(" has more.") == max(amounts, key=amounts.get), text
    for text, answer in pairs("sound of a pet"):
        assert ANIMALS[re.search(r"has a (\w+)", text)[1]][0] in answer


def test_the_same_arguments_give_the_same_rows_on_every_machine():
    assert instructions(300, seed=5) == ROWS[:300]
    assert instructions(3, seed=0)[0] == {
        "prompt": "Write a greeting to Emma.\n",
        "completion": "Hi Emma! It is good to see you.",
        "kind": "greeting",
    }
    text = "".join(row["prompt"] + row["completion"] for row in instructions(500, seed=1))
    assert zlib.crc32(text.encode()) == 2179618711


def test_splits_share_no_request_and_unseen_kinds_are_only_in_their_own():
    by_split = {split: instructions(800, split=split) for split in ("train", "validation", "test", "unseen")}
    prompts = {split: {row["prompt"] for row in of} for split, of in by_split.items()}
    assert sum(map(len, prompts.values())) == len(set.union(*prompts.values())), "a request is in two splits"
    assert all(len({tuple(row.values()) for row in by_split[split]}) == 800 for split in by_split if split != "train")
    kinds = {split: {row["kind"] for row in of} for split, of in by_split.items()}
    assert not kinds["unseen"] & set.union(*(kinds[split] for split in ("train", "validation", "test")))
    assert kinds["unseen"] == {kind.name for kind in KINDS if not kind.seen}
    assert len(kinds["train"]) == len(KINDS) - len(kinds["unseen"]) >= 36
    with pytest.raises(ValueError, match="unknown split"):
        instructions(1, split="dev")  # type: ignore[arg-type]


def test_every_text_comes_back_from_its_tokens_and_responses_are_short_and_long():
    words = load_tokenizer(NAME)
    assert words.get_vocab() == tokenizer(NAME).get_vocab()
    lengths = []
    for row in [*ROWS, *rows(NAME, "unseen", limit=400)]:
        for text in (row["prompt"], row["completion"]):
            ids = words(text)["input_ids"]
            assert words.unk_token_id not in ids, text
            assert words.decode(ids) == text
        lengths.append(len(ids))
        assert len(words(row["prompt"])["input_ids"]) <= 90
    assert 1 <= min(lengths) <= max(lengths) <= 60
    places = [sum(length > bound for bound in (8, 20)) for length in lengths]
    assert all(places.count(place) > 0.1 * len(places) for place in range(len(buckets((8, 20)))))


def test_open_kinds_have_several_answers_to_the_same_request():
    rng = random.Random(0)
    [story] = [kind for kind in KINDS if kind.name == "story"]
    assert len({story.row(rng)["completion"] for _ in range(50)}) > 45
    assert sum(kind.is_open for kind in KINDS) >= len(KINDS) / 3
    assert all(any(name in row["prompt"] for name in NAMES) for row in ROWS if row["kind"] == "story")


def test_the_shipped_models_are_small_and_the_teacher_is_twenty_times_larger():
    sizes = {}
    for name in (NAME, f"{NAME}-student"):
        sizes[name] = sum(parameter.numel() for parameter in load_model(name).parameters())
        assert Path(resolve(name), "model.safetensors").stat().st_size <= LIMITS[name]
        assert load_tokenizer(name).get_vocab() == load_tokenizer(NAME).get_vocab()
    assert 20 * sizes[f"{NAME}-student"] <= sizes[NAME] <= 4_000_000


def test_the_shipped_teacher_is_far_above_the_student():
    settings = EvalSettings(Data(dataset=NAME, split="test", limit=100), max_new_tokens=64, batch_size=100)
    teacher, student = (
        evaluate_model(name, settings.changed(metrics=("rouge_l",))).metrics for name in (NAME, f"{NAME}-student")
    )
    assert teacher["rouge_l"] >= 60
    assert teacher["accuracy"] >= student["accuracy"] + 0.1

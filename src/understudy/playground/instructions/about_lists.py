"""Kinds of instruction about lists of words and numbers; each has one right answer."""

import random

from ..arithmetic import number, pick
from .kind import Kind, Slots, enumeration, several
from .words import GROUPS, NUMBERS, OPPOSITES, PLURALS, WORDS


def _words(rng: random.Random) -> Slots:
    """A list of words and everything that is asked about one."""
    words = several(rng, WORDS, number(rng, 3, 5))
    new = pick(rng, [word for word in WORDS if word not in words])
    out = pick(rng, words)
    return {
        "list": " ".join(words),
        "sorted": " ".join(sorted(words)),
        "falling": " ".join(sorted(words, reverse=True)),
        "reversed": " ".join(words[::-1]),
        "count": NUMBERS[len(words) - 1],
        "first": words[0],
        "last": words[-1],
        "start": " ".join(words[:2]),
        "end": " ".join(words[-2:]),
        "first_letters": " ".join(word[0] for word in words),
        "last_letters": " ".join(word[-1] for word in words),
        "new": new,
        "out": out,
        "without": " ".join([word for word in words if word != out]),
        "changed": " ".join([new if word == out else word for word in words]),
        "longer": " ".join([*words, new]),
        "earlier": " ".join([new, *words]),
        "sentence": enumeration(words),
        "plurals": " ".join([PLURALS[word] for word in words]),
    }


def _longest(rng: random.Random) -> Slots:
    while True:
        words = several(rng, WORDS, number(rng, 3, 5))
        lengths = sorted(map(len, words))
        if lengths[-1] > lengths[-2]:
            return {"list": " ".join(words), "longest": max(words, key=len)}


def _twice(rng: random.Random) -> Slots:
    words = several(rng, WORDS, number(rng, 3, 5))
    twice = pick(rng, words)
    place = int(rng.random() * (len(words) + 1))
    return {"list": " ".join([*words[:place], twice, *words[place:]]), "twice": twice}


def _odd_one(rng: random.Random) -> Slots:
    group, other = several(rng, tuple(GROUPS), 2)
    odd = pick(rng, GROUPS[other])
    words = several(rng, (*several(rng, GROUPS[group], 3), odd), 4)
    return {"list": " ".join(words), "odd": odd}


def _opposites(rng: random.Random) -> Slots:
    words = several(rng, tuple(OPPOSITES), number(rng, 2, 3))
    return {"list": " ".join(words), "opposites": " ".join([OPPOSITES[word] for word in words])}


def _numbers(rng: random.Random) -> Slots:
    numbers = several(rng, tuple("0123456789"), number(rng, 3, 5))
    return {"list": " ".join(numbers), "sorted": " ".join(sorted(numbers)), "largest": max(numbers)}


def _repeated(rng: random.Random) -> Slots:
    word, times = pick(rng, WORDS), number(rng, 2, 5)
    return {"word": word, "times": NUMBERS[times - 1], "repeated": " ".join([word] * times)}


def _spelled(rng: random.Random) -> Slots:
    word = pick(rng, WORDS)
    return {"word": word, "letters": " ".join(word), "count": NUMBERS[len(word) - 1]}


LISTS = (
    Kind("sort", ("Sort these words: {list}.", "Put {list} in alphabetical order."), ("{sorted}",), _words),
    Kind("copy a list", ("Copy these words: {list}.", "Write this list again: {list}."), ("{list}",), _words),
    Kind(
        "reverse", ("Reverse the list {list}.", "Write these words in reverse order: {list}."), ("{reversed}",), _words
    ),
    Kind("count", ("How many words are in the list {list}?", "Count these words: {list}."), ("{count}",), _words),
    Kind("first", ("What is the first word of {list}?", "Write only the first word: {list}."), ("{first}",), _words),
    Kind("last", ("What is the last word of {list}?", "Write only the last word: {list}."), ("{last}",), _words),
    Kind(
        "first two", ("Write only the first two words: {list}.", "Keep the first two of {list}."), ("{start}",), _words
    ),
    Kind(
        "longest", ("Which word is the longest: {list}?", "Find the longest word in {list}."), ("{longest}",), _longest
    ),
    Kind("remove", ("Remove {out} from {list}.", "Write the list {list} without {out}."), ("{without}",), _words),
    Kind(
        "replace",
        ("Replace {out} by {new} in {list}.", "Write {new} in place of {out}: {list}."),
        ("{changed}",),
        _words,
    ),
    Kind("add", ("Add {new} to the list {list}.", "Write {list} and then {new}, as a list."), ("{longer}",), _words),
    Kind(
        "put first",
        ("Put {new} before the list {list}.", "Write {new} and then the list {list}."),
        ("{earlier}",),
        _words,
    ),
    Kind(
        "first letters", ("Write the first letters of {list}.", "First letters: {list}."), ("{first_letters}",), _words
    ),
    Kind(
        "join", ("Join these words with and: {list}.", "Write {list} as a part of a sentence."), ("{sentence}",), _words
    ),
    Kind(
        "twice",
        ("Which word is in the list twice: {list}?", "Find the word that is there twice: {list}."),
        ("{twice}",),
        _twice,
    ),
    Kind(
        "odd one",
        ("Which word does not belong: {list}?", "Find the word that does not fit: {list}."),
        ("{odd}",),
        _odd_one,
    ),
    Kind("sort numbers", ("Sort these numbers: {list}.", "Put the numbers {list} in order."), ("{sorted}",), _numbers),
    Kind("largest", ("What is the largest number: {list}?", "Find the largest of {list}."), ("{largest}",), _numbers),
    Kind(
        "repeat", ("Write {word} {times} times.", "Repeat the word {word} {times} times."), ("{repeated}",), _repeated
    ),
    Kind("spell", ("Spell the word {word}.", "Write the letters of {word}."), ("{letters}",), _spelled),
    Kind(
        "last letters",
        ("Write the last letters of {list}.", "Last letters: {list}."),
        ("{last_letters}",),
        _words,
        False,
    ),
    Kind(
        "sort falling",
        ("Sort these words. Then write this list in reverse order: {list}.",),
        ("{falling}",),
        _words,
        False,
    ),
    Kind(
        "last two",
        ("Write only the last two words: {list}.", "Keep the last two of {list}."),
        ("{end}",),
        _words,
        False,
    ),
    Kind(
        "letters",
        ("How many letters are in the word {word}?", "Count the letters of {word}."),
        ("{count}",),
        _spelled,
        False,
    ),
    Kind("plurals", ("Write the plurals of these words: {list}.",), ("{plurals}",), _words, False),
    Kind("opposites", ("Write the opposites of these words: {list}.",), ("{opposites}",), _opposites, False),
)

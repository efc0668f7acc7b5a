"""Kinds of instruction about facts; the same fact may be told in several ways."""

import random

from ..arithmetic import pick
from .kind import Kind, Slots
from .words import ANIMALS, DAYS, GROUPS, OPPOSITES, PLURALS, USES, WORDS


def _animal(rng: random.Random) -> Slots:
    animal = pick(rng, tuple(ANIMALS))
    sound, home, food, looks, likes = ANIMALS[animal]
    return {"animal": animal, "sound": sound, "home": home, "food": food, "looks": looks, "likes": likes}


def _thing(rng: random.Random) -> Slots:
    thing = pick(rng, tuple(USES))
    use, material = USES[thing]
    return {"thing": thing, "use": use, "material": material}


def _member(rng: random.Random) -> Slots:
    word = pick(rng, WORDS)
    group = next(group for group, members in GROUPS.items() if word in members)
    asked = group if rng.random() < 0.5 else pick(rng, [other for other in GROUPS if other != group])
    answer = f"Yes, a {word} is {_a(group)}." if asked == group else f"No, a {word} is {_a(group)}."
    return {"word": word, "group": _a(group), "asked": _a(asked), "answer": answer}


def _a(group: str) -> str:
    return f"an {group}" if group == "animal" else f"a {group}"


def _day(rng: random.Random) -> Slots:
    place = int(rng.random() * 7)
    return {"day": DAYS[place], "next": DAYS[(place + 1) % 7], "before": DAYS[(place - 1) % 7]}


def _opposite(rng: random.Random) -> Slots:
    word = pick(rng, tuple(OPPOSITES))
    return {"word": word, "opposite": OPPOSITES[word]}


def _plural(rng: random.Random) -> Slots:
    word = pick(rng, WORDS)
    return {"word": word, "plural": PLURALS[word]}


FACTS = (
    Kind(
        "sound",
        ("What sound does a {animal} make?", "Which sound is that of a {animal}?"),
        ("It {sound}.", "A {animal} {sound}.", "The {animal} {sound}."),
        _animal,
    ),
    Kind(
        "home",
        ("Where does a {animal} live?", "Tell me where a {animal} lives."),
        ("It lives {home}.", "A {animal} lives {home}.", "You can find a {animal} {home}."),
        _animal,
    ),
    Kind(
        "food",
        ("What does a {animal} eat?", "Tell me what a {animal} eats."),
        ("It eats {food}.", "A {animal} eats {food}.", "A {animal} likes to eat {food}."),
        _animal,
    ),
    Kind(
        "use",
        ("What is a {thing} for?", "What can I do with a {thing}?"),
        ("You can {use} with it.", "With a {thing} you can {use}.", "To {use}."),
        _thing,
    ),
    Kind(
        "material",
        ("What is a {thing} made of?", "Which material is a {thing} made of?"),
        ("{material}", "It is made of {material}.", "A {thing} is made of {material}."),
        _thing,
    ),
    Kind(
        "group",
        ("What kind of thing is a {word}?", "To which group does a {word} belong?"),
        ("It is {group}.", "A {word} is {group}."),
        _member,
    ),
    Kind("is it", ("Is a {word} {asked}?", "Is it right that a {word} is {asked}?"), ("{answer}",), _member),
    Kind("next day", ("Which day comes after {day}?", "What day follows {day}?"), ("{next}",), _day),
    Kind("day before", ("Which day comes before {day}?", "What day was it before {day}?"), ("{before}",), _day),
    Kind("opposite", ("What is the opposite of {word}?", "Write the opposite of {word}."), ("{opposite}",), _opposite),
    Kind("plural", ("What is the plural of {word}?", "Write the plural of {word}."), ("{plural}",), _plural),
)

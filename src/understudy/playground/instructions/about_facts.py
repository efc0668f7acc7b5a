"""Kinds of instruction about facts; the same fact may be told in several ways."""

import random

from ..arithmetic import pick
from .kind import Kind, Slots
from .words import ANIMALS, DAYS, GROUPS, OPPOSITES, PLURALS, USES, WORDS


def animal_facts(rng: random.Random) -> Slots:
    """An animal and everything that is known of it."""
    animal = pick(rng, tuple(ANIMALS))
    sound, home, food, looks, likes = ANIMALS[animal]
    return {"animal": animal, "sound": sound, "home": home, "food": food, "looks": looks, "likes": likes}


def thing_facts(rng: random.Random) -> Slots:
    """A thing, its use and its material."""
    thing = pick(rng, tuple(USES))
    use, material = USES[thing]
    return {"thing": thing, "use": use, "material": material}


def _member(rng: random.Random) -> Slots:
    word = pick(rng, WORDS)
    group = next(group for group, members in GROUPS.items() if word in members)
    candidate = group if rng.random() < 0.5 else pick(rng, [other for other in GROUPS if other != group])
    answer = f"{'Yes' if candidate == group else 'No'}, a {word} is {_with_article(group)}."
    return {"word": word, "group": _with_article(group), "asked": _with_article(candidate), "answer": answer}


def _with_article(group: str) -> str:
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
        animal_facts,
    ),
    Kind(
        "home",
        ("Where does a {animal} live?", "Tell me where a {animal} lives."),
        ("It lives {home}.", "A {animal} lives {home}.", "You can find a {animal} {home}."),
        animal_facts,
    ),
    Kind(
        "food",
        ("What does a {animal} eat?", "Tell me what a {animal} eats."),
        ("It eats {food}.", "A {animal} eats {food}.", "A {animal} likes to eat {food}."),
        animal_facts,
    ),
    Kind(
        "use",
        ("What is a {thing} for?", "What can I do with a {thing}?"),
        ("You can {use} with it.", "With a {thing} you can {use}.", "To {use}."),
        thing_facts,
    ),
    Kind(
        "material",
        ("What is a {thing} made of?", "Which material is a {thing} made of?"),
        ("{material}", "It is made of {material}.", "A {thing} is made of {material}."),
        thing_facts,
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

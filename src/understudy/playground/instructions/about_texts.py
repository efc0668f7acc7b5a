"""Kinds of instruction about a sentence that is given; most have one right answer, up to its wording."""

import random

from ..arithmetic import number, pick
from .kind import Kind, Slots, several
from .words import ANIMALS, COLOURS, NAMES, NUMBERS, PLACES, PLURALS, SPOTS, THINGS, VERBS


def _sentence(rng: random.Random) -> Slots:
    """A sentence about somebody's thing, and everything that is asked about one."""
    name, other = several(rng, NAMES, 2)
    colour, other_colour = several(rng, COLOURS, 2)
    thing, spot = pick(rng, THINGS), pick(rng, SPOTS)
    verb, place = pick(rng, tuple(VERBS)), pick(rng, PLACES)
    past, infinitive = VERBS[verb]
    text = f"{name} has a {colour} {thing} {spot}."
    return {
        "text": text,
        "name": name,
        "other": other,
        "colour": colour,
        "thing": thing,
        "spot": spot,
        "new_colour": other_colour,
        "renamed": text.replace(name, other),
        "recoloured": text.replace(colour, other_colour),
        "negated": text.replace("has a", "has no"),
        "walk": f"{name} {verb} the {place}.",
        "place": place,
        "past": f"{name} {past} the {place}.",
        "asked": f"Does {name} {infinitive} the {place}?",
        "denied": f"{name} does not {infinitive} the {place}.",
    }


def _amounts(rng: random.Random) -> Slots:
    name, other = several(rng, NAMES, 2)
    amount, lower = sorted(map(int, several(rng, tuple("23456789"), 2)), reverse=True)
    thing = PLURALS[pick(rng, THINGS)]
    owners = [(name, amount), (other, lower)]
    (first, most), (second, least) = owners if rng.random() < 0.5 else owners[::-1]
    text = f"{first} has {most} {thing} and {second} has {least} {thing}."
    return {"text": text, "more": name, "fewer": other, "amount": str(amount), "things": thing}


def _pet(rng: random.Random) -> Slots:
    name, animal = pick(rng, NAMES), pick(rng, tuple(ANIMALS))
    sound, home, *_ = ANIMALS[animal]
    return {"text": f"{name} has a {animal}.", "animal": animal, "sound": sound, "home": home}


def _count(rng: random.Random) -> Slots:
    count = number(rng, 2, 12)
    thing = PLURALS[pick(rng, THINGS)]
    name = pick(rng, NAMES)
    return {"word": NUMBERS[count - 1], "digits": str(count), "text": f"{name} has {NUMBERS[count - 1]} {thing}."}


TEXTS = (
    Kind("copy", ("Copy this sentence: {text}", "Write this again: {text}"), ("{text}",), _sentence),
    Kind(
        "rename", ("Write this about {other}: {text}", "Replace {name} by {other}: {text}"), ("{renamed}",), _sentence
    ),
    Kind("recolour", ("Change the colour to {new_colour}: {text}",), ("{recoloured}",), _sentence),
    Kind("has no", ("Say that it is not so: {text}", "Write the opposite: {text}"), ("{negated}",), _sentence),
    Kind("past", ("Write this in the past: {walk}", "Say it as of yesterday: {walk}"), ("{past}",), _sentence),
    Kind("question", ("Make a question: {walk}", "Ask if it is so: {walk}"), ("{asked}",), _sentence),
    Kind("deny", ("Deny this: {walk}", "Say that this is not so: {walk}"), ("{denied}",), _sentence),
    Kind("who", ("{text} Who has it?", "{text} Who has the {thing}?"), ("{name}", "{name} has it."), _sentence),
    Kind(
        "which colour",
        ("{text} Which colour is the {thing}?", "{text} What colour does it have?"),
        ("{colour}", "It is {colour}.", "The {thing} is {colour}."),
        _sentence,
    ),
    Kind(
        "where",
        ("{text} Where is the {thing}?", "Where is it? {text}"),
        ("It is {spot}.", "The {thing} is {spot}.", "{name} has it {spot}."),
        _sentence,
    ),
    Kind(
        "where to",
        ("{walk} Where is {name}?", "Which place is this about? {walk}"),
        ("The {place}.", "It is the {place}.", "The place is the {place}."),
        _sentence,
    ),
    Kind("who has more", ("{text} Who has more?", "Who has more? {text}"), ("{more}", "{more} has more."), _amounts),
    Kind(
        "who has fewer", ("{text} Who has fewer?", "Who has fewer? {text}"), ("{fewer}", "{fewer} has fewer."), _amounts
    ),
    Kind("how many", ("{text} How many {things} does {more} have?",), ("{amount}", "{amount} {things}."), _amounts),
    Kind("digits", ("Write the number {word} in digits.", "Write in digits: {word}."), ("{digits}",), _count),
    Kind("number word", ("Write the number {digits} as a word.", "Write as a word: {digits}."), ("{word}",), _count),
    Kind("find the number", ("Which number is in this sentence? {text}",), ("{word}",), _count),
    Kind("sound of a pet", ("{text} What sound does it make?",), ("It {sound}.", "The {animal} {sound}."), _pet, False),
    Kind(
        "home of a pet", ("{text} Where does it live?",), ("It lives {home}.", "A {animal} lives {home}."), _pet, False
    ),
)

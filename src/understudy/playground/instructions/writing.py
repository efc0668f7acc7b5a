"""Kinds of instruction that ask for a text; there are many right answers, of up to 60 tokens."""

import random

from ..arithmetic import pick
from .about_facts import animal_facts, thing_facts
from .kind import Kind, Slots, enumeration, several
from .words import (
    ADJECTIVES,
    COLOURS,
    DAYS,
    GROUPS,
    NAMES,
    PLACES,
    PLURALS,
    REASONS,
    RECIPES,
    THINGS,
    TROUBLES,
)


def _scene(rng: random.Random) -> Slots:
    """A person, an animal with its facts, a thing, a place and a day."""
    return {
        **animal_facts(rng),
        "name": pick(rng, NAMES),
        "place": pick(rng, PLACES),
        "thing": pick(rng, THINGS),
        "colour": pick(rng, COLOURS),
        "day": pick(rng, DAYS),
        "adjective": pick(rng, ADJECTIVES),
    }


def _members(rng: random.Random) -> Slots:
    group = pick(rng, tuple(GROUPS))
    members = several(rng, GROUPS[group], 3)
    words = {"list": " ".join(members), "sentence": enumeration(members)}
    return {"name": pick(rng, NAMES), "groups": PLURALS[group], **words}


def _thing(rng: random.Random) -> Slots:
    return {**thing_facts(rng), "name": pick(rng, NAMES)}


def _trouble(rng: random.Random) -> Slots:
    state = pick(rng, tuple(TROUBLES))
    first, second = several(rng, TROUBLES[state], 2)
    return {"name": pick(rng, NAMES), "state": state, "first": first, "second": second}


def _reason(rng: random.Random) -> Slots:
    action = pick(rng, tuple(REASONS))
    return {"name": pick(rng, NAMES), "action": action, "reason": pick(rng, REASONS[action])}


def _recipe(rng: random.Random) -> Slots:
    dish = pick(rng, tuple(RECIPES))
    first, second, third, last = RECIPES[dish]
    return {"name": pick(rng, NAMES), "dish": dish, "first": first, "second": second, "third": third, "last": last}


WRITING = (
    Kind(
        "name three",
        ("{name} asks for three {groups}.", "Name three {groups} for {name}."),
        ("{list}", "Three of them are {sentence}.", "{name} can have {sentence}."),
        _members,
    ),
    Kind(
        "a sentence",
        ("Write a sentence about {name} and a {animal}.", "Use {name} and {animal} in a sentence."),
        ("[sentence]",),
        _scene,
    ),
    Kind(
        "describe",
        ("Describe the {animal} of {name}.", "Tell {name} about the {animal}."),
        (
            "A {animal} is {looks}. It lives {home} and eats {food}. It likes {likes}.",
            "The {animal} {sound}. It is {looks} and lives {home}. It eats {food}.",
            "A {animal} lives {home}. It likes {likes}, and it eats {food}. It is {looks}.",
            "{name}, a {animal} is {looks}. It {sound}, lives {home} and likes {likes}.",
        ),
        _scene,
    ),
    Kind(
        "describe a thing",
        ("Tell {name} what a {thing} is.",),
        (
            "A {thing} is made of {material}. You can {use} with it.",
            "{name}, you can {use} with a {thing}. It is made of {material}.",
            "With a {thing} you can {use}. It is made of {material}.",
        ),
        _thing,
        seen=False,
    ),
    Kind(
        "story",
        (
            "Tell a short story about {name} and a {animal} in the {place}.",
            "Write a story with {name}, a {animal} and the {place}.",
        ),
        (
            "[opening] [event] [ending]",
            "[opening] [event] [event] [ending]",
            "[opening] [event] [event] [event] [ending]",
        ),
        _scene,
    ),
    Kind("greeting", ("Write a greeting to {name}.", "Say hello to {name}."), ("[greeting]! [wish]",), _scene),
    Kind(
        "thanks",
        ("Write a letter of thanks to {name} for a {colour} {thing}.", "Thank {name} for a {colour} {thing}."),
        ("[greeting]! [thanks] [praise]", "[greeting]! [thanks] [praise] [wish]"),
        _scene,
    ),
    Kind(
        "invitation",
        ("Invite {name} to the {place} on {day}.", "Write {name} a letter: come to the {place} on {day}."),
        ("[greeting]! [invitation] [plan]", "[greeting]! [wish] [invitation] [plan]"),
        _scene,
    ),
    Kind("advice", ("{name} is {state}. What helps?", "What should {name} do when {state}?"), ("[advice]",), _trouble),
    Kind("reason", ("{name} {action}. Why?", "Why is it that {name} {action}?"), ("[because]",), _reason),
    Kind(
        "steps",
        ("{name} wants to make {dish}. What are the steps?", "Tell {name} how to make {dish}."),
        (
            "First {first}. Then {second}. After that {third}. In the end {last}.",
            "{name} has to {first}, {second} and {third}. Then {last}.",
            "First {first} and {second}. Then {third} and {last}.",
        ),
        _recipe,
    ),
)

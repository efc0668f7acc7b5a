"""Generate word problems: a few steps of arithmetic as a story, with the steps written out in the solution.

A story is a sequence of fragments with a running total. A fragment is a sentence with slots, and the steps that it adds
to the working, so a dozen sentences make thousands of kinds of problems whose text and solution always agree:

    Mia has 4 bags with 6 pens in each. Mia gives 5 pens to Tom. How many pens does Mia have left?
    4*6=24
    24-5=19
    #### 19

The solution is written as in GSM8K (https://arxiv.org/abs/2110.14168): the working, then the result after `####`.
"""

import random
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

Split = Literal["train", "validation", "test"]
T = TypeVar("T")

LARGEST = 100  # the largest number in a working
STEPS = (2, 4)  # the fewest and the most steps of a working
NAMES = ("Anna", "Ben", "Carla", "David", "Emma", "Felix", "Grace", "Hugo", "Mia", "Noah", "Olga", "Tom")
THINGS = ("apples", "balls", "books", "cards", "flowers", "marbles", "nuts", "pencils", "shells", "stamps")


@dataclass(frozen=True)
class Fragment:
    """A sentence, and the steps it adds to the working.

    A step is an operand, an operator and an operand. `a` and `b` are the numbers in the sentence, `t` is the running
    total, `c` the result of the step before. The last step's result is the new total. A step without an operator sets
    the total and adds no line.
    """

    text: str
    steps: tuple[str, ...] = ()


@dataclass(frozen=True)
class Theme:
    """The fragments of a kind of story: an opening, up to `most_events` events, a question."""

    openings: tuple[Fragment, ...]
    events: tuple[Fragment, ...]
    questions: tuple[Fragment, ...]
    most_events: int = 2


THEMES = (
    Theme(  # possessions
        openings=(
            Fragment("{name} has {a} {things}.", ("a",)),
            Fragment("{name} has {a} bags with {b} {things} in each.", ("a*b",)),
            Fragment("{name} has {a} red {things} and {b} blue {things}.", ("a+b",)),
            Fragment(
                "{name} has {a} {things} and {friend} has {b} times as many. They put them together.", ("a*b", "a+c")
            ),
        ),
        events=(
            Fragment("{name} finds {a} more.", ("t+a",)),
            Fragment("{friend} gives {name} {a} more {things}.", ("t+a",)),
            Fragment("{name} buys {a} boxes of {b} {things}.", ("a*b", "t+c")),
            Fragment("{name} gives {a} {things} to {friend}.", ("t-a",)),
            Fragment("{name} loses {a} of them.", ("t-a",)),
            Fragment("{name} gives {a} {things} to each of {b} friends.", ("a*b", "t-c")),
            Fragment("{name} sells half of the {things}.", ("t/2",)),
        ),
        questions=(
            Fragment("How many {things} does {name} have now?"),
            Fragment("How many {things} are left?"),
            Fragment("{name} shares them equally among {a} friends. How many {things} does each friend get?", ("t/a",)),
            Fragment("{friend} has {a} times as many. How many {things} does {friend} have?", ("t*a",)),
            Fragment("{friend} has {a} fewer. How many {things} does {friend} have?", ("t-a",)),
        ),
    ),
    Theme(  # passengers
        openings=(
            Fragment("A train leaves with {a} people.", ("a",)),
            Fragment("A train has {a} cars with {b} people in each.", ("a*b",)),
        ),
        events=(
            Fragment("Then {a} people get on.", ("t+a",)),
            Fragment("Then {a} people get off.", ("t-a",)),
            Fragment("Then {a} groups of {b} people get on.", ("a*b", "t+c")),
            Fragment("Then half of the people get off.", ("t/2",)),
        ),
        questions=(
            Fragment("How many people are on the train now?"),
            Fragment("They sit in {a} equal rows. How many people are in each row?", ("t/a",)),
            Fragment("Each ticket costs {a} coins. How many coins do they pay?", ("t*a",)),
        ),
    ),
    Theme(  # money
        openings=(
            Fragment("{name} earns {a} coins a day for {b} days.", ("a*b",)),
            Fragment("{name} has {a} coins.", ("a",)),
        ),
        events=(
            Fragment("{name} buys {a} {things} for {b} coins each.", ("a*b", "t-c")),
            Fragment("{name} pays {a} coins for lunch.", ("t-a",)),
            Fragment("{friend} pays {name} {a} coins.", ("t+a",)),
            Fragment("{name} spends half of the coins.", ("t/2",)),
        ),
        questions=(
            Fragment("How many coins does {name} have left?"),
            Fragment("Pens cost {a} coins each. How many pens can {name} buy?", ("t/a",)),
        ),
    ),
    Theme(  # ages
        openings=(Fragment("{name} is {a} years old.", ("a",)),),
        events=(
            Fragment("{friend} is {a} times as old.", ("t*a",)),
            Fragment("{friend} is {a} years older.", ("t+a",)),
            Fragment("{friend} is {a} years younger.", ("t-a",)),
            Fragment("{friend} is half as old.", ("t/2",)),
        ),
        questions=(
            Fragment("How old will {friend} be in {a} years?", ("t+a",)),
            Fragment("How old was {friend} {a} years ago?", ("t-a",)),
        ),
        most_events=1,
    ),
)


def problems(count: int, seed: int = 0, split: Split = "train") -> list[dict[str, str]]:
    """`count` different problems, each `{"prompt": question and a newline, "completion": working and #### result}`.

    The same arguments give the same problems on every machine and Python version. A problem's split depends only on its
    working, not on the seed, so that no two splits share a chain of calculations.

    Raises:
        ValueError: for an unknown split.
    """
    if split not in ("train", "validation", "test"):
        raise ValueError(f"unknown split {split!r}; the playground has train, validation and test")
    rng = random.Random(seed)
    completions: dict[str, str] = {}
    while len(completions) < count:
        question, working = story(rng)
        if split_of(working) == split:
            completions.setdefault(question + "\n", working)
    return [{"prompt": prompt, "completion": completion} for prompt, completion in completions.items()]


def split_of(working: str) -> Split:
    """The split of a problem, by a checksum of its working: 1/16 validation, 1/16 test, the rest train."""
    checksum = zlib.crc32(working.encode()) % 16
    return "test" if checksum == 0 else "validation" if checksum == 1 else "train"


def story(rng: random.Random) -> tuple[str, str]:
    """A question and its working. A story whose numbers are too large, negative or not whole is drawn again."""
    while True:
        theme = pick(rng, THEMES)
        events = [pick(rng, theme.events) for _ in range(1 + int(rng.random() * theme.most_events))]
        fragments = [pick(rng, theme.openings), *events, pick(rng, theme.questions)]
        steps = sum(len(step) > 1 for fragment in fragments for step in fragment.steps)
        if not STEPS[0] <= steps <= STEPS[1] or len(set(events)) < len(events):
            continue
        name = pick(rng, NAMES)
        people = {"name": name, "friend": pick(rng, [friend for friend in NAMES if friend != name])}
        result = fill(rng, fragments, people | {"things": pick(rng, THINGS)})
        if result:
            return result


def fill(rng: random.Random, fragments: Sequence[Fragment], words: dict[str, str]) -> tuple[str, str] | None:
    """Fill in the fragments' slots and compute the working; None if no random numbers fit the total so far."""
    texts, working, total = [], [], 0
    for fragment in fragments:
        for _ in range(8):
            numbers = {slot: draw(rng, slot, fragment) for slot in "ab"}
            lines = work(fragment.steps, numbers | {"t": total})
            if lines is not None:
                break
        else:
            return None
        texts.append(fragment.text.format(**words, **numbers))
        working += [line for line, _ in lines if line]
        total = lines[-1][1] if lines else total
    return " ".join(texts), "\n".join([*working, f"#### {total}"])


def draw(rng: random.Random, slot: str, fragment: Fragment) -> int:
    """A number for a slot: 2 to 9 if it multiplies or divides, 10 to 60 if a story begins with it, else 2 to 20."""
    factor = any(slot in step and ("*" in step or "/" in step) for step in fragment.steps)
    low, high = (2, 9) if factor else (10, 60) if slot in fragment.steps else (2, 20)
    return number(rng, low, high)


def number(rng: random.Random, low: int, high: int) -> int:
    """A whole number from low to high, the same in every Python version."""
    return low + int(rng.random() * (high - low + 1))


def work(steps: Sequence[str], values: dict[str, int]) -> list[tuple[str, int]] | None:
    """Each step's line (empty if it only sets the total) and result; None if one is no whole number up to LARGEST.

    `values` holds the total `t` and the numbers `a` and `b`; any other operand is a number, as in "t/2".
    """
    values = dict(values)
    lines = []
    for step in steps:
        if len(step) == 1:
            lines.append(("", values[step]))
            continue
        left, operator, right = step
        x, y = values[left], values.get(right) or int(right)
        if operator == "/" and x % y:
            return None
        result = {"+": x + y, "-": x - y, "*": x * y, "/": x // y}[operator]
        if not 1 <= result <= LARGEST:
            return None
        lines.append((f"{x}{operator}{y}={result}", result))
        values["c"] = result
    return lines


def pick(rng: random.Random, items: Sequence[T]) -> T:
    """Draw one of the items. Only `random()` is guaranteed to draw the same in every Python version."""
    return items[int(rng.random() * len(items))]

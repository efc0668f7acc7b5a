r"""Final-answer accuracy: does a response end in the same number as the reference?

The final answer is what follows the last `####` (GSM8K) or the content of the last `\boxed{}` (MATH), whichever comes
later; without either it is the last number of the text. Numbers are compared by value: 1,000 is 1000.00, $5 is 5, 50%
is 50, and \frac{1}{2} is 0.5. A quantity is a number and its unit: 5 is 5 km, but 5 km is not 5 miles.

The parser is our own because math-verify takes 3:45 for 3:15, does not read −5, and does not end on 9**9**9.
"""

import re
from collections.abc import Sequence
from fractions import Fraction

from ..metric import Metric, Score
from .exact_match import normalize

SCALES = {"thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
LONGEST_NUMBER = 1000  # characters; a longer one is text

# A sign, unless it is a minus after a digit, a letter or a bracket (10-3); a currency; digits, with or without
# thousands separators and decimals, or decimals only; then a denominator, a power of ten or a scale.
_NUMBER = (
    r"(?P<sign>(?<![\w)\]])[-+]\s?)?(?:[$€£¥]\s?)?(?P<inner>(?<=[$€£¥])-)?"
    r"(?P<whole>\d{1,3}(?:,\d{3})+(?!,?\d)|\d+|(?=\.\d))(?P<part>\.\d+)?"
    r"(?:\s(?P<above>\d+)(?=/\d))?(?:\s?/\s?(?P<below>\d*[1-9]\d*)(?![\d./]))?"
    r"(?:[eE](?P<power>[-+]?\d{1,3})(?![\w.]))?(?:\s(?P<scale>thousand|million|billion|trillion)\b)?"
)
_OPERATOR = r"(?P<operator>(?<=\d)\s?[,:](?=\s?\d)|(?<=[\d)}])\s?[-+*/^=<>×÷·]|[-+*/^=<>×÷·](?=\s?[\d({]))"
_NUMBERS_AND_OPERATORS = re.compile(f"{_NUMBER}|{_OPERATOR}", re.IGNORECASE)
_PLACE = "\N{OBJECT REPLACEMENT CHARACTER}"  # of a number or an operator in a normalized text
_QUANTITY = re.compile(rf"{_PLACE}(?P<unit>[^{_PLACE}]*)")
_LAST = re.compile(rf"(?P<time>\d+(?::\d+)+)|{_NUMBER}", re.IGNORECASE)


class FinalAnswer(Metric):
    """The share of responses whose final answer is that of one of their references."""

    names = ("final_answer",)

    def score(self, responses: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, Score]:
        pairs = zip(responses, references, strict=True)
        correct = [100.0 * any(_same_answer(response, text) for text in texts) for response, texts in pairs]
        signature = r"mark:####,\boxed,last-number|compare:number|refs:any"
        return {"final_answer": Score.mean(correct, signature)}


def _same_answer(response: str, reference: str) -> bool:
    """Do two texts have the same final answer? Their marked answers are compared with units, other numbers without."""
    marked, other_marked = marked_answer(response), marked_answer(reference)
    if marked is not None and other_marked is not None:
        return equal(marked, other_marked)
    answer = parse_final_answer(response)
    return answer is not None and answer == parse_final_answer(reference)


def is_correct(response: str, references: Sequence[str]) -> bool:
    """Is the response's marked final answer that of one of the references?"""
    answer = marked_answer(response)
    answers = [marked_answer(reference) for reference in references]
    return answer is not None and any(other is not None and equal(answer, other) for other in answers)


def agree(response: str, reference: str) -> bool:
    """Do the two have the same marked final answer or, where the reference has none, are they equal as a whole?"""
    return equal(response, reference) if marked_answer(reference) is None else is_correct(response, [reference])


def equal(text: str, other: str) -> bool:
    """Are two texts equal, up to case, punctuation, white space and the notation of numbers?

    Quantities are equal if their numbers are, and their units, if both have one: 18.00 is 18, and $18 is 18 dollars.
    """
    key, other_key = _comparable(text), _comparable(other)
    if key == other_key:
        return _signs(text) == _signs(other) if key[0] else _letters(text) == _letters(other) != ""
    quantity, other_quantity = _quantity(*key), _quantity(*other_key)
    if quantity is None or other_quantity is None or quantity[0] != other_quantity[0]:
        return False
    return quantity[1] <= other_quantity[1] or other_quantity[1] <= quantity[1]


def _signs(text: str) -> list[str]:
    """The mathematical signs of a text without numbers, but no hyphens within words."""
    return [] if re.search(r"\d", text) else re.findall(r"[+*/^=<>]|(?<![^\W\d_])-(?=\w)", text)


def _letters(text: str) -> str:
    """A text that is an article or only punctuation, such as the choice (A)."""
    return re.sub(r"[\W_]+", "", text).casefold() or text.strip()


def marked_answer(text: str) -> str | None:
    r"""The line after the last `####`, or the content of the last `\boxed{}`, whichever is later; None without any."""
    mark, box = text.rfind("####"), _last_box(text)
    if box is not None and box[0] > mark:
        return re.sub(r"\\(?:text|mathrm|textbf|mbox)\s*\{([^{}]*)\}", r" \1", box[1])
    lines = text[mark + 4 :].strip().splitlines()
    if mark < 0 or not lines:
        return None
    return re.split(r"(?<=\d)\.\s(?=[A-Z])|(?<=\d)\s\((?=[a-z])", lines[0], maxsplit=1)[0]


def parse_final_answer(text: str) -> Fraction | str | None:
    """The final answer of a text: a number, or a marked answer that is more than a number; None without either."""
    answer = marked_answer(text)
    if answer is not None:
        quantity = _quantity(*_comparable(answer))
        if quantity is not None:
            return quantity[0]
        is_box = (_last_box(text) or (-1,))[0] > text.rfind("####")
        return "".join(answer.split()) if is_box or re.search(r"\d", answer) else None
    numbers = list(_LAST.finditer(_normalize_numbers(text)))
    if not numbers:
        return None
    last = numbers[-1]
    return _value(last) if last["time"] is None else re.sub(r"\b0+(?=\d)", "", last["time"])


def _comparable(text: str) -> tuple[str, tuple[Fraction | str, ...]]:
    """The normalized text with its numbers and operators replaced by places, and these numbers and operators."""
    values: list[Fraction | str] = []

    def take(match: re.Match[str]) -> str:
        values.append(match["operator"].strip() if match["operator"] else _value(match))
        return f" {_PLACE} "

    return normalize(_NUMBERS_AND_OPERATORS.sub(take, _normalize_numbers(text))), tuple(values)


def _quantity(text: str, values: tuple[Fraction | str, ...]) -> tuple[Fraction, frozenset[str]] | None:
    """The number and the words of the unit of a text that is a quantity, such as "18 dollars"; None for any other."""
    match = _QUANTITY.fullmatch(text)
    if match is None or not isinstance(values[0], Fraction):
        return None
    return values[0], frozenset(match["unit"].split())


def _value(match: re.Match[str]) -> Fraction | str:
    if len(match[0]) > LONGEST_NUMBER:
        return match[0]
    number = Fraction((match["whole"].replace(",", "") or "0") + (match["part"] or ""))
    if match["above"]:
        number += Fraction(int(match["above"]), int(match["below"] or 1))
    elif match["below"]:
        number /= int(match["below"])
    number *= Fraction(10) ** int(match["power"] or 0) * SCALES.get((match["scale"] or "").lower(), 1)
    return -number if match["inner"] or (match["sign"] or "").startswith("-") else number


def _normalize_numbers(text: str) -> str:
    """Write signs, thousands separators and fractions in one way, where TeX and Unicode have several."""
    text = re.sub(r"\\[dt]?frac\s*\{\s*(\d+)\s*\}\s*\{\s*(\d+)\s*\}", r"\1/\2", text)
    text = re.sub(r"\\[dt]?frac\s*(\d)\s*(\d)", r"\1/\2", text)
    text = re.sub(r"(?<=\d)(?:\{,\}|\\[,!:;]|[\u00a0\u202f\u2009])(?=\d{3}(?!\d))", ",", text)
    text = re.sub(r"[\u2212\uff0d\ufe63]|(?<![\w)\]])\u2013(?=[$€£¥]?[\d.])", "-", text)
    text = text.replace("\\$", "$").replace("\\!", "").replace("\\%", "%")
    text = re.sub(r"(?<=[\d}])\s*\\(?=(?:pi|sqrt|log|ln|sin|cos|tan|infty)\b)", "*", text)  # a factor is no unit
    return re.sub(r"(?<=\d)(?!e[-+]?\d)([^\W\d_])(?![^\W\d_])", r"*\1", text, flags=re.IGNORECASE)  # 12x is no 12


def _last_box(text: str) -> tuple[int, str] | None:
    r"""The position and content of the last \boxed{}, which may hold braces; one that is never closed is left out."""
    starts = {match.end(): match.start() for match in re.finditer(r"\\(?:boxed|fbox)\s*{", text)}
    if not starts:
        return None
    opened: list[int] = []
    last = None
    for brace in re.finditer(r"[{}]", text):
        if brace[0] == "{":
            opened.append(brace.end())
        elif opened and (start := opened.pop()) in starts and (last is None or starts[start] > last[0]):
            last = starts[start], text[start : brace.start()]
    return last

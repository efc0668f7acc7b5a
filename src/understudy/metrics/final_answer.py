r"""Final-answer accuracy: does a response end in the same number as the reference?

The final answer is the number after the last `####` (GSM8K) or the content of the last `\boxed{}` (MATH), whichever
comes later; without either it is the last number of the text. Numbers are compared by value: 1,000 is 1000.00, $5 is 5,
50% is 50, and \frac{1}{2} is 0.5.
"""

import re
from collections.abc import Iterator, Sequence
from fractions import Fraction

from ..metric import Metric, Score


class FinalAnswer(Metric):
    """The share of responses whose final answer is that of one of their references."""

    names = ("final_answer",)

    def score(self, responses: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, Score]:
        pairs = zip(map(parse_final_answer, responses), references, strict=True)
        correct = sum(answer is not None and answer in map(parse_final_answer, texts) for answer, texts in pairs)
        signature = r"mark:####,\boxed,last-number|compare:number|refs:any"
        return {"final_answer": Score(100 * correct / len(responses), signature)}


def final_answer(text: str) -> str | None:
    """The number after the last `####`, without thousands separators; None if there is none."""
    numbers = re.findall(r"####\s*\$?(-?\d[\d,]*(?:\.\d+)?)", text)
    return numbers[-1].replace(",", "") if numbers else None


def is_correct(response: str, references: Sequence[str]) -> bool:
    """Is the number after the response's last `####` that of one of the references?"""
    answer = final_answer(response)
    return answer is not None and answer in {final_answer(reference) for reference in references}


def parse_final_answer(text: str) -> Fraction | str | None:
    """The final answer of a text: a number, or the formula of a box that is more than a number; None without either."""
    text = _normalize_numbers(text)
    boxes = list(_boxes(text))
    marks = [(match.start(), match) for match in re.finditer(rf"####[^\S\n]*{_NUMBER}", text)]
    if marks and (not boxes or marks[-1][0] > boxes[-1][0]):
        return _value(marks[-1][1])
    if boxes:
        content = re.sub(r"\\(?:text|mathrm|textbf|mbox)\s*\{([^{}]*)\}", r" \1", boxes[-1][1])
        number = re.fullmatch(rf"\s*{_NUMBER}\s*(?:\\?%|°|(?<=\s)[A-Za-z ]+)?[\s.]*", content)  # with its unit
        return _value(number) if number else "".join(content.split())
    numbers = list(re.finditer(_NUMBER, text))
    return _value(numbers[-1]) if numbers else None


# A sign, unless it is a minus after a digit, a letter or a bracket (10-3); a currency; digits, with or without
# thousands separators and decimals, or decimals only; optionally a denominator.
_NUMBER = (
    r"(?P<sign>(?<![\w)\]])-\s?)?[$€£¥]?\s?(?P<inner>(?<=[$€£¥])-)?"
    r"(?P<whole>\d{1,3}(?:,\d{3})+(?!\d)|\d+|(?=\.\d))(?P<part>\.\d+)?(?:\s?/\s?(?P<below>\d*[1-9]\d*)(?![\d./]))?"
)


def _value(match: re.Match[str]) -> Fraction:
    number = Fraction((match["whole"].replace(",", "") or "0") + (match["part"] or ""))
    number = number / int(match["below"]) if match["below"] else number
    return -number if match["sign"] or match["inner"] else number


def _normalize_numbers(text: str) -> str:
    """Write signs, thousands separators and fractions in one way, where TeX and Unicode have several."""
    text = re.sub(r"\\[dt]?frac\s*\{\s*(\d+)\s*\}\s*\{\s*(\d+)\s*\}", r"\1/\2", text)
    text = re.sub(r"(?<=\d)(?:\{,\}|\\[,!:;]|[\u00a0\u202f\u2009])(?=\d{3}(?!\d))", ",", text)
    return text.replace("\u2212", "-").replace("\\$", "$").replace("\\!", "")


def _boxes(text: str) -> Iterator[tuple[int, str]]:
    r"""The position and content of each \boxed{}, which may hold braces; one that is never closed is left out."""
    for match in re.finditer(r"\\(?:boxed|fbox)\s*{", text):
        depth = 1
        for end in range(match.end(), len(text)):
            depth += {"{": 1, "}": -1}.get(text[end], 0)
            if depth == 0:
                yield match.start(), text[match.end() : end]
                break

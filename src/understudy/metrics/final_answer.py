r"""Final-answer accuracy: is the number that an answer ends in the reference's?

The one idea: a convention that is followed counts for more than a guess. The answer is what stands behind the last
`####` (GSM8K) or in the last `\boxed{}` (MATH), whichever comes later, and only where there is neither the last number
of the text. Numbers are compared as numbers: 1,000 is 1000.00, $5 is 5, 50% is 50, ½ as \frac{1}{2} is 0.5.
"""

import re
from collections.abc import Iterator, Sequence
from fractions import Fraction

from ..metric import Metric, Score


class FinalAnswer(Metric):
    """The share of answers that end in the final answer of one of their references."""

    names = ("final_answer",)

    def score(self, answers: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, Score]:
        found = [stated(answer) for answer in answers]
        right = sum(
            answer is not None and answer in map(stated, each) for answer, each in zip(found, references, strict=True)
        )
        signature = r"mark:####,\boxed,last-number|compare:number|refs:any"
        return {"final_answer": Score(100 * right / len(answers), signature)}


def final_answer(text: str) -> str | None:
    """The number after the last `####`, without thousands separators; None if there is none."""
    found = re.findall(r"####\s*\$?(-?\d[\d,]*(?:\.\d+)?)", text)
    return found[-1].replace(",", "") if found else None


def is_correct(answer: str, references: Sequence[str]) -> bool:
    """Does the answer end, behind `####`, in the final answer of one of the references?"""
    found = final_answer(answer)
    return found is not None and found in {final_answer(reference) for reference in references}


def stated(text: str) -> Fraction | str | None:
    """What the text says in the end: a number, or the formula of a box that holds none alone; None for neither."""
    text = _plain(text)
    boxes = list(_boxes(text))
    marks = [(match.start(), match) for match in re.finditer(rf"####[^\S\n]*{_NUMBER}", text)]
    if marks and (not boxes or marks[-1][0] > boxes[-1][0]):
        return _value(marks[-1][1])
    if boxes:
        content = re.sub(r"\\(?:text|mathrm|textbf|mbox)\s*\{([^{}]*)\}", r" \1", boxes[-1][1])
        whole = re.fullmatch(rf"\s*{_NUMBER}\s*(?:\\?%|°|(?<=\s)[A-Za-z ]+)?[\s.]*", content)  # a number and its unit
        return _value(whole) if whole else "".join(content.split())
    numbers = list(re.finditer(_NUMBER, text))
    return _value(numbers[-1]) if numbers else None


# A sign, which is none behind a digit, a letter or a bracket (10-3); a currency; digits, in thousands or not, with
# decimals or without, or decimals alone; perhaps a denominator.
_NUMBER = (
    r"(?P<sign>(?<![\w)\]])-\s?)?[$€£¥]?\s?(?P<inner>(?<=[$€£¥])-)?"
    r"(?P<whole>\d{1,3}(?:,\d{3})+(?!\d)|\d+|(?=\.\d))(?P<part>\.\d+)?(?:\s?/\s?(?P<below>\d*[1-9]\d*)(?![\d./]))?"
)


def _value(match: re.Match[str]) -> Fraction:
    number = Fraction((match["whole"].replace(",", "") or "0") + (match["part"] or ""))
    number = number / int(match["below"]) if match["below"] else number
    return -number if match["sign"] or match["inner"] else number


def _plain(text: str) -> str:
    """One way of writing signs, separators of thousands and fractions, where TeX and Unicode know several."""
    text = re.sub(r"\\[dt]?frac\s*\{\s*(\d+)\s*\}\s*\{\s*(\d+)\s*\}", r"\1/\2", text)
    text = re.sub(r"(?<=\d)(?:\{,\}|\\[,!:;]|[\u00a0\u202f\u2009])(?=\d{3}(?!\d))", ",", text)
    return text.replace("\u2212", "-").replace("\\$", "$").replace("\\!", "")


def _boxes(text: str) -> Iterator[tuple[int, str]]:
    r"""Where each \boxed{} stands and what is in it, braces and all; those never closed are left out."""
    for match in re.finditer(r"\\(?:boxed|fbox)\s*{", text):
        depth = 1
        for end in range(match.end(), len(text)):
            depth += {"{": 1, "}": -1}.get(text[end], 0)
            if depth == 0:
                yield match.start(), text[match.end() : end]
                break

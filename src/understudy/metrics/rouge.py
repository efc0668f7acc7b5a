"""ROUGE-1, -2 and -L (Lin, 2004): F1 of words, word pairs and the longest common subsequence, by rouge-score.

Words are runs of the letters a to z and digits, lower case, stemmed by Porter's rules, so that ROUGE is for English.
Of several references the best counts, for each number on its own; the corpus's number is the mean over its answers.
"""

from collections.abc import Sequence
from importlib.metadata import version

from ..metric import Metric, Score


class Rouge(Metric):
    """The three numbers that the distillation papers report on instructions (ROUGE-L) and summaries."""

    names = ("rouge_1", "rouge_2", "rouge_l")

    def score(self, answers: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, Score]:
        from rouge_score.rouge_scorer import RougeScorer

        kinds = {"rouge_1": "rouge1", "rouge_2": "rouge2", "rouge_l": "rougeL"}
        scorer = RougeScorer(list(kinds.values()), use_stemmer=True)
        each = [scorer.score_multi(right, answer) for answer, right in zip(answers, references, strict=True)]
        return {
            name: Score(
                100 * sum(float(scores[kind].fmeasure) for scores in each) / len(each),
                f"{kind}|measure:f1|stemmer:porter|refs:best|rouge-score:{version('rouge-score')}",
            )
            for name, kind in kinds.items()
        }

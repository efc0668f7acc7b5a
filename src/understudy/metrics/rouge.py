"""ROUGE-1, -2 and -L (Lin, 2004): F1 of words, word pairs and the longest common subsequence, by rouge-score.

Words are runs of the letters a to z and digits, in lower case and with Porter's stems, so ROUGE is for English. Of
several references the best counts, for each number separately; the corpus's number is the mean over the responses.
"""

from collections.abc import Sequence
from importlib.metadata import version

from ..metric import Metric, Score


class Rouge(Metric):
    """ROUGE-1, ROUGE-2 and ROUGE-L, which distillation papers report on instructions and summaries."""

    names = ("rouge_1", "rouge_2", "rouge_l")

    def score(self, responses: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, Score]:
        from rouge_score.rouge_scorer import RougeScorer

        kinds = {"rouge_1": "rouge1", "rouge_2": "rouge2", "rouge_l": "rougeL"}
        scorer = RougeScorer(list(kinds.values()), use_stemmer=True)
        results = [scorer.score_multi(texts, response) for response, texts in zip(responses, references, strict=True)]
        return {
            name: Score.mean(
                [100 * float(scores[kind].fmeasure) for scores in results],
                f"{kind}|measure:f1|stemmer:porter|refs:best|rouge-score:{version('rouge-score')}",
            )
            for name, kind in kinds.items()
        }

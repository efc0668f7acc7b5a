"""BLEU (Papineni et al., ACL 2002) and chrF (Popović, WMT 2015) of the whole corpus, by sacrebleu.

BLEU counts words as sacrebleu's 13a tokenizer cuts them, case included, with exponential smoothing; chrF counts
sequences of up to six characters, β = 2. The signatures say so.
"""

from collections.abc import Sequence
from itertools import zip_longest

from ..metric import Metric, Score


class Bleu(Metric):
    """Both numbers, with as many references as each answer has."""

    names = ("bleu", "chrf")

    def score(self, answers: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, Score]:
        from sacrebleu.metrics import BLEU, CHRF

        columns = list(zip_longest(*references))  # the first references, the second ones, … with None where none is
        scores = {}
        for name, metric in (("bleu", BLEU()), ("chrf", CHRF())):
            value = metric.corpus_score(list(answers), columns).score
            scores[name] = Score(value, str(metric.get_signature()))
        return scores

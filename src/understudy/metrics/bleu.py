"""BLEU (Papineni et al., ACL 2002) and chrF (Popović, WMT 2015) of a corpus, by sacrebleu.

BLEU counts words of sacrebleu's 13a tokenizer, is case-sensitive and smoothed exponentially; chrF counts sequences of
up to six characters, β = 2. The signatures are sacrebleu's own.
"""

from collections.abc import Sequence
from itertools import zip_longest

from ..metric import Metric, Score


class Bleu(Metric):
    """Corpus BLEU and chrF; the number of references may differ from response to response."""

    names = ("bleu", "chrf")

    def score(self, responses: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, Score]:
        from sacrebleu.metrics import BLEU, CHRF

        columns = list(zip_longest(*references))  # all first references, all second ones, …; None where there is none
        scores = {}
        for name, metric in (("bleu", BLEU()), ("chrf", CHRF())):
            value = metric.corpus_score(list(responses), columns).score
            scores[name] = Score(value, str(metric.get_signature()))
        return scores

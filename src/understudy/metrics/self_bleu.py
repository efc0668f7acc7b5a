"""Self-BLEU (Zhu et al., SIGIR 2018, https://arxiv.org/abs/1802.01886): how similar several responses to a prompt are.

The mean sentence BLEU of each response against the other responses to its prompt: 100 for a model that always generates
the same, less for more diverse responses.
"""

from collections.abc import Sequence

from ..metric import Metric, Score


class SelfBleu(Metric):
    """The mean BLEU of a response against the other responses to its prompt: low for diverse responses."""

    names = ("self_bleu",)
    compares_responses = True

    def score(self, responses: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, Score]:
        from sacrebleu.metrics import BLEU

        bleu = BLEU(effective_order=True)
        values = [bleu.sentence_score(text, texts).score for text, texts in zip(responses, references, strict=True)]
        return {"self_bleu": Score.mean(values, str(bleu.get_signature()))}

"""Self-BLEU (Zhu et al., SIGIR 2018, https://arxiv.org/abs/1802.01886): how alike several answers to a prompt are.

Every answer is compared with the others to the same prompt by the BLEU of sentences, and the mean is taken: 100 for a
model that always says the same, less the more diverse its answers are.
"""

from collections.abc import Sequence

from ..metric import Metric, Score


class SelfBleu(Metric):
    """The mean BLEU of an answer against the others to its prompt. Low is diverse, whether good or bad."""

    names = ("self_bleu",)
    compares_responses = True

    def score(self, answers: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, Score]:
        from sacrebleu.metrics import BLEU

        bleu = BLEU(effective_order=True)
        values = [bleu.sentence_score(answer, others).score for answer, others in zip(answers, references, strict=True)]
        return {"self_bleu": Score(sum(values) / len(values), str(bleu.get_signature()))}

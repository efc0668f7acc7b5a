"""DPKD: Direct Preference Knowledge Distillation (Li et al., 2024, https://arxiv.org/abs/2406.19774).

Stage one gives the student an implicit reward: max_q E_q[r(y|x)] − β KL(q‖p) is solved by q* ∝ p exp(r/β), so that

    r(x, y) = β log(q(y|x)/p(y|x)) + β log Z(x),                      the teacher being the reference.

Stage two prefers the teacher's output y_t to the student's y_s (Bradley–Terry); Z cancels, and both stages combine to

    L = −log σ( β log q(y_t)/p(y_t) − β log q(y_s)/p(y_s) )                                            (Eq. 8)
    u = β/|y_t| log q(y_t)/p(y_t) − β/|y_s| log q(y_s)/p(y_s),   L = −log σ(u)                          (Eq. 9, used)
    total = L + λ E_{d~corpus}[ −log q(d) ]                                                            (Algorithm 1)

Stage one is a definition rather than a step: with the student's own implicit reward in the place of r its two terms
cancel, E_q[β log(q/p)] = β KL(q‖p), whatever the student is. What it adds to training is its reverse KL on the
student's outputs, an option here (`reverse_kl_weight`); with a reward of your own, stage one is `gkd` with a reward
and divergence reverse_kl, α = β/(1+β).

Both outputs are ids, sampled at temperature 1 and not differentiated. The gradient is
−β σ(−u) (∇log q(y_t)/|y_t| − ∇log q(y_s)/|y_s|): the weight grows where the student is wrong. Eqs. 11, 28 and 30 of the
paper print the sigmoid's argument with the opposite sign, against their own prose; here the derivative is autograd's.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from copy import copy
from dataclasses import dataclass, replace
from hashlib import blake2b
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from ..batch import Author, Batch, Example, Reduction
from ..divergences import ReverseKL
from ..method import EvaluatedPart, Method, MethodContext, from_all_processes
from ..rollout import Writers, with_response
from ..scores import Scores
from ..step import Step
from ..teacher import Capability, Teacher

Preference = Literal["dpo", "ipo", "cpo", "simpo", "dpop"]
Draw = tuple[int, int]  # a digest of a row and its prompt; how often the row was drawn before in the same step


class Stored(NamedTuple):
    """A student's response that is used again."""

    step: int  # that generated it
    tokens: list[int]
    truncated: bool


@dataclass
class DPKD(Method):
    """Preference of the teacher's responses over the student's own, with the implicit reward β log(q/p)."""

    paper: ClassVar[str] = "Li et al., 2024, https://arxiv.org/abs/2406.19774"
    late_weights: ClassVar[bool] = True  # σ(−u) depends on all tokens of both responses
    uses_corpus: ClassVar[bool] = True

    beta: float = 0.1
    level: Literal["sequence", "token"] = "sequence"  # token: argmax pairs on teacher responses, the released script
    length_normalized: bool = True  # Eq. 9; False is Eq. 8
    preference: Preference = "dpo"
    lm_weight: float = 0.5  # λ, of the corpus, if there is one
    sft_weight: float = 0.0  # of −log q(y_t); L has weight 1 − sft_weight; 0.5 in the released script
    reverse_kl_weight: float = 0.0  # of stage one's KL(q‖p), a mean over the tokens of the student's response
    label_smoothing: float = 0.0  # ε, the probability that winner and loser of a pair are swapped
    reference_free: bool = False  # without the teacher's log-probabilities
    margin: float = 0.0  # γ of simpo
    penalty: float = 50.0  # λ of dpop
    refresh: int = 1  # steps after which a row's student response is generated again; 0: never
    reduction: ClassVar[Reduction] = "pair"

    def __post_init__(self) -> None:
        if not self.beta > 0:
            raise ValueError(f"dpkd needs beta above 0, not {self.beta}")
        if not 0 <= self.sft_weight < 1 or not 0 <= self.label_smoothing < 0.5:
            raise ValueError("dpkd needs sft_weight in [0, 1) and label_smoothing in [0, 0.5)")
        if self.reverse_kl_weight and self.level == "token":
            raise ValueError("dpkd's reverse_kl_weight is of the student's responses, and level: token has none")
        self._corpus: Sequence[Example] = ()  # texts of the language-modelling loss, their first token as the prompt
        self._responses: dict[Draw, list[Stored]] = {}  # the student's n responses, the same on all processes

    @property
    def requires(self) -> frozenset[Capability]:
        if self.level == "token":
            return frozenset({Capability.FULL})
        return frozenset({Capability.CHOSEN, *([Capability.TOP_K] if self.reverse_kl_weight else [])})

    @property
    def authors(self) -> frozenset[Author]:
        return frozenset({"teacher"} if self.level == "token" else {"teacher", "student"})

    def setup(self, context: MethodContext) -> Teacher | None:
        self._corpus = context.corpus
        return context.teacher

    def collect(self, examples: list[Example], writers: Writers, step: Step) -> list[Example]:
        winners = [replace(e, pair=i) for i, e in enumerate(writers.teacher(examples, step))]
        if self.level == "token":
            return winners + self._texts(winners, step)
        losers = [replace(e, pair=i) for i, e in enumerate(self._student_responses(examples, writers, step))]
        pairs = [e for pair in zip(winners, losers, strict=True) for e in pair]
        return pairs + self._texts(winners, step)

    def _student_responses(self, examples: list[Example], writers: Writers, step: Step) -> list[Example]:
        if self.refresh == 1:
            return writers.student(examples, step)
        draws = _draws(examples)
        stale = {draw: e for draw, e in zip(draws, examples, strict=True) if self._is_stale(draw, step)}
        responses = writers.student(list(stale.values()), step)
        n = writers.student.sampling.n
        generated = [
            (draw, [Stored(step.number, e.response, e.truncated) for e in responses[i * n : (i + 1) * n]])
            for i, draw in enumerate(stale)
        ]
        self._responses |= dict(from_all_processes(generated))
        return [
            with_response(e, stored.tokens, "student", stored.truncated)
            for draw, e in zip(draws, examples, strict=True)
            for stored in self._responses[draw]
        ]

    def _is_stale(self, draw: Draw, step: Step) -> bool:
        stored = self._responses.get(draw)
        return stored is None or (self.refresh > 0 and step.number - stored[0].step >= self.refresh)

    def _texts(self, winners: list[Example], step: Step) -> list[Example]:
        """A random text of the corpus for each pair, keyed by the step, the row and how often it was drawn."""
        if not self._corpus or not self.lm_weight:
            return []
        turns = zip(winners, _turns(e.row for e in winners), strict=True)
        shares = [step.uniform("corpus", e.row, turn) for e, turn in turns]
        return [replace(self._corpus[int(x * len(self._corpus))], author="corpus", pair=-1) for x in shares]

    def evaluated_parts(self) -> list[EvaluatedPart]:
        """Evaluation generates new responses, and leaves those of training as they are."""
        method = copy(self)
        method.refresh = 1
        return [EvaluatedPart(method)]

    def loss(self, teacher: Scores, student: Scores, batch: Batch) -> Tensor:
        """The loss of each pair, and after them the language-modelling loss of each text of the corpus."""
        means = batch.per_sequence(student.chosen) / batch.lengths
        winners = [i for i, e in enumerate(batch.examples) if e.author == "teacher"]
        texts = [i for i, e in enumerate(batch.examples) if e.author == "corpus"]
        if self.level == "token":
            value = self._token_level(teacher, student, batch)[winners]
        else:
            losers = self._losers(batch, winners)
            value = self._pairwise(teacher.chosen, student.chosen, batch, winners, losers)
            if self.reverse_kl_weight:
                divergence = teacher.divergence_to(student, ReverseKL())
                value = value + self.reverse_kl_weight * (batch.per_sequence(divergence) / batch.lengths)[losers]
        if self.sft_weight:
            value = (1 - self.sft_weight) * value - self.sft_weight * means[winners]
        return torch.cat([value, -self.lm_weight * means[texts]])

    def metrics(self, teacher: Scores, student: Scores, batch: Batch) -> dict[str, Tensor]:
        """The implicit rewards β/|y| log(q(y)/p(y)) of both responses, and which of the two the student prefers."""
        if self.level == "token":
            return {}
        winners = [i for i, e in enumerate(batch.examples) if e.author == "teacher"]
        losers = self._losers(batch, winners)
        log_ratio = student.chosen - teacher.chosen.to(student.chosen)
        rewards = self.beta * batch.per_sequence(log_ratio) / batch.lengths
        margin = rewards[winners] - rewards[losers]
        return {
            "teacher_reward": rewards[winners],
            "student_reward": rewards[losers],
            "margin": margin,
            "preference_accuracy": (margin > 0).float(),
            "teacher_length": batch.lengths[winners],
            "student_length": batch.lengths[losers],
        }

    @staticmethod
    def _losers(batch: Batch, winners: list[int]) -> list[int]:
        """The student's response of each winner's pair."""
        by_pair = {e.pair: i for i, e in enumerate(batch.examples) if e.author == "student"}
        return [by_pair[batch.examples[i].pair] for i in winners]

    def _pairwise(self, log_p: Tensor, log_q: Tensor, batch: Batch, winners: list[int], losers: list[int]) -> Tensor:
        """(P,) the preference loss of each pair, from the chosen tokens' log-probabilities (N,) of both models."""
        p, q = batch.per_sequence(log_p.to(log_q)), batch.per_sequence(log_q)
        if self.length_normalized:
            p, q = p / batch.lengths, q / batch.lengths
        if self.reference_free or self.preference in ("cpo", "simpo"):
            p = torch.zeros_like(p)
        return self.preference_loss(p[winners], q[winners], p[losers], q[losers])

    def preference_loss(self, p_t: Tensor, q_t: Tensor, p_s: Tensor, q_s: Tensor) -> Tensor:
        """The preference loss, elementwise, of log-probabilities of winner (t) and loser (s) under teacher and student.

        dpo    −log σ(β h),  h = (log q_t − log p_t) − (log q_s − log p_s), with label smoothing ε:
               −(1−ε) log σ(β h) − ε log σ(−β h)
        ipo    (h − 1/(2β))²
        cpo    −log σ(β (log q_t − log q_s)) − log q_t
        simpo  −log σ(β (log q_t − log q_s) − γ)
        dpop   −log σ(β (h − λ max(0, log p_t − log q_t)))
        """
        h = (q_t - p_t) - (q_s - p_s)
        if self.preference == "ipo":
            return (h - 1 / (2 * self.beta)) ** 2
        if self.preference == "dpop":
            h = h - self.penalty * (p_t - q_t).clamp(min=0)
        u = self.beta * h - (self.margin if self.preference == "simpo" else 0)
        value = -(1 - self.label_smoothing) * logsigmoid(u) - self.label_smoothing * logsigmoid(-u)
        return value - q_t if self.preference == "cpo" else value

    def _token_level(self, teacher: Scores, student: Scores, batch: Batch) -> Tensor:
        """(B,) means of −log σ(β [log q(t)/q(s) − log p(t)/p(s)]) over tokens, t and s the models' likeliest tokens."""
        log_q, log_p = student.log_probs, teacher.log_probs
        log_p = log_p.to(log_q)[:, : log_q.shape[-1]]
        t, s = log_p.argmax(-1, keepdim=True), log_q.argmax(-1, keepdim=True)

        def take(log_probs: Tensor, index: Tensor) -> Tensor:
            return log_probs.gather(-1, index)[:, 0]

        value = self.preference_loss(take(log_p, t), take(log_q, t), take(log_p, s), take(log_q, s))
        return batch.per_sequence(value) / batch.lengths

    def state_dict(self) -> dict[str, Tensor]:
        """The student's responses that will be used again, of all processes."""
        stored = [(draw, one) for draw, several in self._responses.items() for one in several]
        if not stored:
            return {}
        heads = [[*draw, one.step, len(one.tokens), one.truncated] for draw, one in stored]
        return {
            "responses": torch.tensor(heads),
            "tokens": torch.tensor([token for _, one in stored for token in one.tokens]),
        }

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self._responses = {}
        if not state:
            return
        tokens, end = state["tokens"].tolist(), 0
        for row, turn, step, length, truncated in state["responses"].tolist():
            start, end = end, end + length
            self._responses.setdefault((row, turn), []).append(Stored(step, tokens[start:end], bool(truncated)))


def _draws(examples: list[Example]) -> list[Draw]:
    """What identifies each example: its row and prompt, and how often it was drawn before in the same step."""
    rows = [_digest(e) for e in examples]
    return list(zip(rows, _turns(rows), strict=True))


def _digest(example: Example) -> int:
    """63 bits of a row and its prompt, because rows need not be numbered."""
    content = repr((example.row, list(example.prompt))).encode()
    return int.from_bytes(blake2b(content, digest_size=8).digest(), "little") >> 1


def _turns(rows: Iterable[int]) -> list[int]:
    """For each row, how often it has occurred before."""
    count: Counter[int] = Counter()
    turns = []
    for row in rows:
        turns.append(count[row])
        count[row] += 1
    return turns

"""DPKD: Direct Preference Knowledge Distillation (Li et al., 2024, https://arxiv.org/abs/2406.19774).

Stage one gives the student an implicit reward: max_q E_q[r(y|x)] − β KL(q‖p) is solved by q* ∝ p exp(r/β), so that

    r(x, y) = β log(q(y|x)/p(y|x)) + β log Z(x),                      the teacher being the reference.

Stage two prefers the teacher's output y_t to the student's y_s (Bradley–Terry); Z cancels, and the two stages meet in

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

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from ..batch import Author, Batch, Example, Reduction
from ..divergences import ReverseKL
from ..method import Method
from ..rollout import Writers
from ..scores import Knowledge, Scores
from ..step import Step

Preference = Literal["dpo", "ipo", "cpo", "simpo", "dpop"]


@dataclass
class DPKD(Method):
    """Preference of the teacher's answers over the student's own, with the implicit reward β log(q/p)."""

    paper: ClassVar[str] = "Li et al., 2024, https://arxiv.org/abs/2406.19774"

    beta: float = 0.1
    level: Literal["sequence", "token"] = (
        "sequence"  # token: argmax pairs on the teacher's answers, the released script
    )
    length_normalized: bool = True  # Eq. 9; False is Eq. 8
    preference: Preference = "dpo"
    lm_weight: float = 0.5  # λ, of the corpus, if there is one
    sft_weight: float = 0.0  # of −log q(y_t), in place of as much of L; 0.5 in the released script
    reverse_kl_weight: float = 0.0  # of stage one's KL(q‖p), a mean over the tokens of the student's answer
    label_smoothing: float = 0.0  # the probability that a pair is the wrong way round
    reference_free: bool = False  # without the teacher's log-probabilities
    margin: float = 0.0  # γ of simpo
    penalty: float = 50.0  # λ of dpop
    refresh: int = 1  # a row's student answer is written anew when older than so many steps; 0: never
    reduction: Reduction = "sequence"

    def __post_init__(self) -> None:
        self.corpus: Sequence[Example] = ()  # texts of the language-modelling loss, their first token as the prompt
        if not self.beta > 0:
            raise ValueError(f"dpkd needs beta above 0, not {self.beta}")
        if not 0 <= self.sft_weight < 1 or not 0 <= self.label_smoothing < 0.5:
            raise ValueError("dpkd needs sft_weight in [0, 1) and label_smoothing in [0, 0.5)")
        if self.reverse_kl_weight and self.level == "token":
            raise ValueError("dpkd's reverse_kl_weight is of the student's answers, which level: token does without")
        self._own: dict[Any, tuple[int, Example]] = {}  # prompt → the step its student answer was written at, and it

    @property
    def needs(self) -> Knowledge:
        whole = self.level == "token" or self.reverse_kl_weight
        return Knowledge.DISTRIBUTION if whole else Knowledge.CHOSEN

    @property
    def authors(self) -> frozenset[Author]:
        return frozenset({"teacher"} if self.level == "token" else {"teacher", "student"})

    @property
    def watched(self) -> tuple[str, ...]:
        rewards = ("teacher_reward", "student_reward", "margin", "preference_accuracy")
        return () if self.level == "token" else (*rewards, "teacher_length", "student_length")

    def collect(self, examples: list[Example], writers: Writers, step: Step) -> list[Example]:
        taught = writers.teacher(examples, step)
        if self.level == "token":
            return taught + self._texts(len(examples), step)
        own = self._own_answers(examples, writers, step)
        pairs = [replace(e, pair=i) for i, two in enumerate(zip(taught, own, strict=True)) for e in two]
        return pairs + self._texts(len(examples), step)

    def _own_answers(self, examples: list[Example], writers: Writers, step: Step) -> list[Example]:
        if self.refresh == 1:
            return writers.student(examples, step)
        old = [e for e in examples if _key(e) not in self._own or self._stale(e, step)]
        for answer in writers.student(old, step) if old else []:
            self._own[_key(answer)] = step.number, answer
        return [self._own[_key(e)][1] for e in examples]

    def _stale(self, example: Example, step: Step) -> bool:
        return self.refresh > 0 and step.number - self._own[_key(example)][0] >= self.refresh

    def _texts(self, count: int, step: Step) -> list[Example]:
        """As many texts of the corpus as there are prompts, drawn by the step."""
        if not self.corpus or not self.lm_weight:
            return []
        at = (step.stream(count, "corpus") * len(self.corpus)).long().tolist()
        return [replace(self.corpus[i], author="corpus", pair=-1) for i in at]

    def units(self, batch: Batch) -> int:
        return sum(e.author == "teacher" for e in batch.examples)

    def loss(self, student: Scores, teacher: Scores, batch: Batch) -> Tensor:
        """(B,) each sequence's part: pairs' values stand at their winners, the corpus' at its texts."""
        means = batch.per_sequence(student.chosen) / batch.lengths
        winners = [i for i, e in enumerate(batch.examples) if e.author == "teacher"]
        texts = [i for i, e in enumerate(batch.examples) if e.author == "corpus"]
        if self.level == "token":
            value = self._tokenwise(student, teacher, batch)[winners]
        else:
            losers = self._losers(batch, winners)
            value = self._pairwise(student.chosen, teacher.chosen, batch, winners, losers)
            if self.reverse_kl_weight:
                divergence = ReverseKL().between(teacher, student)
                value = value + self.reverse_kl_weight * (batch.per_sequence(divergence) / batch.lengths)[losers]
        if self.sft_weight:
            value = (1 - self.sft_weight) * value - self.sft_weight * means[winners]
        return torch.cat([value, -self.lm_weight * means[texts]])

    def observe(self, student: Scores, teacher: Scores, batch: Batch) -> dict[str, Tensor]:
        """The implicit rewards β/|y| log(q(y)/p(y)) of both answers, and which of the two the student prefers."""
        if self.level == "token":
            return {}
        winners = [i for i, e in enumerate(batch.examples) if e.author == "teacher"]
        losers = self._losers(batch, winners)
        log_ratio = student.chosen - teacher.chosen.to(student.chosen)
        rewards = self.beta * batch.per_sequence(log_ratio) / batch.lengths
        margin = rewards[winners] - rewards[losers]
        values = (rewards[winners], rewards[losers], margin, (margin > 0).float())
        return dict(zip(self.watched, (*values, batch.lengths[winners], batch.lengths[losers]), strict=True))

    @staticmethod
    def _losers(batch: Batch, winners: list[int]) -> list[int]:
        """The student's answer of each winner's pair."""
        of = {e.pair: i for i, e in enumerate(batch.examples) if e.author == "student"}
        return [of[batch.examples[i].pair] for i in winners]

    def _pairwise(self, log_q: Tensor, log_p: Tensor, batch: Batch, winners: list[int], losers: list[int]) -> Tensor:
        """(P,) the preference loss of each pair, from the chosen tokens' log-probabilities (N,) of both models."""
        q, p = batch.per_sequence(log_q), batch.per_sequence(log_p.to(log_q))
        if self.length_normalized:
            q, p = q / batch.lengths, p / batch.lengths
        if self.reference_free or self.preference in ("cpo", "simpo"):
            p = torch.zeros_like(p)
        return self.prefer(q[winners], p[winners], q[losers], p[losers])

    def prefer(self, q_t: Tensor, p_t: Tensor, q_s: Tensor, p_s: Tensor) -> Tensor:
        """The preference loss, elementwise, of log-probabilities of winner (t) and loser (s) under student and teacher.

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

    def _tokenwise(self, student: Scores, teacher: Scores, batch: Batch) -> Tensor:
        """(B,) means of −log σ(β [log q(t)/q(s) − log p(t)/p(s)]) over tokens, t and s the models' likeliest tokens."""
        log_q, log_p = student.log_probs, teacher.log_probs
        log_p = log_p.to(log_q)[:, : log_q.shape[-1]]
        t, s = log_p.argmax(-1, keepdim=True), log_q.argmax(-1, keepdim=True)

        def at(log_probs: Tensor, index: Tensor) -> Tensor:
            return log_probs.gather(-1, index)[:, 0]

        value = self.prefer(at(log_q, t), at(log_p, t), at(log_q, s), at(log_p, s))
        return batch.per_sequence(value) / batch.lengths

    def state_dict(self) -> dict[str, Tensor]:
        """Student answers that are to be used again."""
        if self.refresh == 1 or not self._own:
            return {}
        kept = [(e.row, at, e) for at, e in self._own.values()]
        return {
            "rows": torch.tensor([[row, at, len(e.response), e.truncated] for row, at, e in kept]),
            "responses": torch.tensor([token for *_, e in kept for token in e.response]),
            "prompts": torch.tensor([token for *_, e in kept for token in e.prompt]),
            "prompt_lengths": torch.tensor([len(e.prompt) for *_, e in kept]),
        }

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        if not state:
            return
        responses, prompts = state["responses"].tolist(), state["prompts"].tolist()
        for (row, at, length, cut), prompt in zip(
            state["rows"].tolist(), state["prompt_lengths"].tolist(), strict=True
        ):
            answer = Example(prompts[:prompt], responses[:length], "student", row, truncated=bool(cut))
            prompts, responses = prompts[prompt:], responses[length:]
            self._own[_key(answer)] = at, answer


def _key(example: Example) -> tuple[int, tuple[int, ...]]:
    """The row and its prompt: held-out rows are numbered from 0 as the trained ones are."""
    return example.row, tuple(example.prompt)

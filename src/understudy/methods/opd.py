"""On-policy distillation by policy gradient (Thinking Machines Lab, 2025; Qwen3, https://arxiv.org/abs/2505.09388).

    y ~ q_old(·|x),   A_t = −c (log q_old(y_t|y_<t, x) − log p(y_t|y_<t, x)) + the reward's advantage
    L = −Σ_t min(r_t A_t, clip(r_t, 1−ε, 1+ε) A_t),   r_t = q(y_t|y_<t, x) / q_old(y_t|y_<t, x)

The advantage is a constant, so that L is a policy gradient with the sampled reverse KL as a penalty of every token: its
expected gradient at q = q_old is Σ_t c ∇KL(q‖p) after each prefix, the one of `gkd` with divergence reverse_kl, but of
the teacher it needs the log-probability of the sampled tokens alone. (The log-ratio as a loss of its own would have an
expected gradient of 0, and the estimator "k3" that of the forward KL.) With the discounted sum Σ_{s≥t} γ^{s−t} of the
later tokens' advantages and γ = 1 it is the gradient of the KL between whole sequences.

`student_top_k` is the same divergence with less variance: the reverse KL over the K+1 events "one of the student's K
likeliest tokens" and "any other", which is differentiated directly and needs the teacher's log-probabilities of these
tokens, whichever they are.
"""

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from ..batch import Author, Batch, Example, Reduction
from ..divergences import ReverseKL
from ..fused_linear.distributions import Distribution, over_shared_vocabulary, top_k_tiles
from ..fused_linear.merged import Merged, TopK
from ..method import Method, MethodContext
from ..reward import Reward
from ..rollout import SAMPLED_LOGPROB, Writers
from ..sampling import Sampling
from ..scores import Scores
from ..step import Step
from ..teacher import Capability, Teacher


@dataclass
class OPD(Method):
    """Policy gradient on the student's own tokens with the sampled reverse KL as the advantage, and a reward's."""

    paper: ClassVar[str] = "Thinking Machines Lab, 2025, https://thinkingmachines.ai/blog/on-policy-distillation"
    late_weights: ClassVar[bool] = True  # a row counts r_t A_t, and r_t is known once its log-probability is
    collects_ahead: ClassVar[bool] = True

    kl_weight: float = 1.0  # c
    discount: float = 0.0  # γ, of the advantages of later tokens
    clip: float | None = 0.2  # ε, of the importance ratio; None: not clipped
    prefix_weight: float = 0.0  # γ of IW-OPD: tokens count 1 + γ at the beginning of a response, 1 at its end
    student_top_k: int = 0  # K; 0: the sampled token alone
    reduction: Reduction = "token"
    reward: Reward | None = None  # of the student's responses

    def __post_init__(self) -> None:
        if not self.kl_weight > 0:
            raise ValueError(f"opd needs kl_weight above 0, not {self.kl_weight}")
        if not 0 <= self.discount <= 1:
            raise ValueError(f"opd needs discount between 0 and 1, not {self.discount}")
        if self.clip is not None and not 0 < self.clip < 1:
            raise ValueError(f"opd needs clip between 0 and 1, or null for no clipping, not {self.clip}")
        if self.prefix_weight < 0 or self.student_top_k < 0:
            raise ValueError("opd needs prefix_weight and student_top_k of at least 0")
        if self.reduction == "pair":
            raise ValueError("opd has no pairs of responses: its reduction is token, sequence or sum")
        if sum(map(bool, (self.discount, self.prefix_weight, self.student_top_k))) > 1:
            raise ValueError("opd's discount, prefix_weight and student_top_k exclude each other: set one of them")

    @property
    def requires(self) -> frozenset[Capability]:
        return frozenset({Capability.FULL if self.student_top_k else Capability.CHOSEN})

    @property
    def authors(self) -> frozenset[Author]:
        return frozenset({"student"})

    @property
    def uses_sampled_log_probs(self) -> bool:
        """Is there a policy gradient in the loss? Not where the divergence over the top K is all of it."""
        return not self.student_top_k or self.reward is not None

    def check_sampling(self, sampling: Sampling) -> None:
        super().check_sampling(sampling)
        if self.uses_sampled_log_probs and (sampling.temperature, sampling.top_k, sampling.top_p) != (1.0, 0, 1.0):
            raise ValueError(
                "opd's advantage is that of tokens drawn from the student's own distribution: leave the rollout's "
                "temperature at 1, top_k at 0 and top_p at 1"
            )

    def setup(self, context: MethodContext) -> Teacher | None:
        self._tokenizer = context.tokenizer
        return context.teacher

    def collect(self, examples: list[Example], writers: Writers, step: Step) -> list[Example]:
        responses = writers.student(examples, step, logprobs=self.uses_sampled_log_probs)
        if self.reward is None:
            return responses
        groups = [index // writers.student.sampling.n for index in range(len(responses))]
        return self.reward.score(responses, self._tokenizer, groups)

    def loss(self, teacher: Scores, student: Scores, batch: Batch) -> Tensor:
        if self.student_top_k:
            value = self.kl_weight * self._top_k_divergence(teacher, student)
            return value if self.reward is None else value - self._surrogate(batch.stream("advantage"), student, batch)
        return -self._surrogate(self._advantage(teacher, student, batch), student, batch)

    def _advantage(self, teacher: Scores, student: Scores, batch: Batch) -> Tensor:
        """(N,) A_t, a constant."""
        log_p, log_q_old = teacher.chosen.to(student.chosen), batch.stream(SAMPLED_LOGPROB).to(student.chosen)
        advantage = self.kl_weight * (log_p - log_q_old)
        if self.discount:
            advantage = _discounted_sums(advantage, self.discount, batch)
        if self.prefix_weight:
            advantage = _prefix_weights(advantage, self.prefix_weight, batch) * advantage
        return advantage if self.reward is None else advantage + batch.stream("advantage").to(advantage)

    def _surrogate(self, advantage: Tensor, student: Scores, batch: Batch) -> Tensor:
        """(N,) min(r_t A_t, clip(r_t, 1−ε, 1+ε) A_t), whose gradient at r_t = 1 is A_t ∇log q (PPO, Eq. 7)."""
        ratio = self._ratio(student, batch)
        value = ratio * advantage.to(ratio)
        return value if self.clip is None else torch.minimum(value, self._clipped(ratio) * advantage.to(ratio))

    def _clipped(self, ratio: Tensor) -> Tensor:
        return ratio if self.clip is None else ratio.clamp(1 - self.clip, 1 + self.clip)

    @staticmethod
    def _ratio(student: Scores, batch: Batch) -> Tensor:
        """(N,) q(y_t)/q_old(y_t), which is 1 up to rounding where the weights that drew y are those of this step."""
        return (student.chosen - batch.stream(SAMPLED_LOGPROB).to(student.chosen)).exp()

    def _top_k_divergence(self, teacher: Scores, student: Scores) -> Tensor:
        """(N,) KL(q‖p) over the student's K likeliest tokens and "any other", a lower bound of KL(q‖p)."""
        p, q = over_shared_vocabulary(teacher.distribution, student.distribution)
        at_top_k = _at_student_top_k(p, q, student.tokens, self.student_top_k)
        return at_top_k.divergence_to(replace(student, distribution=q), ReverseKL())

    def metrics(self, teacher: Scores, student: Scores, batch: Batch) -> dict[str, Tensor]:
        """The sampled reverse KL log q_old − log p, the share of tokens with a ratio beyond the clip range, rewards."""
        values = {}
        if not self.student_top_k:
            values["sampled_reverse_kl"] = batch.stream(SAMPLED_LOGPROB) - teacher.chosen.to(batch.tokens.device)
        if self.uses_sampled_log_probs and self.clip is not None:
            ratio = self._ratio(student, batch)
            values["beyond_clip"] = (ratio != self._clipped(ratio)).float()
        names = () if self.reward is None else self.reward.names
        return values | {name: batch.per_sequence(batch.stream(name)) / batch.lengths for name in names}


def _discounted_sums(values: Tensor, discount: float, batch: Batch) -> Tensor:
    """(N,) Σ_{s≥t} γ^{s−t} value_s over the rest of each response."""
    sums, sequence = values.double().tolist(), batch.sequence_ids.tolist()
    for n in range(len(sums) - 2, -1, -1):
        if sequence[n] == sequence[n + 1]:
            sums[n] += discount * sums[n + 1]
    return values.new_tensor(sums)


def _prefix_weights(advantage: Tensor, gamma: float, batch: Batch) -> Tensor:
    """(N,) IW-OPD's weights w_t = 1 + γ (1 − C_{t−1}/C_T), C_t = Σ_{s≤t} |A_s| (https://arxiv.org/abs/2606.22600)."""
    size = advantage.abs().double()
    totals = batch.per_sequence(size)
    before = size.cumsum(0) - size - (totals.cumsum(0) - totals)[batch.sequence_ids]
    share = before / totals.clamp(min=1e-8)[batch.sequence_ids]
    return (1 + gamma * (1 - share)).to(advantage)


@torch.no_grad()
def _at_student_top_k(teacher: Distribution, student: Distribution, tokens: Tensor, k: int) -> Scores:
    """The teacher's log-probabilities of the K tokens that are likeliest to the student, computed tile by tile."""
    assert not isinstance(student, Merged), "the student is a live model"
    values, support = [], []
    for rows, _, _, likeliest in top_k_tiles(student, len(tokens), min(k, student.vocabulary), tokens.device):
        log_p = teacher.log_probs(rows)
        values.append(log_p.gather(-1, likeliest.to(log_p.device)))
        support.append(likeliest)
    return Scores(tokens, TopK(torch.cat(values), torch.cat(support)))

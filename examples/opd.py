"""On-policy distillation (OPD) by policy gradient, a method of your own (Thinking Machines Lab, 2025).

    L = −Σ_t A_t log q(y_t|y_<t, x),   A_t = sg[log p(y_t|y_<t, x) − log q(y_t|y_<t, x)],   y ~ sg[q](·|x)

Its expected gradient is that of the reverse KL, and of the teacher it needs the log-probability of the sampled tokens
only. In a recipe, run from this folder: `method: {opd:OPD: {}}`.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from understudy import Author, Batch, Capability, Example, Method, Scores, Step, Writers


@dataclass
class OPD(Method):
    """Policy gradient on the student's own tokens, with the log-ratio of teacher and student as the advantage."""

    paper: ClassVar[str] = "Thinking Machines Lab, 2025, https://thinkingmachines.ai/blog/on-policy-distillation"
    late_weights: ClassVar[bool] = True  # a row counts A_t, which is known once its log-probability is

    @property
    def requires(self) -> frozenset[Capability]:
        return frozenset({Capability.CHOSEN})

    @property
    def authors(self) -> frozenset[Author]:
        return frozenset({"student"})

    def collect(self, examples: list[Example], writers: Writers, step: Step) -> list[Example]:
        return writers.student(examples, step)

    def loss(self, teacher: Scores, student: Scores, batch: Batch) -> Tensor:
        return -self.metrics(teacher, student, batch)["advantage"] * student.chosen

    def metrics(self, teacher: Scores, student: Scores, batch: Batch) -> dict[str, Tensor]:
        return {"advantage": teacher.chosen.to(student.chosen) - student.chosen.detach()}

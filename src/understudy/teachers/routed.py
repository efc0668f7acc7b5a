"""Several teachers, each row scored by one of them: by a column of the dataset, or by a weight.

Every teacher reads only its own rows, and a divergence is computed for each teacher's rows by itself. So it has the
value that it has with that teacher alone, whatever the teachers provide and however a step is split into micro-batches.
"""

from bisect import bisect
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..batch import Batch, Example
from ..data.examples import Examples
from ..fused_linear.distributions import Routed
from ..scores import Scores
from ..step import Step
from ..teacher import Capability, Teacher, check_weights, common_capabilities


class _Share(NamedTuple):
    """The rows of a batch that one teacher scores."""

    batch: Batch
    index: Tensor  # (n,) of its rows among the N of the whole batch


class RoutedTeacher(Teacher):
    """Chooses one of several teachers for each row of the dataset.

    Args:
        teachers: by names of your own.
        by: the column of the dataset whose value is the name of the row's teacher.
        weights: instead of a column, the share of the rows that each teacher scores. Which one is a function of `seed`
            and the row, the same in every step.
        offload: live teachers wait on the CPU, and each is moved to the accelerator once per optimizer step.
    """

    provides: frozenset[Capability] = frozenset({Capability.CHOSEN, Capability.TOP_K, Capability.FULL})  # at most

    def __init__(
        self,
        teachers: Mapping[str, Teacher],
        *,
        by: str | None = None,
        weights: Mapping[str, float] | None = None,
        seed: int = 0,
        offload: bool = False,
    ) -> None:
        if not teachers:
            raise ValueError("routed needs at least one teacher")
        if any(teacher.is_collective for teacher in teachers.values()):
            raise ValueError(
                "a process without rows for a sharded teacher would block the others: leave shard out, or put the "
                "teacher behind `understudy serve`"
            )
        if (by is None) == (weights is None):
            raise ValueError("routed needs either `by`, the column that names each row's teacher, or `weights`")
        if weights is not None:
            check_weights(weights, teachers)
        self.teachers, self.by, self.weights, self.seed, self.offload = dict(teachers), by, weights, seed, offload
        self.provides = common_capabilities(teachers.values())
        self._device: torch.device | None = None
        self._prefetched: dict[int, tuple[Batch, dict[str, _Share]]] = {}
        self._scores: dict[int, dict[str, Scores]] = {}

    def to(self, device: torch.device) -> None:
        self._device = device
        super().to(torch.device("cpu") if self.offload else device)

    @property
    def columns(self) -> frozenset[str]:
        return super().columns | ({self.by} if self.by is not None else set())

    def check_data(self, examples: Examples, settings: Mapping[str, Any]) -> None:
        names = [self._name(example) for example in examples.examples]
        for name, teacher in self.teachers.items():
            own = [index for index, other in enumerate(names) if other == name]
            parts = {"examples": [examples.examples[i] for i in own], "rows": [examples.rows[i] for i in own]}
            teacher.check_data(replace(examples, **parts), settings)

    def prefetch(self, batches: Sequence[Batch]) -> None:
        """Splits the batches and, where teachers take turns, has each one score all of its rows."""
        self._prefetched = {id(batch): (batch, self._shares(batch)) for batch in batches}
        for name, teacher in self.teachers.items():
            teacher.prefetch([shares[name].batch for _, shares in self._prefetched.values() if name in shares])
        self._scores = self._in_turns(
            {key: shares for key, (_, shares) in self._prefetched.items()} if self.offload else {}
        )

    def score(self, batch: Batch) -> Scores:
        _, shares = self._prefetched.pop(id(batch), None) or (batch, self._shares(batch))
        scores = self._scores.pop(id(batch), None) or self._in_turns({0: shares})[0]
        none = torch.empty(0, dtype=torch.long)
        parts = {name: scores[name].distribution for name in shares}
        indices = {name: shares[name].index.cpu() if name in shares else none for name in self.teachers}
        return Scores(batch.tokens, Routed(parts, indices))

    def _in_turns(self, batches: Mapping[int, Mapping[str, _Share]]) -> dict[int, dict[str, Scores]]:
        """The scores of several batches, teacher after teacher.

        A teacher that leaves the accelerator leaves its output layer there for as long as its scores are used.
        """
        scores: dict[int, dict[str, Scores]] = {key: {} for key in batches}
        for name, teacher in self.teachers.items():
            own = {key: shares[name].batch for key, shares in batches.items() if name in shares}
            if self.offload and own and self._device is not None:
                teacher.to(self._device)
            for key, batch in own.items():
                scores[key][name] = teacher.score(batch)
            if self.offload and own:
                teacher.to(torch.device("cpu"))
        return scores

    def _shares(self, batch: Batch) -> dict[str, _Share]:
        """The rows of each teacher that has any."""
        names = [self._name(example) for example in batch.examples]
        sequences = {name: [i for i, other in enumerate(names) if other == name] for name in self.teachers}
        return {name: _Share(*batch.select(own)) for name, own in sequences.items() if own}

    def _name(self, example: Example) -> str:
        """The name of the teacher of an example's row.

        Raises:
            ValueError: if its column names none.
        """
        if self.weights is not None:
            row = (example.row,) if example.row >= 0 else example.prompt
            *bounds, total = accumulate(self.weights.values())
            return list(self.weights)[bisect(bounds, total * Step(0, self.seed).uniform("teacher", *row))]
        name = str(example.columns.get(self.by or ""))
        if name in self.teachers:
            return name
        value = f'has "{name:.60}"' if self.by in example.columns else "has nothing"
        names = ", ".join(self.teachers)
        raise ValueError(
            f"routed chooses the teacher by the column {self.by}, in which row {example.row} {value}: name one of "
            f"{names} there, or add a teacher of that name"
        )

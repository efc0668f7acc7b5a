"""The router's load-balancing loss as a term of the training loss."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..batch import Batch
from ..models.router import router_coefficient
from .step_metrics import StepMetrics

NAME = "aux_loss"


class RouterLoss:
    """Adds coefficient · Σ positions · loss ÷ Σ positions, over all micro-batches of a step on all processes.

    The router's loss of a micro-batch is one number for all of its positions, those of prompts included; the loss of a
    step is their mean over positions. `aux_loss` is logged without the coefficient.
    """

    def __init__(self, student: Any) -> None:
        self.coefficient = router_coefficient(student)
        self._per_position = 0.0

    def begin_step(self, batches: Sequence[Batch], normalizer: Tensor, accelerator: Any) -> None:
        """Count the positions of a step, whose loss will be divided by its `normalizer`."""
        if self.coefficient is not None:
            count = torch.tensor(sum(map(_positions, batches)), dtype=torch.float64, device=normalizer.device)
            total = accelerator.reduce(count, reduction="sum")
            self._per_position = self.coefficient * float(normalizer) / float(total)

    def term(self, batch: Batch, training: bool, metrics: StepMetrics | None) -> Callable[[Tensor], Tensor] | None:
        """From the router's loss to a term of the loss of a training step, before division by the normalizer.

        In evaluation the term is 0, and `mean` is added to the mean of the other losses. None: the model has no router
        or its configuration does not ask for its loss.
        """
        if self.coefficient is None:
            return None
        positions = _positions(batch)

        def weighted(loss: Tensor) -> Tensor:
            if metrics is not None:
                metrics.record({NAME: loss.detach().expand(positions)})
            return (self._per_position * positions if training else 0.0) * loss

        return weighted

    def mean(self, line: Mapping[str, float]) -> float:
        """The term in the loss of an evaluation, from its metrics."""
        return (self.coefficient or 0.0) * line.get(NAME, 0.0)


def _positions(batch: Batch) -> int:
    return sum(map(len, batch.examples))

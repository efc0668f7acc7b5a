"""Where a model's log-probabilities come from, a few rows at a time.

The one idea: whoever compares two models need not know whether there is a head to project with (`Projected`), a tile of
its products (`Logits`), log-probabilities at hand (`Dense`) or those of a few tokens only (`TopK`).

Shapes: N rows, C rows of a chunk, V vocabulary, K support, D width.
"""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from .tiles import Transform, log_normalizer, log_softmax, wide


@dataclass(frozen=True)
class Head:
    """A model's last linear layer, and what the model does to the logits after it."""

    weight: Tensor  # (V, D)
    bias: Tensor | None = None  # (V,)
    transform: Transform = Transform()

    @property
    def vocabulary(self) -> int:
        return self.weight.shape[0]

    def cut(self, vocabulary: int) -> "Head":
        """The head over the first `vocabulary` tokens only: a padded vocabulary's rest takes no part in a softmax."""
        if vocabulary >= self.vocabulary:
            return self
        return replace(
            self, weight=self.weight[:vocabulary], bias=None if self.bias is None else self.bias[:vocabulary]
        )

    def __call__(self, hidden: Tensor) -> Tensor:
        """(C, D) → (C, V) logits, float32 or wider."""
        product = F.linear(hidden.to(self.weight.dtype), self.weight, self.bias)
        return self.transform(product.to(wide(product.dtype)))

    def product(self, hidden: Tensor, out: Tensor) -> None:
        """(C, D) → (C, V) written to `out`: the matrix product alone, in the weight's dtype and without gradients."""
        hidden, across = hidden.to(self.weight.dtype), self.weight.t()
        if self.bias is None:
            torch.mm(hidden, across, out=out)
        else:
            torch.addmm(self.bias, hidden, across, out=out)


@dataclass(frozen=True)
class Logits:
    """Some rows of a head's product at hand."""

    product: Tensor  # (C, V)
    transform: Transform
    normalizer: Tensor | None = None  # (C, 1) `log_normalizer` for the temperature that will be asked for, if known

    def at(self, rows: slice) -> "Logits":
        return Logits(self.product[rows], self.transform, None if self.normalizer is None else self.normalizer[rows])

    def normalized(self, temperature: float) -> "Logits":
        return replace(self, normalizer=log_normalizer(self.product, self.transform, temperature))

    def log_probs(self, temperature: float = 1.0) -> Tensor:
        return log_softmax(self.transform(self.product.to(wide(self.product.dtype))), temperature, self.normalizer)


@dataclass(frozen=True)
class Projected:
    """Log-probabilities of a live model, made when asked for."""

    hidden: Tensor  # (N, D)
    head: Head

    @property
    def vocabulary(self) -> int:
        return self.head.vocabulary

    def cut(self, vocabulary: int) -> "Projected":
        return replace(self, head=self.head.cut(vocabulary))

    def log_probs(self, rows: slice = slice(None), temperature: float = 1.0) -> Tensor:
        """(C, V) for some rows, differentiable by autograd: the plain path."""
        return (self.head(self.hidden[rows]) / temperature).log_softmax(-1)


@dataclass(frozen=True)
class Dense:
    """Log-probabilities at hand."""

    values: Tensor  # (N, V), normalised

    @property
    def vocabulary(self) -> int:
        return self.values.shape[-1]

    def at(self, rows: slice) -> "Dense":
        return Dense(self.values[rows])

    def cut(self, vocabulary: int) -> "Dense":
        return self if vocabulary >= self.vocabulary else Dense(self.values[:, :vocabulary].log_softmax(-1))

    def log_probs(self, rows: slice = slice(None), temperature: float = 1.0) -> Tensor:
        return self.values[rows] if temperature == 1.0 else (self.values[rows] / temperature).log_softmax(-1)


@dataclass(frozen=True)
class TopK:
    """The log-probabilities of a few tokens per row: a full distribution over **K+1 events**, those and "any other".

    Merging events never increases an f-divergence, so comparing over them gives a lower bound of the full value, and no
    divergence needs a version of its own for truncated teachers.
    """

    values: Tensor  # (N, K)
    support: Tensor  # (N, K) token ids, no id twice in a row

    def at(self, rows: slice) -> "TopK":
        return TopK(self.values[rows], self.support[rows])

    def log_probs(self, rows: slice = slice(None), temperature: float = 1.0) -> Tensor:
        """(C, K+1): the last event is any other token."""
        if temperature != 1.0:
            raise ValueError(
                "a teacher known by its top tokens only cannot be softened: the tail's shape is unknown; "
                "set the divergence's temperature to 1"
            )
        values = self.values[rows].to(wide(self.values.dtype))
        known = values.logsumexp(-1, keepdim=True).clamp(max=-torch.finfo(values.dtype).eps)
        return torch.cat([values, torch.log(-torch.expm1(known))], dim=-1)

    def merge(self, log_q: Tensor, rows: slice = slice(None)) -> Tensor:
        """Another model's (C, V) as the same (C, K+1) events.

        Neither side's last event falls to probability 0 by rounding, or where the support is the whole vocabulary:
        the teacher's is at least the dtype's resolution, and an empty one of the other model takes that value.
        """
        support = self.support[rows].to(log_q.device)
        others = log_q.scatter(-1, support, -torch.inf)
        empty = (others == -torch.inf).all(-1, keepdim=True)
        rest = others.masked_fill(empty, 0).logsumexp(-1, keepdim=True)  # no NaN gradient of logsumexp(−inf, −inf, …)
        rest = rest.masked_fill(empty, math.log(torch.finfo(log_q.dtype).eps))
        return torch.cat([log_q.gather(-1, support), rest], dim=-1)

    def spread(self, pull: Tensor, merged: Tensor, log_q: Tensor) -> Tensor:
        """From the derivative (C, K+1) with respect to `merged = merge(log_q)` to that (C, V) by `log_q`."""
        share = (log_q - merged[:, -1:]).exp_()  # of each token in "any other"
        return share.mul_(pull[:, -1:]).scatter_(-1, self.support.to(log_q.device), pull[:, :-1])


Source = Projected | Dense | TopK

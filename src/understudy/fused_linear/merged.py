"""The next-token distributions of N rows over K+1 events: K tokens, and any other token.

Shapes: N rows, C rows of a tile, V vocabulary, K tokens.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .events import OtherVocabulary
from .head import softmax_dtype


@dataclass(frozen=True)
class TopK:
    """Log-probabilities of K tokens per row: a full distribution over **K+1 events**, those and "any other token".

    Merging events never increases an f-divergence, so comparing over them gives a lower bound of the full value, and no
    divergence needs a version of its own for truncated teachers.
    """

    values: Tensor  # (N, K)
    support: Tensor  # (N, K) token ids, no id twice in a row
    chosen_values: Tensor | None = None  # (N,) log-probability of the chosen token, if the teacher reports it
    rest: Tensor | None = None  # (N,) log-probability of any other token, if the teacher reports it; else 1 − Σ

    @property
    def requires_grad(self) -> bool:
        return self.values.requires_grad

    def rows(self, rows: slice | Tensor) -> "TopK":
        chosen, rest = (None if x is None else x[rows] for x in (self.chosen_values, self.rest))
        return TopK(self.values[rows], self.support[rows], chosen, rest)

    def cut(self, vocabulary: int) -> "TopK":
        """Unchanged: the top K are already normalised over the real tokens."""
        return self

    def log_probs(self, rows: slice = slice(None), temperature: float = 1.0) -> Tensor:
        """(C, K+1): the last event is any other token.

        Raises:
            ValueError: for a temperature other than 1.
        """
        if temperature != 1.0:
            raise ValueError(
                "a teacher known by its top tokens only cannot be softened: the tail's shape is unknown; "
                "set the divergence's temperature to 1"
            )
        values = self.values[rows].to(softmax_dtype(self.values.dtype))
        if self.rest is not None:
            rest = self.rest[rows, None].to(values.dtype)
        else:
            total = values.logsumexp(-1, keepdim=True).clamp(max=-torch.finfo(values.dtype).eps)
            rest = torch.log(-torch.expm1(total))
        return torch.cat([values, rest], dim=-1)

    def chosen(self, tokens: Tensor) -> Tensor:
        """(N,) log-probabilities of the chosen tokens as the teacher reported them.

        Raises:
            ValueError: if it reported the top K alone.
        """
        if self.chosen_values is None:
            raise ValueError(
                "this teacher reports its top tokens only, and not the log-probability of the chosen token: choose a "
                "method that does not need it, or a teacher that provides it"
            )
        return self.chosen_values

    def merge(self, log_q: Tensor, rows: slice = slice(None)) -> Tensor:
        """Another model's log-probabilities (C, V) as those of the same K+1 events, (C, K+1).

        The last event never has probability 0, by rounding or where the support is the whole vocabulary: a teacher's
        that is 1 − Σ is at least the dtype's resolution, and an empty one of the other model gets that value.
        """
        support = self.support[rows].to(log_q.device)
        rest = log_q.scatter(-1, support, -torch.inf)
        empty = (rest == -torch.inf).all(-1, keepdim=True)
        rest = rest.masked_fill(empty, 0).logsumexp(-1, keepdim=True)  # no NaN gradient of logsumexp(−inf, −inf, …)
        rest = rest.masked_fill(empty, math.log(torch.finfo(log_q.dtype).eps))
        return torch.cat([log_q.gather(-1, support), rest], dim=-1)

    def unmerge_gradient(self, grad_merged: Tensor, merged: Tensor, log_q: Tensor) -> Tensor:
        """From the derivative (C, K+1) with respect to `merged = merge(log_q)` to that (C, V) by `log_q`."""
        grad = (log_q - merged[:, -1:]).exp_()  # each token's share of "any other"
        return grad.mul_(grad_merged[:, -1:]).scatter_(-1, self.support.to(log_q.device), grad_merged[:, :-1])


Merged = TopK | OtherVocabulary  # over events, the last of which is any other token

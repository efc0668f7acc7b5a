"""The next-token distributions of N rows over K+1 events: K tokens, and any other token.

Shapes: N rows, C rows of a tile, V vocabulary, K tokens.
"""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from .head import softmax_dtype

if TYPE_CHECKING:
    from .distributions import Dense, Projected


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
    known: Tensor | None = None  # (N,) bool; in other rows the only event is "any token", so that all divergences are 0

    @property
    def requires_grad(self) -> bool:
        return self.values.requires_grad

    def rows(self, rows: slice | Tensor) -> "TopK":
        chosen, rest, known = (None if x is None else x[rows] for x in (self.chosen_values, self.rest, self.known))
        return TopK(self.values[rows], self.support[rows], chosen, rest, known)

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
        return self._of_known(torch.cat([values, rest], dim=-1), rows)

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
        return self._of_known(torch.cat([log_q.gather(-1, support), rest], dim=-1), rows)

    def unmerge_gradient(self, grad_merged: Tensor, merged: Tensor, log_q: Tensor) -> Tensor:
        """From the derivative (C, K+1) with respect to `merged = merge(log_q)` to that (C, V) by `log_q`."""
        grad = (log_q - merged[:, -1:]).exp_()  # each token's share of "any other"
        grad.mul_(grad_merged[:, -1:]).scatter_(-1, self.support.to(log_q.device), grad_merged[:, :-1])
        return grad if self.known is None else grad.masked_fill_(~self.known.to(grad.device)[:, None], 0)

    def _of_known(self, events: Tensor, rows: slice) -> Tensor:
        """Log-probabilities (C, K+1) of events; in rows that are not known the last one has probability 1."""
        if self.known is None:
            return events
        certain = torch.full_like(events[:1], -torch.inf)
        certain[:, -1] = 0
        return torch.where(self.known[rows].to(events.device)[:, None], events, certain)


@dataclass(frozen=True)
class SharedTokens:
    """Distributions over another vocabulary, as the K+1 events of `TopK`: the K tokens that both have, any other token.

    The other vocabulary is projected a tile of rows at a time.
    """

    distribution: "Projected | Dense"  # of N rows over the other vocabulary
    support: Tensor  # (K,) the shared tokens' ids in this vocabulary …
    other_ids: Tensor  # (K,) … and in the other one
    known: Tensor  # (N,) bool, see `TopK`

    requires_grad: ClassVar[bool] = False

    def rows(self, rows: slice | Tensor) -> TopK:
        is_tile = isinstance(rows, slice)
        log_probs = self.distribution.log_probs(rows) if is_tile else self.distribution.rows(rows).log_probs()
        values = log_probs[:, self.other_ids.to(log_probs.device)]
        return TopK(values, self.support.expand(values.shape), known=self.known[rows])

    def cut(self, vocabulary: int) -> "SharedTokens":
        """Unchanged: the shared tokens are real ones."""
        return self

    def log_probs(self, rows: slice = slice(None), temperature: float = 1.0) -> Tensor:
        """(C, K+1): see `TopK.log_probs`."""
        return self.rows(rows).log_probs(temperature=temperature)

    def chosen(self, tokens: Tensor) -> Tensor:
        """Refused: see `TopK.chosen`."""
        return self.rows(slice(0)).chosen(tokens)

    def merge(self, log_q: Tensor, rows: slice = slice(None)) -> Tensor:
        """(C, K+1): see `TopK.merge`."""
        values = log_q[:, :0]  # which play no part
        return TopK(values, self.support.expand(len(log_q), -1), known=self.known[rows]).merge(log_q)


Merged = TopK | SharedTokens  # over K+1 events, the last of which is any other token

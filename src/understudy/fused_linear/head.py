"""A language-model head: its matrix product, and the scale and soft-cap that a model applies to its logits.

Shapes: C rows of a tile, V vocabulary, D width.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F


def softmax_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of softmax and divergence: float32, or float64 for float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


@dataclass(frozen=True)
class Transform:
    """What a model does to its head's product: logits = c · tanh(scale · product / c)."""

    scale: float = 1.0
    softcap: float | None = None  # c

    def __call__(self, product: Tensor) -> Tensor:
        logits = product * self.scale if self.scale != 1.0 else product
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)

    def grad_product(self, grad_logits: Tensor, logits: Tensor) -> Tensor:
        """The derivative with respect to the product, from that with respect to `logits` as returned by `__call__`."""
        if self.softcap is not None:
            grad_logits = grad_logits * (1 - (logits / self.softcap) ** 2)
        return grad_logits * self.scale if self.scale != 1.0 else grad_logits


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
        """The head over the first `vocabulary` tokens only: the padding of a vocabulary is left out of the softmax."""
        if vocabulary >= self.vocabulary:
            return self
        return replace(
            self, weight=self.weight[:vocabulary], bias=None if self.bias is None else self.bias[:vocabulary]
        )

    def tensors(self) -> dict[str, Tensor]:
        """The weight, and the bias if there is one, by name."""
        return {"weight": self.weight} | ({} if self.bias is None else {"bias": self.bias})

    def to(self, device: torch.device) -> "Head":
        """The same head on a device."""
        return replace(self, **{name: tensor.to(device) for name, tensor in self.tensors().items()})

    def detach(self) -> "Head":
        """The same head as a constant."""
        return replace(self, weight=self.weight.detach(), bias=None if self.bias is None else self.bias.detach())

    def __call__(self, hidden: Tensor) -> Tensor:
        """(C, D) → (C, V) logits, float32 or float64."""
        product = F.linear(hidden.to(self.weight.dtype), self.weight, self.bias)
        return self.transform(product.to(softmax_dtype(product.dtype)))

    def product(self, hidden: Tensor, out: Tensor) -> None:
        """(C, D) → (C, V) written to `out`: the matrix product alone, in the weight's dtype and without gradients."""
        hidden, weight = hidden.to(self.weight.dtype), self.weight.t()
        if self.bias is None:
            torch.mm(hidden, weight, out=out)
        else:
            torch.addmm(self.bias, hidden, weight, out=out)


@dataclass(frozen=True)
class TileLogits:
    """A tile of a head's products, as logits and log-probabilities."""

    product: Tensor  # (C, V)
    transform: Transform

    def rows(self, rows: slice) -> "TileLogits":
        return TileLogits(self.product[rows], self.transform)

    def logits(self) -> Tensor:
        return self.transform(self.product.to(softmax_dtype(self.product.dtype)))

    def log_probs(self, temperature: float = 1.0) -> Tensor:
        """(C, V) log-probabilities."""
        logits = _soften(self.logits(), temperature)
        return _softmax_of_a_row_at_a_time(logits)[0] if torch.compiler.is_compiling() else logits.log_softmax(-1)

    def softmax(self, temperature: float = 1.0, logits: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(C, V) log-probabilities and probabilities, of `logits()` if the caller has not computed them already."""
        logits = _soften(self.logits() if logits is None else logits, temperature)
        if torch.compiler.is_compiling():
            return _softmax_of_a_row_at_a_time(logits)
        log_probs = logits.log_softmax(-1)
        return log_probs, log_probs.exp()


def _soften(logits: Tensor, temperature: float) -> Tensor:
    return logits / temperature if temperature != 1.0 else logits


def _softmax_of_a_row_at_a_time(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities and probabilities, as torch compiles them into one loop over rows with what comes after them.

    Each exponential is computed once. torch splits the loop where a number per row is computed outside of a loop over
    tokens, and intermediate results are then of all rows, not of one. So the logarithm of the sum is the largest one
    over 16 equal sums; the comparison, which is always true, is what makes torch keep that as a loop over tokens.
    """
    peak = logits.amax(-1, keepdim=True)
    powers = (logits - peak).exp()
    total = powers.sum(-1, keepdim=True)
    log_total = torch.where(logits[:, :16] <= peak, total, torch.nan).log().amax(-1, keepdim=True)
    return (logits - peak) - log_total, powers / total

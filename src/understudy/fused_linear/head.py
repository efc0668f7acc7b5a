"""A language-model head: its matrix product, and the scale and soft-cap that a model applies to its logits.

Shapes: C rows of a tile, V vocabulary, D width.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .compiling import CompiledFunction
from .tiles import row_blocks

NOT_COMPILED = "the loss cannot be compiled here, which makes it slower"
COMPILE_WHOLE = {"fullgraph": True, "dynamic": True}  # a function in several graphs would need several more tiles


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
    normalizer: Tensor | None = None  # (C, 1) log Σ exp for the temperature that will be used, if it is computed

    def rows(self, rows: slice) -> "TileLogits":
        return TileLogits(
            self.product[rows], self.transform, None if self.normalizer is None else self.normalizer[rows]
        )

    def normalized(self, temperature: float) -> "TileLogits":
        """The same with its normalizer.

        The logarithm is outside the compiled function: one number per row between two passes would split the kernel,
        and its intermediate results would no longer be one row.
        """
        peak, total = _compiled_sum_exp(self.product, self.transform, temperature)
        return replace(self, normalizer=peak + total.log())

    def logits(self) -> Tensor:
        return self.transform(self.product.to(softmax_dtype(self.product.dtype)))

    def log_probs(self, temperature: float = 1.0, logits: Tensor | None = None) -> Tensor:
        """(C, V) log-softmax over the temperature, of `logits()` if the caller has not computed them already."""
        logits = _soften(self.logits() if logits is None else logits, temperature)
        return logits.log_softmax(-1) if self.normalizer is None else logits - self.normalizer


def _soften(logits: Tensor, temperature: float) -> Tensor:
    return logits / temperature if temperature != 1.0 else logits


def _sum_exp(product: Tensor, transform: Transform, temperature: float) -> tuple[Tensor, Tensor]:
    logits = _soften(transform(product.to(softmax_dtype(product.dtype))), temperature)
    peak = logits.amax(-1, keepdim=True)
    return peak, (logits - peak).exp().sum(-1, keepdim=True)


def _sum_exp_in_blocks(product: Tensor, *options: Any) -> tuple[Tensor, ...]:
    blocks = [_sum_exp(product[rows], *options) for rows in row_blocks(product)]
    return tuple(map(torch.cat, zip(*blocks, strict=True)))


_compiled_sum_exp = CompiledFunction(_sum_exp, NOT_COMPILED, fallback=_sum_exp_in_blocks, **COMPILE_WHOLE)

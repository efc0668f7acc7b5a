"""Random distributions for tests of fused linear losses: hidden rows with a head, and the top K of them."""

import os

import pytest
import torch
from torch import Tensor

from understudy.divergences import AlphaBeta, ForwardKL, JensenShannon, ReverseKL, SkewKL, SkewReverseKL, TotalVariation
from understudy.fused_linear.distributions import Projected
from understudy.fused_linear.head import Head, Transform
from understudy.fused_linear.merged import TopK

N, V, D = 23, 31, 7
DIVERGENCES = [
    ForwardKL(),
    ReverseKL(temperature=2.0, rescale=True),
    JensenShannon(0.1),
    TotalVariation(),
    SkewKL(0.1),
    SkewReverseKL(0.1),
    AlphaBeta(0.2, 0.7),
]
f64 = torch.float64
COMPILES = pytest.mark.skipif("TEST_COMPILED" not in os.environ, reason="takes minutes: set TEST_COMPILED=1")


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_projected(
    width: int = D,
    seed: int = 0,
    dtype: torch.dtype = f64,
    bias: bool = True,
    scale: float = 1.0,
    softcap: float | None = None,
    vocabulary: int = V,
) -> Projected:
    """N hidden rows and a head whose tensors require gradients."""
    g = generator(seed)
    hidden = torch.randn(N, width, generator=g, dtype=f64).to(dtype)
    weight = torch.randn(vocabulary, width, generator=g, dtype=f64).to(dtype)
    offset = torch.randn(vocabulary, generator=g, dtype=f64).to(dtype) if bias else None
    for leaf in (hidden, weight, offset):
        if leaf is not None:
            leaf.requires_grad_()
    return Projected(hidden, Head(weight, offset, Transform(scale, softcap)))


def leaves(projected: Projected) -> list[Tensor]:
    """Hidden rows, head weight and, if there is one, bias."""
    return [x for x in (projected.hidden, projected.head.weight, projected.head.bias) if x is not None]


def top_k(log_p: Tensor, k: int) -> TopK:
    return TopK(*log_p.topk(k, dim=-1))

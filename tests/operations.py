"""Watching torch's operations: the largest tensor that one returns, and products over the vocabulary."""

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_PRODUCTS = (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_)


class LargestTensor(TorchDispatchMode):
    """The number of elements of the largest tensor that any operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.size = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.size = max([self.size, *(x.numel() for x in tree_leaves(result) if isinstance(x, Tensor))])
        return result


class VocabularyProducts(TorchDispatchMode):
    """How many matrix products have an operand with one row or column per token of the vocabulary."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.vocabulary = vocabulary
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket in _PRODUCTS:
            self.count += any(self.vocabulary in x.shape for x in args if isinstance(x, Tensor) and x.dim() == 2)
        return func(*args, **(kwargs or {}))

"""torch.compile for hot functions: when it pays off, and a wrapper that falls back to eager code with a warning.

A trainer knows how long its run is. A function that is called in a loop of the caller's own does not: it is compiled
once as much has been computed without compiling as a run would be compiled for, because whoever has called it so often
is likely to call it as often again.
"""

import logging
import os
import shutil
from collections import Counter
from collections.abc import Callable, Hashable
from importlib.util import find_spec
from typing import Any

import torch

_LONG_RUN = 1e10  # elements (rows × V); runs of more elements save several times the compile time
_log = logging.getLogger(__name__)
_computed: Counter[Hashable] = Counter()  # elements that this process has computed without compiling, by kind of work


def compiling_pays_off(rows: float, vocabulary: int, device: str = "cpu") -> bool:
    """Is a run of `rows` rows long enough to save the compile time, and does the machine have a compiler?"""
    off = os.environ.get("TORCHDYNAMO_DISABLE", "0") == "1" or os.environ.get("TORCH_COMPILE_DISABLE", "0") == "1"
    compiler = find_spec("triton") if device == "cuda" else shutil.which(os.environ.get("CXX", "g++"))
    return not off and compiler is not None and rows * vocabulary > _LONG_RUN


def called_often(work: Hashable, rows: int, vocabulary: int, device: str) -> bool:
    """Has this process done so much of this kind of work that the function should be compiled from now on?

    Counts this call's `rows` for the next one. The answer changes once, from False to True, which is logged.
    """
    if not compiling_pays_off(_computed[work] / vocabulary, vocabulary, device):
        _computed[work] += rows * vocabulary
        if compiling_pays_off(_computed[work] / vocabulary, vocabulary, device):
            _log.info(
                "fused_divergence has been called with %.0e logits of this kind: its kernel is compiled from the next "
                "call on, which takes a while once and changes the rounding; fused_linear.tiles.tiling(compiled=False) "
                "or TORCH_COMPILE_DISABLE=1 switches that off",
                _computed[work],
            )
        return False
    return True


class CompiledFunction:
    """A function that is compiled at its first call, with `torch.compile`'s options.

    If compiling fails, `warning` is logged once and `fallback` (default: the function itself) is called from then on.
    """

    def __init__(
        self, function: Callable[..., Any], warning: str, fallback: Callable[..., Any] | None = None, **options: Any
    ) -> None:
        self._function, self._warning, self._options = function, warning, options
        self._fallback = fallback or function
        self._kernel: Callable[..., Any] | None = None

    def __call__(self, *args: Any) -> Any:
        # imported here because it takes half a second, which only runs that compile should pay
        from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException

        self._kernel = self._kernel or torch.compile(self._function, **self._options)
        try:
            return self._kernel(*args)
        except (TorchDynamoException, FailOnRecompileLimitHit) as error:
            _log.warning("%s: %s", self._warning, str(error).partition("\n")[0])
            self._kernel = self._fallback
            return self._fallback(*args)

"""One tile of a vocabulary: a few rows of logits are normalised, judged and turned into their own gradient, in place.

The one idea: between the matrix products everything is elementwise along a row, so it can be done where the logits lie.
Compiled, nothing is stored in between; otherwise it is done a few rows at a time, so that what is stored stays in the
processor's cache. Which of the two is the business of a whole run (`tiling`): compiling takes some ten seconds.

Shapes: C rows of a tile, V vocabulary.
"""

import logging
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import Any, Protocol

import torch
from torch import Tensor

_BLOCK = 2**18  # elements worked on at once by a CPU, so that the arrays that come in between stay in its cache
_COMPILED_BLOCK = 2**20  # nothing comes in between, but a call costs some hundred microseconds
_LONG = 1e10  # elements; a run that compares more of them wins back what compiling costs, several times over
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Tiling:
    """How a vocabulary is walked through."""

    memory_mb: float = 256.0  # for a tile of the student's, one of the teacher's, and what comparing them takes
    compiled: bool = False


_tiling: ContextVar[Tiling] = ContextVar("tiling", default=Tiling())  # noqa: B039  (it is frozen)


def current() -> Tiling:
    """How vocabularies are walked through here."""
    return _tiling.get()


@contextmanager
def tiling(memory_mb: float | None = None, compiled: bool | None = None) -> Iterator[None]:
    """Within this block, walk through vocabularies in tiles of `memory_mb`, `compiled` or not; None leaves as it is."""
    changes = {"memory_mb": memory_mb, "compiled": compiled}
    token = _tiling.set(replace(current(), **{name: x for name, x in changes.items() if x is not None}))
    try:
        yield
    finally:
        _tiling.reset(token)


def pays_to_compile(rows: float, vocabulary: int, device: str = "cpu") -> bool:
    """Does a run of so many rows win back the seconds of compiling, on a machine that can compile?"""
    off = os.environ.get("TORCHDYNAMO_DISABLE", "0") == "1" or os.environ.get("TORCH_COMPILE_DISABLE", "0") == "1"
    compiler = find_spec("triton") if device == "cuda" else shutil.which(os.environ.get("CXX", "g++"))
    return not off and compiler is not None and rows * vocabulary > _LONG


def chunk_rows(vocabulary: int) -> int:
    """How many rows a tile may have for two of them, in float32, and half of one more to fit into the memory.

    From 16 to 1024: with more the matrix products gain nothing.
    """
    return min(1024, max(16, int(current().memory_mb * 2**20 / (4 * 2.5 * vocabulary))))


def empty_tile(rows: int, vocabulary: int, like: Tensor) -> Tensor:
    """(rows, V) with nothing in it yet; rows begin at multiples of 16 elements, a cache line of float32."""
    return torch.empty(rows, -(-vocabulary // 16) * 16, dtype=like.dtype, device=like.device)[:, :vocabulary]


@dataclass(frozen=True)
class Transform:
    """What a model does to its head's product: c · tanh(scale · product / c)."""

    scale: float = 1.0
    softcap: float | None = None  # c

    def __call__(self, product: Tensor) -> Tensor:
        logits = product * self.scale if self.scale != 1.0 else product
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)

    def chain(self, grad: Tensor, logits: Tensor) -> Tensor:
        """From the derivative with respect to `logits`, as returned by `__call__`, to that of the product."""
        if self.softcap is not None:
            grad = grad * (1 - (logits / self.softcap) ** 2)
        return grad * self.scale if self.scale != 1.0 else grad


class Rule(Protocol):
    """Judges rows of the student's log-probabilities (C, V)."""

    def at(self, rows: slice) -> "Rule":
        """The rule for some of the rows."""
        ...

    def __call__(self, log_q: Tensor, differentiate: bool) -> tuple[Tensor, Tensor | None]:
        """Values (C,) and, if asked, their derivative (C, V) with respect to `log_q`."""
        ...


def finish(
    product: Tensor, rule: Rule, weights: Tensor, transform: Transform, temperature: float, differentiate: bool
) -> Tensor:
    """The rule's values (C,) for a tile of the head's products (C, V).

    If `differentiate`, the tile is overwritten by the gradient of Σ weights · values with respect to itself.
    """
    options = (transform, temperature, differentiate)
    kernel = _compiled if current().compiled else _finish
    rows = max(1, (_COMPILED_BLOCK if current().compiled else _BLOCK) // product.shape[1])
    if product.device.type != "cpu":
        rows = len(product)
    blocks = (slice(start, start + rows) for start in range(0, len(product), rows))
    return torch.cat([kernel(product[at], rule.at(at), weights[at], *options) for at in blocks])


def _finish(
    product: Tensor, rule: Rule, weights: Tensor, transform: Transform, temperature: float, differentiate: bool
) -> Tensor:
    logits = transform(product.to(wide(product.dtype)))
    log_q = (logits / temperature if temperature != 1.0 else logits).log_softmax(-1)
    values, pull = rule(log_q, differentiate)
    if pull is not None:
        # ∂/∂z_v = h_v − q_v Σ h, then through the temperature and whatever the model does after its product
        grad = torch.addcmul(pull, log_q.exp(), pull.sum(-1, keepdim=True), value=-1)
        product.copy_(transform.chain(grad * (weights[:, None].to(grad.dtype) / temperature), logits))
    return values


class Compiled:
    """A function that is compiled when it is first called.

    Where that does not work it is said once, as `why`, and the function is called as it is from then on.
    """

    def __init__(self, function: Callable[..., Tensor], why: str) -> None:
        self._function, self._why = function, why
        self._kernel: Callable[..., Tensor] | None = None

    def __call__(self, *args: Any) -> Tensor:
        from torch._dynamo.exc import (
            TorchDynamoException,
        )  # half a second, for which only those who compile should wait

        self._kernel = self._kernel or torch.compile(self._function)
        try:
            return self._kernel(*args)
        except TorchDynamoException as error:
            _log.warning("%s: %s", self._why, str(error).partition("\n")[0])
            self._kernel = self._function
            return self._function(*args)


_compiled = Compiled(_finish, "the loss cannot be compiled here, which makes it slower")


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype of softmaxes: float32, or float64 for float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32

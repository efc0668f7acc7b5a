"""One tile of a vocabulary: a few rows of logits are normalised, judged and turned into their gradient.

The one idea: between the matrix products everything is elementwise along a row, so what is stored in between need never
leave the processor's cache. Compiled, it is one row at a time; otherwise it is a few, and the gradient is written where
the logits lie. Which of the two is the business of a whole run (`tiling`): compiling takes some ten seconds.

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
_LONG = 1e10  # elements; a run that compares more of them wins back what compiling costs, several times over
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Tiling:
    """How a vocabulary is walked through."""

    memory_mb: float = 256.0  # for a tile of the student's, one of the teacher's, one of gradients, and some room
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
    """How many rows a tile may have for three of them, in float32, and half of one more to fit into the memory.

    From 16 to 1024: with more the matrix products gain nothing.
    """
    return min(1024, max(16, int(current().memory_mb * 2**20 / (4 * 3.5 * vocabulary))))


def empty_tile(rows: int, vocabulary: int, like: Tensor) -> Tensor:
    """(rows, V) of zeros; rows begin at multiples of 16 elements, a cache line of float32.

    All of the memory is initialised, padding included: a matrix product may read what lies behind a row (oneDNN does
    with AMX) and multiply it by 0, and 0 times an uninitialised NaN is NaN. One row more is behind the tile, because
    code that is compiled for the whole of some memory is compiled again for a part.
    """
    return torch.zeros(rows + 1, -(-vocabulary // 16) * 16, dtype=like.dtype, device=like.device)[:rows, :vocabulary]


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


def log_softmax(logits: Tensor, temperature: float, normalizer: Tensor | None = None) -> Tensor:
    """(C, V) of logits over a temperature; `normalizer` (C, 1) is `log_normalizer`, where that is known."""
    logits = _softened(logits, temperature)
    return logits.log_softmax(-1) if normalizer is None else logits - normalizer


def log_normalizer(product: Tensor, transform: Transform, temperature: float) -> Tensor:
    """(C, 1) log Σ exp of what the softmax is taken of, for a head's products (C, V).

    The logarithm is not in the compiled part: one number per row between two passes would tear the passes apart, and
    what lies between them would no longer be one row.
    """
    peak, total = _compiled_sum(product, transform, temperature)
    return peak + total.log()


def _sum(product: Tensor, transform: Transform, temperature: float) -> tuple[Tensor, Tensor]:
    logits = _softened(transform(product.to(wide(product.dtype))), temperature)
    peak = logits.amax(-1, keepdim=True)
    return peak, (logits - peak).exp().sum(-1, keepdim=True)


def _softened(logits: Tensor, temperature: float) -> Tensor:
    return logits / temperature if temperature != 1.0 else logits


def _sum_in_blocks(product: Tensor, *options: Any) -> tuple[Tensor, ...]:
    return tuple(map(torch.cat, zip(*(_sum(product[at], *options) for at in _blocks(product)), strict=True)))


class Rule(Protocol):
    """Judges rows of the student's log-probabilities (C, V)."""

    def at(self, rows: slice) -> "Rule":
        """The rule for some of the rows."""
        ...

    def normalized(self) -> "Rule":
        """The same with every `log_normalizer` that it needs."""
        ...

    def __call__(self, log_q: Tensor, differentiate: bool) -> tuple[Tensor, Tensor | None]:
        """Values (C,) and, if asked, their derivative (C, V) with respect to `log_q`."""
        ...


def tiles(rows: int, vocabulary: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """(rows, V) for products and for their gradients: one for both, but for compiled code, which needs two."""
    tile = empty_tile(rows, vocabulary, like)
    return tile, empty_tile(rows, vocabulary, like) if current().compiled else tile


def finish(
    product: Tensor, rule: Rule, weights: Tensor, transform: Transform, temperature: float, out: Tensor | None
) -> Tensor:
    """The rule's values (C,) for a tile of the head's products (C, V).

    The gradient of Σ weights · values with respect to the products is written to `out` (C, V), if that is given.
    """
    if not current().compiled:
        return _in_blocks(product, None, rule, weights, transform, temperature, out)
    normalizer, own = log_normalizer(product, transform, temperature), weights.clone()  # no part of other memory
    return _compiled(product, normalizer, rule.normalized(), own, transform, temperature, out)


def _blocks(product: Tensor) -> Iterator[slice]:
    rows = max(1, _BLOCK // product.shape[1]) if product.device.type == "cpu" else len(product)
    return (slice(start, start + rows) for start in range(0, len(product), rows))


def _in_blocks(
    product: Tensor,
    normalizer: Tensor | None,
    rule: Rule,
    weights: Tensor,
    transform: Transform,
    temperature: float,
    out: Tensor | None,
) -> Tensor:
    """`_finish` for a few rows at a time."""
    values = []
    for at in _blocks(product):
        known, gradient = (None if tensor is None else tensor[at] for tensor in (normalizer, out))
        values.append(_finish(product[at], known, rule.at(at), weights[at], transform, temperature, gradient))
    return torch.cat(values)


def _finish(
    product: Tensor,
    normalizer: Tensor | None,
    rule: Rule,
    weights: Tensor,
    transform: Transform,
    temperature: float,
    out: Tensor | None,
) -> Tensor:
    logits = transform(product.to(wide(product.dtype)))
    log_q = log_softmax(logits, temperature, normalizer)
    values, pull = rule(log_q, differentiate=out is not None)
    if pull is not None and out is not None:
        # ∂/∂z_v = h_v − q_v Σ h, then through the temperature and whatever the model does after its product
        grad = torch.addcmul(pull, log_q.exp(), pull.sum(-1, keepdim=True), value=-1)
        out.copy_(transform.chain(grad * (weights[:, None].to(grad.dtype) / temperature), logits))
    return values


class Compiled:
    """A function that is compiled when it is first called, with `torch.compile`'s options.

    Where that does not work it is said once, as `why`, and from then on `instead` is called, or the function as it is.
    """

    def __init__(
        self, function: Callable[..., Any], why: str, instead: Callable[..., Any] | None = None, **options: Any
    ) -> None:
        self._function, self._why, self._instead, self._options = function, why, instead or function, options
        self._kernel: Callable[..., Any] | None = None

    def __call__(self, *args: Any) -> Any:
        # half a second, for which only those who compile should wait
        from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException

        self._kernel = self._kernel or torch.compile(self._function, **self._options)
        try:
            return self._kernel(*args)
        except (TorchDynamoException, FailOnRecompileLimitHit) as error:
            _log.warning("%s: %s", self._why, str(error).partition("\n")[0])
            self._kernel = self._instead
            return self._instead(*args)


_SLOWER = "the loss cannot be compiled here, which makes it slower"
_WHOLE = {"fullgraph": True, "dynamic": True}  # run as it is on a whole tile, either would hold several more tiles
_compiled = Compiled(_finish, _SLOWER, instead=_in_blocks, **_WHOLE)
_compiled_sum = Compiled(_sum, _SLOWER, instead=_sum_in_blocks, **_WHOLE)


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype of softmaxes: float32, or float64 for float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32

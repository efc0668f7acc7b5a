"""The optimizer step, and random numbers keyed by (seed, step, name).

No random number depends on a generator's earlier use. So a resumed run repeats the uninterrupted one, processes draw
the same numbers without communicating, and a response does not depend on the batch or the process that generated it.
"""

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Step:
    """One optimizer step of a run."""

    number: int  # counted from 0
    seed: int = 0
    total: int = 0  # steps of the whole run, 0 if unknown

    def uniform(self, *names: str | int) -> float:
        """A random number in [0, 1) keyed by this step and the names."""
        return self._digest(names) / 2**64

    def stream(self, count: int, *names: str | int) -> Tensor:
        """(count,) float64 random numbers in [0, 1) keyed by this step and the names."""
        generator = torch.Generator().manual_seed(self._digest(names) >> 1)
        return torch.rand(count, generator=generator, dtype=torch.float64)

    def _digest(self, names: tuple[str | int, ...]) -> int:
        text = repr((self.seed, self.number, *names)).encode()
        return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")

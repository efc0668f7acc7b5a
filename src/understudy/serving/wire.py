"""The protocol of `understudy serve`: the messages that client and server send each other.

    GET  /health      is it there? Needs no token
    GET  /info        → `Info`
    GET  /head        → safetensors: weight (V, D), and bias (V,) where there is one
    POST /score       `ScoreRequest` → safetensors: hidden (N, D), or values (N, K), support (N, K) and chosen (N,)
    POST /generate    `GenerateRequest` → `GenerateReply`

N are the trained tokens of all sequences, in their order. Numbers are in the model's dtype, log-probabilities in
float32. Replies carry the fingerprint of the model's weights in a header.
"""

from collections.abc import Mapping
from typing import Annotated, Any

import torch
from pydantic import BaseModel, ConfigDict, Field
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from ..batch import Example
from .client import Unavailable

PROTOCOL = 1
FINGERPRINT = "x-understudy-fingerprint"

_Ids = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]


class _Message(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Info(_Message):
    """What a server says about its model."""

    protocol: int
    version: str  # of understudy
    model: str
    fingerprint: str  # of the weights
    vocabulary: str  # the hash of the tokenizer's tokens
    vocabulary_size: int
    context_length: int | None
    dtype: str
    hidden: bool  # does it send hidden rows and its head?
    scale: float = 1.0  # what the model does to its head's product: logits = c · tanh(scale · product / c)
    softcap: float | None = None  # c


class Sequence(_Message):
    """A prompt and a response; `trained` are the indices in the response whose distributions are asked for."""

    prompt: _Ids
    response: _Ids
    trained: Annotated[list[int], Field(min_length=1)]

    @classmethod
    def of(cls, example: Example) -> "Sequence":
        return cls(prompt=example.prompt, response=example.response, trained=example.trained_tokens)

    def example(self) -> Example:
        trained = set(self.trained)
        return Example(self.prompt, self.response, trained=[i in trained for i in range(len(self.response))])


class ScoreRequest(_Message):
    """The distributions of these sequences: hidden rows, or the log-probabilities of the `top_k` likeliest tokens."""

    sequences: Annotated[list[Sequence], Field(min_length=1)]
    top_k: Annotated[int, Field(ge=1)] | None = None


class GenerateRequest(_Message):
    """Responses to prompts; `sampling` and `step` hold the fields of `Sampling` and `Step`."""

    prompts: Annotated[list[_Ids], Field(min_length=1)]
    rows: list[int]  # of the dataset, one for each prompt
    sampling: dict[str, Any]
    step: dict[str, Any]


class GenerateReply(_Message):
    """`sampling.n` responses to each prompt, one after the other."""

    responses: list[list[int]]
    truncated: list[bool]
    streams: list[dict[str, list[float]]]


def pack(tensors: Mapping[str, Tensor]) -> bytes:
    """Tensors as the bytes of a safetensors file."""
    return save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})


def unpack(content: bytes) -> dict[str, Tensor]:
    """The tensors of `pack`.

    Raises:
        Unavailable: if the bytes are damaged.
    """
    try:
        return load(content)
    except (SafetensorError, ValueError, KeyError):
        raise Unavailable("its reply is damaged") from None


def dtype_name(dtype: torch.dtype) -> str:
    """torch.bfloat16 → bfloat16."""
    return str(dtype).removeprefix("torch.")

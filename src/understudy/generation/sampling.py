"""Sampling: a response's own stream of uniform numbers, and the token that the next of them stands for.

The one idea: every response has its own stream, a function of (seed, step, row), and each token is the inverse of the
cumulative distribution at the next number. So a response does not depend on the batch, the process or the order it was
written in, and sampling costs one pass over the vocabulary (torch.multinomial draws V exponentials per row).

Shapes: R responses, V vocabulary.
"""

from abc import abstractmethod
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn import functional as F

from ..batch import Author, Example
from ..rollout import Rollout
from ..step import Step

_TURNED = 2**28  # weights, a gigabyte of them; more are not copied
_GROUP = 128  # tokens that are summed together before the right ones are looked at one by one


@dataclass
class SamplingRollout(Rollout):
    """Samples from softmax(logits / temperature), restricted to top-k, then top-p; nothing else is applied.

    A model's own `generation_config` is never inherited but for its stop tokens: on-policy means the student's
    distribution as it is trained.
    """

    name: ClassVar[str]  # in recipes

    max_new_tokens: int = 256
    temperature: float = 1.0  # 0 is greedy
    top_k: int = 0  # 0 is off
    top_p: float = 1.0
    responses: int = 1  # per prompt
    stop_ids: list[int] | None = None  # default: the tokenizer's and the model's end-of-sequence ids
    batch_size: int = 64  # rows written at once

    _model: Any = field(default=None, init=False, repr=False)
    _author: Author = field(default="student", init=False, repr=False)
    _stop: list[int] = field(default_factory=list, init=False, repr=False)
    _vocabulary: int = field(default=0, init=False, repr=False)

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1 or self.responses < 1 or self.batch_size < 1:
            raise ValueError(f"{self.name} needs max_new_tokens, responses and batch_size of at least 1")
        if self.temperature < 0 or self.top_k < 0 or not 0 < self.top_p <= 1:
            raise ValueError(f"{self.name} needs temperature >= 0, top_k >= 0 and top_p in (0, 1]")

    def follow(self, model: nn.Module, tokenizer: Any, author: Author = "student") -> "SamplingRollout":
        """As of `Rollout`.

        Raises:
            ValueError: for a model without stop tokens.
        """
        stop = self.stop_ids
        if stop is None:
            stop = sorted({*own_stop_ids(model), *_ids(tokenizer.eos_token_id)})
        if not stop:
            raise ValueError(
                f"the model has no end-of-sequence token: name the stop tokens with rollout.{self.name}.stop_ids"
            )
        self._model, self._author, self._stop, self._vocabulary = model, author, stop, len(tokenizer)
        return self

    @torch.no_grad()
    def generate(self, prompts: Sequence[Example], step: Step) -> list[Example]:
        if self._model is None:
            raise ValueError("this rollout follows no model yet: call follow(model, tokenizer) first")
        seen: Counter[int] = Counter()
        wanted, streams = [], []
        for prompt in prompts:
            for _ in range(self.responses):
                wanted.append(prompt)
                streams.append(step.stream(self.max_new_tokens, self._author, prompt.row, seen[prompt.row]))
                seen[prompt.row] += 1
        self._check_window(max((len(prompt.prompt) for prompt in wanted), default=0))
        uniforms = torch.stack(streams) if streams else torch.empty(0, self.max_new_tokens)
        responses = self._respond([prompt.prompt for prompt in wanted], uniforms)
        return [
            replace(prompt, response=response, author=self._author, truncated=response[-1] not in self._stop)
            for prompt, response in zip(wanted, responses, strict=True)
        ]

    @abstractmethod
    def _respond(self, prompts: list[list[int]], uniforms: Tensor) -> list[list[int]]:
        """A response to each of R prompts; `uniforms` (R, max_new_tokens) in [0, 1).

        R may be 0: a process that has nothing to write still takes part where a sharded model gathers its weights.
        """

    def _check_window(self, longest: int) -> None:
        window = getattr(self._model.config.get_text_config(), "max_position_embeddings", None)
        if window is not None and longest + self.max_new_tokens > window:
            raise ValueError(
                f"a prompt of {longest} tokens and {self.max_new_tokens} new ones do not fit into the model's window "
                f"of {window}: lower max_new_tokens or data.max_prompt_length"
            )

    def _draw(self, logits: Tensor, uniforms: Tensor) -> Tensor:
        """(R,) tokens from logits (R, V) and one number in [0, 1) each."""
        logits = logits[:, : self._vocabulary]
        if self.temperature == 0:
            return logits.argmax(-1)
        logits = logits.float() if self.temperature == 1 else logits.float() / self.temperature
        return inverse_cdf(restrict(logits, self.top_k, self.top_p), uniforms)


def restrict(logits: Tensor, top_k: int = 0, top_p: float = 1.0) -> Tensor:
    """(R, V) with −inf outside the k likeliest tokens, then outside the smallest set of the likeliest with mass >= p.

    Tokens as likely as the k-th stay with it; of those as likely as the last of the mass p, the lowest ids stay.
    """
    if 0 < top_k < logits.shape[-1]:
        logits = logits.masked_fill(logits < logits.topk(top_k).values[:, -1:], -torch.inf)
    if top_p < 1:
        ordered, index = logits.sort(dim=-1, descending=True, stable=True)
        mass = ordered.softmax(-1).cumsum(-1)
        dropped = torch.zeros_like(mass, dtype=torch.bool)
        dropped[:, 1:] = mass[:, :-1] >= top_p  # the mass of the likelier ones is enough; the first is always kept
        logits = logits.masked_fill(torch.zeros_like(dropped).scatter(-1, index, dropped), -torch.inf)
    return logits


def inverse_cdf(logits: Tensor, uniforms: Tensor) -> Tensor:
    """(R,) tokens: the first v with Σ_{u<=v} softmax(logits)_u > uniform, (R, V) and (R,) in [0, 1).

    Summed over groups of tokens first and then within the group that holds the token; sixteen numbers at a time in
    float32, which rounds no more than the numbers themselves are rounded, and beyond that in float64.
    """
    rows, vocabulary = logits.shape
    groups = -(-vocabulary // _GROUP)
    weights = logits.new_empty(rows, groups * _GROUP)
    weights[:, vocabulary:] = 0
    torch.sub(logits, logits.amax(-1, keepdim=True), out=weights[:, :vocabulary]).exp_()
    weights = weights.view(rows, groups, _GROUP)
    ends = weights.unflatten(-1, (-1, 16)).sum(-1).sum(-1, dtype=torch.float64).cumsum(-1)
    target = uniforms[:, None] * ends[:, -1:]
    group = _first_above(ends, target)
    before = F.pad(ends, (1, 0)).gather(-1, group)
    inside = weights[torch.arange(rows, device=logits.device), group[:, 0]].cumsum(-1, dtype=torch.float64)
    return (group * _GROUP + _first_above(inside, target - before))[:, 0]


def _first_above(cumulative: Tensor, target: Tensor) -> Tensor:
    """(R, 1) the first place whose sum exceeds the target, at the latest where the whole is reached: never a zero."""
    reached = torch.searchsorted(cumulative, cumulative[:, -1:].contiguous())
    return torch.minimum(torch.searchsorted(cumulative, target, right=True), reached)


@contextmanager
def writing(model: nn.Module) -> Iterator[None]:
    """Without dropout, whatever the model does in training; a sharded model (FSDP2) with its weights gathered.

    Gathered once and not at every token: that is faster, and each process may write as many tokens as it needs to.
    """
    was_training = model.training
    sharded = [module for module in model.modules() if isinstance(module, FSDPModule)]
    model.eval()
    try:
        for module in sharded:
            module.set_reshard_after_forward(False, recurse=False)
            module.unshard()
        with nullcontext() if sharded else _turned(model):
            yield
    finally:
        model.train(was_training)
        for module in sharded:
            module.reshard()
            module.set_reshard_after_forward(module is not model, recurse=False)  # the default of fully_shard


@contextmanager
def _turned(model: nn.Module) -> Iterator[None]:
    """With the weights of linear layers stored column by column, which several threads of a CPU multiply faster.

    As they are stored otherwise, products of 5 to 48 rows took up to three times as long here; embeddings stay.
    """
    layers = [layer for layer in model.modules() if type(layer) is nn.Linear and _turns(layer)]
    if torch.get_num_threads() == 1 or sum(layer.weight.numel() for layer in layers) > _TURNED:
        layers = []
    kept = [layer.weight for layer in layers]
    try:
        for layer in layers:
            layer.weight = nn.Parameter(layer.weight.detach().t().contiguous().t(), requires_grad=False)
        yield
    finally:
        for layer, weight in zip(layers, kept, strict=True):
            layer.weight = weight


def _turns(layer: nn.Module) -> bool:
    weight: Any = layer._parameters.get("weight")
    whole = type(weight) is nn.Parameter and not hasattr(weight, "ds_id")  # not FSDP's or ZeRO's part of one
    return whole and weight.device.type == "cpu" and weight.dtype == torch.float32


def own_stop_ids(model: Any) -> list[int]:
    """The tokens that a model itself says it ends with; None stands for no model."""
    return _ids(getattr(getattr(model, "generation_config", None), "eos_token_id", None))


def _ids(value: int | list[int] | None) -> list[int]:
    return [] if value is None else [value] if isinstance(value, int) else list(value)

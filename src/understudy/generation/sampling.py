"""Draw tokens by inverse transform sampling: temperature, top-k, top-p, and a random stream for each response.

Every response has its own stream of uniform numbers, a function of (seed, step, author, row), and each token is the
inverse of the cumulative distribution at the next number. So a response does not depend on the batch, the process or
the order it was generated in, and sampling costs one pass over the vocabulary (torch.multinomial draws V exponentials
per row).

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
from torch.nn import functional as F

from ..batch import Author, Example
from ..models.context_window import context_window
from ..models.sharding import gathered, is_sharded
from ..models.vocabulary import vocabulary_size
from ..rollout import SAMPLED_LOGPROB, Rollout, with_response
from ..sampling import Sampling
from ..step import Step
from .stop_tokens import stop_ids

_COLUMN_MAJOR_LIMIT = 2**28  # weights, 1 GiB in float32; larger models are not copied
UNDEFINED = -1  # in place of a token, where the largest logit or the sum of probabilities is infinite or NaN
_GROUP = 128  # tokens per group; probabilities are summed by group, then within one group


@dataclass
class Binding:
    """The model that a rollout generates with, and what follows from it and its tokenizer."""

    model: Any
    author: Author
    vocabulary: int  # ids of the tokenizer; a padded vocabulary beyond them is never drawn
    stop_ids: tuple[int, ...]  # where the sampling names none
    verified: bool = False  # has an engine compared its logits with the model's own?
    twin: Any = None  # a second module of the model, for another thread


@dataclass(frozen=True)
class Response:
    """The tokens of one response and, for a sampling with `logprobs`, their log-probabilities under the model."""

    tokens: list[int]
    log_probs: list[float] | None = None


@dataclass
class SamplingRollout(Rollout):
    """Base class of rollouts that sample in this process: random streams, stop tokens, the context window.

    Of a model's own `generation_config` only the stop tokens are used: on-policy means the student's distribution as it
    is trained.
    """

    name: ClassVar[str]  # in recipes

    batch_size: int = 64  # sequences generated at once

    _binding: Binding | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ValueError(f"{self.name} needs batch_size >= 1, not {self.batch_size}")

    def bind(self, model: nn.Module, tokenizer: Any, author: Author = "student") -> "SamplingRollout":
        """See `Rollout`."""
        return self._bound_to(Binding(model, author, vocabulary_size(tokenizer), tuple(stop_ids(tokenizer, model))))

    @property
    def is_bound(self) -> bool:
        """See `Rollout`."""
        return self._binding is not None

    def with_batch_size(self, batch_size: int) -> "SamplingRollout":
        """See `Rollout`."""
        return self._bound_to(self._binding, batch_size=batch_size)

    def _bound_to(self, binding: Binding | None, **changes: Any) -> "SamplingRollout":
        rollout = replace(self, **changes)
        rollout._binding = binding
        return rollout

    @property
    def _bound(self) -> Binding:
        if self._binding is None:
            raise ValueError("this rollout has no model yet: bind(model, tokenizer) returns one that has")
        return self._binding

    @torch.no_grad()
    def generate(self, prompts: Sequence[Example], sampling: Sampling, step: Step) -> list[Example]:
        """See `Rollout`.

        Raises:
            ValueError: for prompts that leave no room in the context window, and for a model without stop tokens.
        """
        bound = self._bound
        if not sampling.stop_ids:
            sampling = replace(sampling, stop_ids=bound.stop_ids)
        if not sampling.stop_ids:
            raise ValueError(
                f"the model has no end-of-sequence token: name the stop tokens with rollout.{self.name}.stop_ids"
            )
        count: Counter[int] = Counter()  # responses to each row so far
        repeated, streams = [], []
        for prompt in prompts:
            for _ in range(sampling.n):
                repeated.append(prompt)
                streams.append(step.stream(sampling.max_new_tokens, bound.author, prompt.row, count[prompt.row]))
                count[prompt.row] += 1
        read = [(e.teacher_prompt if bound.author == "teacher" else None) or e.prompt for e in repeated]
        _check_context_window(bound.model, max(map(len, read), default=0), sampling.max_new_tokens)
        uniforms = torch.stack(streams) if streams else torch.empty(0, sampling.max_new_tokens)
        responses = self._respond(read, uniforms, sampling)
        return [_example(e, r, bound.author, sampling) for e, r in zip(repeated, responses, strict=True)]

    @abstractmethod
    def _respond(self, prompts: list[list[int]], uniforms: Tensor, sampling: Sampling) -> list[Response]:
        """A response to each of R prompts; `uniforms` (R, max_new_tokens) in [0, 1); `sampling` has stop tokens.

        R may be 0: a process without prompts still takes part where a sharded model gathers its weights.
        """


def _example(prompt: Example, response: Response, author: Author, sampling: Sampling) -> Example:
    streams = {} if response.log_probs is None else {SAMPLED_LOGPROB: response.log_probs}
    truncated = response.tokens[-1] not in sampling.stop_ids
    return with_response(prompt, response.tokens, author, truncated, streams)


def _check_context_window(model: Any, longest: int, max_new_tokens: int) -> None:
    window = context_window(model.config)
    if window is not None and longest + max_new_tokens > window:
        raise ValueError(
            f"a prompt of {longest} tokens and {max_new_tokens} new ones do not fit into the model's context window "
            f"of {window}: lower max_new_tokens or data.max_prompt_length"
        )


def draw(logits: Tensor, uniforms: Tensor, sampling: Sampling) -> Tensor:
    """(R,) tokens from logits (R, V) of the real vocabulary and one number in [0, 1) each.

    Logits that are no distribution give `UNDEFINED`. Tokens must be checked with `check_tokens` before they are used as
    indices; not here, because the caller can read all that it needs from a GPU at once.
    """
    if sampling.temperature == 0:
        largest = logits.max(-1)
        return largest.indices.where(largest.values.isfinite(), UNDEFINED)
    logits = logits.float() if sampling.temperature == 1 else logits.float() / sampling.temperature
    return inverse_cdf(restrict(logits, sampling.top_k, sampling.top_p), uniforms)


def log_probs_of(logits: Tensor, tokens: Tensor) -> Tensor:
    """(R,) log softmax(logits) at `tokens` (R,), from logits (R, V), in float32."""
    logits = logits.float()
    return logits.gather(-1, tokens[:, None])[:, 0] - logits.logsumexp(-1)


def restrict(logits: Tensor, top_k: int = 0, top_p: float = 1.0) -> Tensor:
    """Top-k and top-p: (R, V) with −inf outside the k likeliest tokens, then outside the smallest set of mass >= p.

    All tokens as likely as the k-th stay; of tokens as likely as the last one of the top-p set, the lowest ids stay.
    """
    if 0 < top_k < logits.shape[-1]:
        logits = logits.masked_fill(logits < logits.topk(top_k).values[:, -1:], -torch.inf)
    if top_p < 1:
        ordered, index = logits.sort(dim=-1, descending=True, stable=True)
        mass = ordered.softmax(-1).cumsum(-1)
        dropped = torch.zeros_like(mass, dtype=torch.bool)
        dropped[:, 1:] = mass[:, :-1] >= top_p  # the mass of the likelier ones is enough; the first always stays
        logits = logits.masked_fill(torch.zeros_like(dropped).scatter(-1, index, dropped), -torch.inf)
    return logits


def inverse_cdf(logits: Tensor, uniforms: Tensor) -> Tensor:
    """Inverse transform sampling: (R,) tokens, the first v with Σ_{u<=v} softmax(logits)_u > uniform, (R,) in [0, 1).

    Probabilities are summed over groups of tokens first, and then within the group of the sampled token; sixteen at a
    time in float32, whose rounding is no larger than that of the probabilities, and beyond that in float64. Logits that
    are no distribution give `UNDEFINED`.
    """
    rows, vocabulary = logits.shape
    groups = -(-vocabulary // _GROUP)
    weights = logits.new_empty(rows, groups * _GROUP)
    weights[:, vocabulary:] = 0
    torch.sub(logits, logits.amax(-1, keepdim=True), out=weights[:, :vocabulary]).exp_()
    weights = weights.view(rows, groups, _GROUP)
    ends = weights.unflatten(-1, (-1, 16)).sum(-1).sum(-1, dtype=torch.float64).cumsum(-1)
    defined = ends[:, -1:].isfinite()
    ends = ends.where(defined, 1)  # NaN has no place in a search
    target = uniforms[:, None] * ends[:, -1:]
    group = _first_above(ends, target)
    before = F.pad(ends, (1, 0)).gather(-1, group)
    inside = weights[torch.arange(rows, device=logits.device), group[:, 0]].cumsum(-1, dtype=torch.float64)
    return (group * _GROUP + _first_above(inside, target - before)).where(defined, UNDEFINED)[:, 0]


def check_tokens(smallest: int) -> None:
    """Refuse tokens of which one is `UNDEFINED`, given the smallest of them.

    Raises:
        FloatingPointError: because the model's logits are no distribution.
    """
    if smallest == UNDEFINED:
        raise FloatingPointError(
            "the model's next-token distribution is not a number, so no token can be drawn: its weights are damaged or "
            "its activations overflow; use an earlier checkpoint, or a dtype with a wider range such as float32"
        )


def _first_above(cumulative: Tensor, target: Tensor) -> Tensor:
    """(R, 1) the first index whose sum exceeds the target, at most the first with the total: never of probability 0."""
    reached = torch.searchsorted(cumulative, cumulative[:, -1:].contiguous())
    return torch.minimum(torch.searchsorted(cumulative, target, right=True), reached)


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Evaluation mode within this block, without dropout."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


@contextmanager
def generation_mode(model: nn.Module) -> Iterator[None]:
    """Evaluation mode within this block; a sharded model with its weights gathered."""
    with evaluation_mode(model), gathered(model), nullcontext() if is_sharded(model) else _column_major_weights(model):
        yield


@contextmanager
def _column_major_weights(model: nn.Module) -> Iterator[None]:
    """Store the weights of linear layers column-major within this block: faster with several threads of a CPU.

    With row-major weights products of 5 to 48 rows took up to three times as long. Embeddings are left alone.
    """
    layers = [layer for layer in model.modules() if type(layer) is nn.Linear and _can_be_column_major(layer)]
    if torch.get_num_threads() == 1 or sum(layer.weight.numel() for layer in layers) > _COLUMN_MAJOR_LIMIT:
        layers = []
    weights = [layer.weight for layer in layers]
    try:
        for layer in layers:
            layer.weight = nn.Parameter(layer.weight.detach().t().contiguous().t(), requires_grad=False)
        yield
    finally:
        for layer, weight in zip(layers, weights, strict=True):
            layer.weight = weight


def _can_be_column_major(layer: nn.Module) -> bool:
    weight: Any = layer._parameters.get("weight")
    return type(weight) is nn.Parameter and weight.device.type == "cpu" and weight.dtype == torch.float32

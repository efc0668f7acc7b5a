"""Responses written by transformers' continuous batching: a paged key-value cache, rows that come and go at any token.

The one idea: transformers schedules and runs the model, and this rollout draws the tokens. It stands in the place of a
logits processor, where every row is known by its request and its position, and leaves one token to choose. So what is
drawn is `generate`'s to the token (the inverse of the cumulative distribution at the next number of the response's own
stream), whatever was scheduled together.

Shapes: R responses, V vocabulary, S the requests that get a token in one forward.
"""

import logging
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import ceil, lcm
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers import ContinuousBatchingConfig, GenerationConfig, LogitsProcessorList
from transformers import __version__ as transformers_version
from transformers.generation.continuous_batching import cb_logits_processors as processors

from ..batch import Author
from ..generation.sampling import SamplingRollout, writing
from ..models.adapters import without_adapters

NEEDS = (5, 23)  # of transformers, the first whose logits processors are known to work as this one does
_SERVED = {"full_attention", "sliding_attention"}  # the kinds of layers that have a paged cache
_FORWARD = 1024  # tokens of prompts that are read in one forward, beside a token for each row
_AGREE = 0.05  # how far logits may be from the model's own, as a share of their spread; bfloat16 needs a hundredth


@dataclass
class ContinuousRollout(SamplingRollout):
    """Hands everything to transformers at once; `batch_size` rows fit into the cache, and the others wait for room."""

    name: ClassVar[str] = "continuous"

    _tried: bool = field(default=False, init=False, repr=False)

    def follow(self, model: nn.Module, tokenizer: Any, author: Author = "student") -> SamplingRollout:
        """As of `Rollout`.

        Raises:
            ValueError: for a model without stop tokens, and for one that has no paged attention.
        """
        _check_served(without_adapters(model))
        self._tried = False
        return super().follow(model, tokenizer, author)

    def _respond(self, prompts: list[list[int]], uniforms: Tensor) -> list[list[int]]:
        if not prompts:
            return []
        try:
            with _undisturbed(self._model), writing(self._model):
                if not self._tried:
                    self._try([prompts[0], prompts[-1]])
                return self._write(prompts, self._sampler(uniforms))
        except MemoryError as error:  # transformers' own reckoning, before anything is taken
            raise ValueError(
                f"the cache for {self.batch_size} rows does not fit into memory: lower "
                "rollout.continuous.batch_size or max_new_tokens"
            ) from error

    def _sampler(self, uniforms: Tensor) -> "_Sampler":
        device = self._model.get_input_embeddings().weight.device
        return _Sampler(uniforms.to(device), self._draw)

    def _write(self, prompts: list[list[int]], sampler: "_Sampler") -> list[list[int]]:
        """A response to each of R prompts, of at most as many tokens as the sampler has numbers for it."""
        most = sampler.uniforms.shape[1]
        for request, prompt in enumerate(prompts):
            sampler.starts[str(request)] = request * most - len(prompt)
        greedy = GenerationConfig(max_new_tokens=most, do_sample=False, eos_token_id=self._stop)
        manager = without_adapters(self._model).init_continuous_batching(greedy, self._room(prompts, most))
        chosen = processors.ContinuousBatchingLogitsProcessorList(LogitsProcessorList([sampler]))
        chosen.tensors_required = 1
        manager.logit_processor = chosen
        written: dict[str, list[int]] = {}
        try:
            for request, prompt in enumerate(prompts):  # before the start: what is scheduled depends on no clock
                manager.add_request(prompt, str(request), max_new_tokens=most, eos_token_id=self._stop)
            manager.start()
            while len(written) < len(prompts):
                result = manager.get_result(timeout=1)
                if result is not None and result.error is None:
                    written[result.request_id] = result.generated_tokens
                elif result is not None or not manager.is_running():
                    break
        finally:
            manager.stop(block=True, hard_stop=True)
            manager.destroy()
        if len(written) < len(prompts):
            error = manager.background_thread_status.fatal_error
            raise error or RuntimeError("continuous batching stopped half-way")
        return [written[str(request)] for request in range(len(prompts))]

    def _room(self, prompts: list[list[int]], most: int) -> ContinuousBatchingConfig:
        """A cache for the rows that are written at once, and no more; transformers would take most of the memory.

        Layers of one kind take memory by the sector, of which each kind may leave one half empty.
        """
        rows = min(len(prompts), self.batch_size)
        layers = Counter(_layers(without_adapters(self._model)))
        spare = ceil(len(layers) * lcm(*layers.values()) / layers.total())
        pages = ceil((max(map(len, prompts)) + most) / ContinuousBatchingConfig.page_size)
        return ContinuousBatchingConfig(
            num_blocks=rows * pages + spare,
            max_requests_per_batch=rows,
            max_batch_tokens=max(rows, min(sum(map(len, prompts)), _FORWARD)),
            safety_margin=0.0,
            allow_block_sharing=False,
            auto_switch_to_flash=False,  # the student samples with the attention that it is trained with
            use_cuda_graph=False,  # graphs would be captured anew at every call
            seed=0,  # of a generator that nothing is drawn from
        )

    def _try(self, prompts: list[list[int]]) -> None:
        """Two tokens, whose logits must be the model's own: not every model says what its attention needs.

        Raises:
            ValueError: where they are not, or where the model cannot be run at all.
        """
        most = min(2, self.max_new_tokens)
        sampler = self._sampler(torch.zeros(len(prompts), most))
        sampler.kept = {}
        try:
            written = self._write(prompts, sampler)
        except (MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            raise _refusal(without_adapters(self._model), f"it fails with “{error}”") from error
        for request, (prompt, response) in enumerate(zip(prompts, written, strict=True)):
            ids = torch.tensor([prompt + response[:-1]], device=sampler.uniforms.device)
            own = self._model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0, -len(response) :].float()
            paged = torch.stack([sampler.kept[request * most + place] for place in range(len(response))])
            apart = float((paged - own).std() / own.std())
            if not apart < _AGREE:
                raise _refusal(without_adapters(self._model), f"its logits would be {apart:.0%} of their spread off")
        self._tried = True


class _Sampler(processors.ContinuousBatchingLogitsProcessor):
    """Draws the token of each request from its logits, and leaves it as the only one to choose.

    `uniforms` (R, max_new_tokens) are in [0, 1). What transformers carries from a request to its row of logits is one
    int32: the place, in all uniforms one after the other, of the number that belongs to its next token.
    """

    supported_kwargs: ClassVar[dict[str, type]] = {}
    ignored_kwargs = ()

    def __init__(self, uniforms: Tensor, draw: Callable[[Tensor, Tensor], Tensor]) -> None:
        self.uniforms, self.draw = uniforms, draw
        self.starts: dict[str, int] = {}  # of each request: the place of its first number, less its prompt's length
        self.kept: dict[int, Tensor] | None = None  # logits by place, where they are asked for

    def fill_defaults(self, int32_tensor: Tensor) -> None:
        int32_tensor.zero_()

    def prepare_tensor_args(self, requests_with_new_token: list[Any]) -> Tensor:
        """(S,) places; a position counts prompt and response, also of a request that was put off and read anew."""
        states = [request.state for request in requests_with_new_token]
        return torch.tensor([self.starts[s.request_id] + s.position_offset for s in states], dtype=torch.int32)

    def __call__(self, scores: Tensor, tensor_arg: Tensor) -> Tensor:
        """(S, V) with 1 at the token that was drawn and 0 elsewhere, from logits (S, V)."""
        places = tensor_arg[: len(scores)].long()
        if self.kept is not None:
            self.kept |= dict(zip(places.tolist(), scores.clone(), strict=True))
        tokens = self.draw(scores, self.uniforms.flatten()[places])
        return torch.zeros_like(scores).scatter_(-1, tokens[:, None], 1)


def _layers(bare: Any) -> list[str]:
    """What each layer attends to, as transformers' paged cache sorts them."""
    config = bare.config.get_text_config()
    alike = "sliding_attention" if getattr(config, "sliding_window", None) is not None else "full_attention"
    return getattr(config, "layer_types", None) or [alike] * config.num_hidden_layers


def new_enough() -> bool:
    return tuple(map(int, transformers_version.split(".")[:2])) >= NEEDS


def _check_served(bare: Any) -> None:
    if not new_enough():
        needs = ".".join(map(str, NEEDS))
        raise _refusal(bare, f"that needs transformers {needs} or later, and this is {transformers_version}")
    if not getattr(bare, "_supports_attention_backend", False):
        raise _refusal(bare, "its attention cannot be exchanged for a paged one")
    if other := sorted(set(_layers(bare)) - _SERVED):
        raise _refusal(bare, f"there is no paged cache for layers of {' and '.join(other)}")
    if getattr(bare.config.get_text_config(), "attn_logit_softcapping", None):
        raise _refusal(bare, "paged attention leaves out its soft-cap")


def _refusal(bare: Any, why: str) -> ValueError:
    return ValueError(f"continuous batching cannot write for {type(bare).__name__}: {why}; use rollout generate")


@contextmanager
def _undisturbed(model: nn.Module) -> Iterator[None]:
    """Attention, mixed precision and random generators are given back as they were, and nothing is logged.

    transformers seeds torch's generators when it begins, and switches eager attention to a paged one. Its cache has one
    dtype, the weights': so autocast, which Accelerate lays over `forward` on the instance, is lifted off. What fails is
    raised here, and its log would only say it twice.
    """
    bare: Any = without_adapters(model)
    if any(isinstance(module, FSDPModule) for module in model.modules()):
        raise _refusal(bare, "it is sharded (FSDP)")
    before, device = bare.config._attn_implementation, bare.device
    log = logging.getLogger("ContinuousBatchingLogger")
    silent, log.disabled = log.disabled, True
    laid_over = vars(bare).pop("forward", None)
    try:
        with torch.random.fork_rng([] if device.type == "cpu" else [device]):
            yield
    finally:
        log.disabled = silent
        if laid_over is not None:
            bare.forward = laid_over
        if bare.config._attn_implementation != before:
            bare.set_attn_implementation(before)

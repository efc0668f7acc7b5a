"""Generate responses by transformers' continuous batching: a paged key-value cache, requests joining as others end.

transformers schedules and runs the model, and this rollout samples the tokens: as a logits processor, which knows the
request and position of every row, and leaves a single token to choose. So the tokens are those of rollout generate (the
inverse of the cumulative distribution at the next number of the response's own stream), however requests are scheduled.

Shapes: R responses, V vocabulary, S rows of logits in one forward, one for each request.
"""

import logging
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import ceil, lcm
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import ContinuousBatchingConfig, GenerationConfig, LogitsProcessorList
from transformers import __version__ as transformers_version
from transformers.generation.continuous_batching import cb_logits_processors as processors

from ..batch import Author
from ..generation.sampling import Response, SamplingRollout, check_tokens, draw, generation_mode, log_probs_of
from ..models.adapters import without_adapters
from ..models.sharding import is_sharded
from ..sampling import Sampling

MIN_TRANSFORMERS = (5, 23)  # the first version with the interface of logits processors that is used here
_PAGED = {"full_attention", "sliding_attention"}  # the kinds of layers that have a paged cache
_PREFILL_TOKENS = 1024  # prompt tokens per forward
_MAX_LOGITS_ERROR = 0.05  # largest error of logits, over the standard deviation of the model's own; bfloat16: 0.01


@dataclass
class ContinuousRollout(SamplingRollout):
    """Generates with transformers' continuous batching; the cache has room for `batch_size` rows, further ones wait."""

    name: ClassVar[str] = "continuous"

    def bind(self, model: nn.Module, tokenizer: Any, author: Author = "student") -> SamplingRollout:
        """See `Rollout`.

        Raises:
            ValueError: for a model that has no paged attention.
        """
        _check_supported(without_adapters(model))
        return super().bind(model, tokenizer, author)

    def _respond(self, prompts: list[list[int]], uniforms: Tensor, sampling: Sampling) -> list[Response]:
        if not prompts:
            return []
        model = self._bound.model
        try:
            with _restored(model), generation_mode(model):
                if not self._bound.verified:
                    self._verify([prompts[0], prompts[-1]], sampling)
                return self._generate(prompts, self._sampler(uniforms, sampling))
        except MemoryError as error:  # transformers' own estimate, before anything is allocated
            raise ValueError(
                f"the cache for {self.batch_size} rows does not fit into memory: lower "
                "rollout.continuous.batch_size or max_new_tokens"
            ) from error

    def _sampler(self, uniforms: Tensor, sampling: Sampling) -> "_Sampler":
        device = self._bound.model.get_input_embeddings().weight.device
        rows = min(len(uniforms), self.batch_size)
        return _Sampler(uniforms.to(device), sampling, self._bound.vocabulary, rows)

    def _generate(self, prompts: list[list[int]], sampler: "_Sampler") -> list[Response]:
        """A response to each of R prompts, of at most as many tokens as the sampler has random numbers for it."""
        longest = sampler.uniforms.shape[1]
        for request, prompt in enumerate(prompts):
            sampler.starts[str(request)] = request * longest - len(prompt)
        stop = list(sampler.sampling.stop_ids)
        greedy = GenerationConfig(max_new_tokens=longest, do_sample=False, eos_token_id=stop)
        bare = without_adapters(self._bound.model)
        manager = bare.init_continuous_batching(greedy, self._cache_config(prompts, longest))
        processor_list = processors.ContinuousBatchingLogitsProcessorList(LogitsProcessorList([sampler]))
        processor_list.tensors_required = 1
        manager.logit_processor = processor_list
        responses: dict[str, list[int]] = {}
        try:
            for request, prompt in enumerate(prompts):  # before the start, so that scheduling does not depend on time
                manager.add_request(prompt, str(request), max_new_tokens=longest, eos_token_id=stop)
            manager.start()
            while len(responses) < len(prompts):
                result = manager.get_result(timeout=1)
                if result is not None and result.error is None:
                    responses[result.request_id] = result.generated_tokens
                elif result is not None or not manager.is_running():
                    break
        finally:
            manager.stop(block=True, hard_stop=True)
            manager.destroy()
        if len(responses) < len(prompts):
            error = manager.background_thread_status.fatal_error
            raise error or RuntimeError("transformers' continuous batching stopped early; use rollout generate")
        log_probs = sampler.log_probs_by_request()
        return [
            Response(tokens, None if log_probs is None else log_probs[request][: len(tokens)])
            for request, tokens in enumerate(responses[str(i)] for i in range(len(prompts)))
        ]

    def _cache_config(self, prompts: list[list[int]], longest: int) -> ContinuousBatchingConfig:
        """A cache only for the rows that are generated at once; by default transformers takes most of the memory.

        Memory is allocated in sectors, and each kind of layer may leave one partly empty.
        """
        rows = min(len(prompts), self.batch_size)
        layers = Counter(_layers(without_adapters(self._bound.model)))
        spare = ceil(len(layers) * lcm(*layers.values()) / layers.total())
        pages = ceil((max(map(len, prompts)) + longest) / ContinuousBatchingConfig.page_size)
        return ContinuousBatchingConfig(
            num_blocks=rows * pages + spare,
            max_requests_per_batch=rows,
            max_batch_tokens=max(rows, min(sum(map(len, prompts)), _PREFILL_TOKENS)),
            safety_margin=0.0,
            allow_block_sharing=False,
            auto_switch_to_flash=False,  # the student samples with the attention that it is trained with
            use_cuda_graph=False,  # graphs would be captured again at every call
            seed=0,  # of a generator that is not used
        )

    def _verify(self, prompts: list[list[int]], sampling: Sampling) -> None:
        """Generate two tokens and compare their logits with the model's own forward.

        Some models do not declare that their attention cannot be paged.

        Raises:
            ValueError: if the logits differ, or if the model cannot be run at all.
        """
        model = self._bound.model
        longest = min(2, sampling.max_new_tokens)
        sampler = self._sampler(torch.zeros(len(prompts), longest), sampling)
        sampler.logits = {}
        try:
            responses = self._generate(prompts, sampler)
        except (MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            raise _unsupported(without_adapters(model), f"it fails with “{error}”") from error
        for request, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
            tokens = response.tokens
            ids = torch.tensor([prompt + tokens[:-1]], device=sampler.uniforms.device)
            own = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0, -len(tokens) :].float()
            paged = torch.stack([sampler.logits[request * longest + place] for place in range(len(tokens))])
            error = float((paged - own).std() / own.std())
            if not error < _MAX_LOGITS_ERROR:
                raise _unsupported(
                    without_adapters(model), f"its logits would be off by {error:.0%} of their standard deviation"
                )
        self._bound.verified = True


class _Sampler(processors.ContinuousBatchingLogitsProcessor):
    """Logits processor that samples the token of each request, and leaves it as the only one to choose.

    `uniforms` (R, max_new_tokens) are in [0, 1). transformers carries one int32 from a request to its row of logits:
    the place, in the flattened uniforms, of the number for its next token. Requests whose prompt is not yet read to its
    end also have rows of logits, the last ones: their place is −1, and their tokens are ignored.
    """

    supported_kwargs: ClassVar[dict[str, type]] = {}
    ignored_kwargs = ()

    def __init__(self, uniforms: Tensor, sampling: Sampling, vocabulary: int, rows: int) -> None:
        """`rows`: the largest number of requests in one forward."""
        self.uniforms, self.sampling, self.vocabulary, self.rows = uniforms, sampling, vocabulary, rows
        self.starts: dict[str, int] = {}  # of each request: the place of its first number, minus its prompt's length
        self.logits: dict[int, Tensor] | None = None  # by place; None: not stored
        count = uniforms.numel() + 1  # the last one is for place −1
        self.log_probs = torch.zeros(count, device=uniforms.device) if sampling.logprobs else None

    def log_probs_by_request(self) -> list[list[float]] | None:
        """(R, max_new_tokens) log-probabilities of the sampled tokens, for a sampling with `logprobs`."""
        return None if self.log_probs is None else self.log_probs[:-1].view(self.uniforms.shape).tolist()

    def fill_defaults(self, int32_tensor: Tensor) -> None:
        int32_tensor.fill_(-1)

    def prepare_tensor_args(self, requests_with_new_token: list[Any]) -> Tensor:
        """(rows,) places. A position counts prompt and response, also of a request that was evicted and read again."""
        states = [request.state for request in requests_with_new_token]
        places = [self.starts[s.request_id] + s.position_offset for s in states]
        return torch.tensor(places + [-1] * (self.rows - len(places)), dtype=torch.int32)

    def __call__(self, scores: Tensor, tensor_arg: Tensor) -> Tensor:
        """(S, V) with 1 at the sampled token and 0 elsewhere, from logits (S, V)."""
        places = tensor_arg[: len(scores)].long()
        if self.logits is not None:
            self.logits |= dict(zip(places.tolist(), scores.clone(), strict=True))
        logits = scores[:, : self.vocabulary]
        tokens = draw(logits, self.uniforms.flatten()[places], self.sampling)
        check_tokens(int(tokens.min()))
        if self.log_probs is not None:
            self.log_probs[places] = log_probs_of(logits, tokens)
        return torch.zeros_like(scores).scatter_(-1, tokens[:, None], 1)


def _layers(bare: Any) -> list[str]:
    """The attention type of each layer, as in transformers' paged cache."""
    config = bare.config.get_text_config()
    layer_type = "sliding_attention" if getattr(config, "sliding_window", None) is not None else "full_attention"
    return getattr(config, "layer_types", None) or [layer_type] * config.num_hidden_layers


def is_available() -> bool:
    """Is transformers new enough for continuous batching?"""
    return tuple(map(int, transformers_version.split(".")[:2])) >= MIN_TRANSFORMERS


def _check_supported(bare: Any) -> None:
    if not is_available():
        needed = ".".join(map(str, MIN_TRANSFORMERS))
        raise _unsupported(bare, f"that needs transformers {needed} or later, and this is {transformers_version}")
    if not getattr(bare, "_supports_attention_backend", False):
        raise _unsupported(bare, "its attention cannot be exchanged for a paged one")
    if kinds := sorted(set(_layers(bare)) - _PAGED):
        raise _unsupported(bare, f"there is no paged cache for layers of {' and '.join(kinds)}")
    if getattr(bare.config.get_text_config(), "attn_logit_softcapping", None):
        raise _unsupported(bare, "paged attention leaves out its soft-cap")


def _unsupported(bare: Any, reason: str) -> ValueError:
    return ValueError(f"continuous batching cannot generate with {type(bare).__name__}: {reason}; use rollout generate")


@contextmanager
def _restored(model: nn.Module) -> Iterator[None]:
    """Restore the model's attention, mixed precision and the random generators afterwards; disable the logger.

    transformers seeds torch's generators at the start, and switches eager attention to a paged one. Its cache has one
    dtype, that of the weights, so autocast, which Accelerate sets as `forward` of the instance, is removed. Errors are
    raised to the caller, so its logger would only repeat them.
    """
    bare: Any = without_adapters(model)
    if is_sharded(model):
        raise _unsupported(bare, "its weights are sharded over processes")
    before, device = bare.config._attn_implementation, bare.device
    log = logging.getLogger("ContinuousBatchingLogger")
    was_disabled, log.disabled = log.disabled, True
    autocast_forward = vars(bare).pop("forward", None)
    try:
        with torch.random.fork_rng([] if device.type == "cpu" else [device]):
            yield
    finally:
        log.disabled = was_disabled
        if autocast_forward is not None:
            bare.forward = autocast_forward
        if bare.config._attn_implementation != before:
            bare.set_attn_implementation(before)

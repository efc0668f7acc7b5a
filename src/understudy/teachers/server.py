"""A teacher behind HTTP: `understudy serve`, which sends hidden rows, or vLLM, which sends the top K tokens."""

from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import replace
from typing import Any, Literal, cast

import torch
from torch import Tensor

from ..batch import Batch, Example
from ..fused_linear.distributions import Projected
from ..fused_linear.merged import TopK
from ..method import from_all_processes, is_distributed
from ..rollout import Rollout
from ..scores import Scores
from ..serving.client import Client, bearer_token
from ..serving.responses import ServedRollout
from ..serving.understudy_protocol import UnderstudyProtocol
from ..serving.vllm_protocol import DEFAULT_TOP_K, VLLMProtocol
from ..teacher import Capability, Teacher, TeacherError


class ServerTeacher(Teacher):
    """Scores by one server or several with the same model; all micro-batches of a step are asked for at once.

    Args:
        url: `http://host:port`, or a list of them: replicas, among which the sequences are divided.
        protocol: `understudy` for `understudy serve`; `vllm` for vLLM and what speaks its schema.
        top_k: ask for the log-probabilities of this many of the likeliest tokens and of the chosen one; by default
            `understudy` sends hidden rows, which give those of all tokens, and `vllm` 20 tokens.
        tokenizer: name or folder of the teacher's tokenizer, to be compared with the student's in detail.
        model: which of the models that a vLLM server offers.
        timeout: seconds for one request.
        wait: seconds for which a server may be away before the run ends, with a checkpoint.
        token_env: the environment variable that holds the server's bearer token.
    """

    provides = frozenset({Capability.CHOSEN, Capability.TOP_K, Capability.FULL})

    def __init__(
        self,
        url: str | list[str],
        *,
        protocol: Literal["understudy", "vllm"] = "understudy",
        top_k: int | None = None,
        tokenizer: str | None = None,
        model: str | None = None,
        timeout: float = 60.0,
        wait: float = 300.0,
        token_env: str | None = None,
        _transport: Any = None,
    ) -> None:
        if top_k is not None and top_k < 1:
            raise ValueError(f"top_k is a number of tokens, at least 1, and not {top_k}")
        if not (timeout > 0 and wait >= 0):
            raise ValueError(f"timeout ({timeout:g}) and wait ({wait:g}) are seconds: give positive numbers")
        if model is not None and protocol != "vllm":
            raise ValueError("model is for the protocol vllm; `understudy serve` has one model: leave it out")
        urls = [url] if isinstance(url, str) else url
        self._client = Client(urls, timeout, wait, bearer_token(token_env), _transport)
        if protocol == "vllm":
            self._protocol = VLLMProtocol(top_k or DEFAULT_TOP_K, model, compared=tokenizer is not None)
        else:
            self._protocol = UnderstudyProtocol(top_k)
        self._tokenizer, self._device, self._connected = tokenizer, torch.device("cpu"), False
        self._pending: dict[tuple[Any, ...], list[Future[Projected | TopK]]] = {}
        if protocol == "vllm" or top_k is not None:
            self.provides = frozenset({Capability.CHOSEN, Capability.TOP_K})

    @property
    def tokenizer_name(self) -> str | None:
        return self._tokenizer

    @property
    def fingerprint(self) -> str | None:
        return self._protocol.fingerprint

    @property
    def context_length(self) -> int | None:
        return self._protocol.context_length

    def setup(self, tokenizer: Any) -> None:
        """Compare the tokenizers, and prove that every server's scores are reproducible and in their places; once."""
        if not self._connected:
            self._protocol.connect(self._client, tokenizer)
            self._protocol.to(self._device)
            self._connected = True

    def to(self, device: torch.device) -> None:
        self._device = device
        self._protocol.to(device)

    def prefetch(self, batches: Sequence[Batch]) -> None:
        self.setup(None)
        for future in (future for futures in self._pending.values() for future in futures):
            future.cancel()  # of a step that was given up
        examples = [batch.as_read_by_teacher().examples for batch in batches]
        self._pending = {_key(part): self._ask(part) for part in examples}
        if is_distributed():
            self._agree()

    def score(self, batch: Batch) -> Scores:
        self.setup(None)
        examples = batch.as_read_by_teacher().examples
        futures = self._pending.pop(_key(examples), None) or self._ask(examples)
        return Scores(batch.tokens, _joined([future.result() for future in futures], batch.tokens.device))

    def rollout(self) -> Rollout | None:
        """`understudy serve` writes responses as well."""
        return ServedRollout(self._client, self._protocol) if isinstance(self._protocol, UnderstudyProtocol) else None

    def _agree(self) -> None:
        """Wait for the step's scores; if a process has none, all raise the error, before any waits for the others."""
        errors = [future.exception() for futures in self._pending.values() for future in futures]
        if failures := from_all_processes([str(error) for error in errors if isinstance(error, TeacherError)]):
            raise TeacherError(failures[0], on_all_processes=True)

    def _ask(self, examples: Sequence[Example]) -> list[Future[Projected | TopK]]:
        """Ask for the scores of the examples, in as many parts as there are replicas."""
        size = -(-len(examples) // len(self._client.replicas))
        parts = [examples[start : start + size] for start in range(0, len(examples), size)]
        return [self._client.submit(self._protocol.request(part)) for part in parts]


def _key(examples: Sequence[Example]) -> tuple[Any, ...]:
    """What the scores of a batch depend on."""
    return tuple((tuple(e.prompt), tuple(e.response), tuple(e.trained_tokens)) for e in examples)


def _joined(parts: Sequence[Projected | TopK], device: torch.device) -> Projected | TopK:
    """The rows of all parts, in order; top-K parts are cut to the smallest K."""
    if isinstance(parts[0], Projected):
        hidden = torch.cat([cast(Projected, part).hidden for part in parts])
        return replace(parts[0], hidden=hidden.to(device))
    tops = cast(Sequence[TopK], parts)
    k = min(top.values.shape[1] for top in tops)
    columns = [[top.values[:, :k], top.support[:, :k], cast(Tensor, top.chosen_values)] for top in tops]
    return TopK(*(torch.cat(column).to(device) for column in zip(*columns, strict=True)))

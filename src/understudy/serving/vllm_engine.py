"""vLLM's server that generates with a student's weights: token ids in, token ids and log-probabilities out.

A server tells which weights it has by a version that is set after they were loaded. One that was started again
meanwhile has another, so that responses of other weights are never taken for the student's.
"""

import secrets
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, wait
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

from ..sampling import Sampling
from ..teacher import TeacherError
from .checks import wrong
from .client import Client, Reply, Request, Unavailable
from .handshake import START

T = TypeVar("T")

_DEADLINES = 10  # generating and loading take longer than scoring: in units of the client's timeout
_POLL = 1.0  # seconds between looks at whether the server is still there
_BANNED = -100.0  # the bias of a token that is never to be drawn
_NO_ROUTE = "status 404: Not Found"  # other replies with 404 say what is not there
_ROUNDING = 1e-3  # of the logarithm of a probability of 1


@dataclass(frozen=True)
class Job:
    """One response to generate; `banned` are the ids from the tokenizer's vocabulary to that of a padded model."""

    prompt: list[int]
    seed: int
    sampling: Sampling  # with stop tokens
    banned: range
    replica: int | None = None  # the one that is to generate it; None: any

    def biases(self) -> dict[int, float]:
        """What is added to the logits of the banned ids."""
        return dict.fromkeys(self.banned, _BANNED)


class Generated(NamedTuple):
    """The tokens of a response and, where the sampling asks for them, their log-probabilities."""

    tokens: list[int]
    log_probs: list[float] | None


class Engine(Protocol):
    """Generates with weights that are loaded from folders."""

    def generate(self, jobs: Sequence[Job]) -> list[Generated]:
        """A response to each job."""
        ...

    def load_model(self, folder: Path) -> None: ...

    def load_adapters(self, folder: Path) -> None: ...

    def has_loaded_weights(self) -> bool:
        """Are the weights still those that were loaded last?"""
        ...


class ServedEngine:
    """vLLM's server, started with VLLM_SERVER_DEV_MODE=1; or replicas of it.

    Args:
        check: is called while answers are waited for, and raises what is to end that.

    Attributes:
        loaded: the model's name in requests, the server's own or that of adapters, and the version of the weights;
            processes that share a server take it from the one that loads.
    """

    def __init__(self, client: Client, check: Callable[[], None]) -> None:
        self._client, self._check = client, check
        self.loaded: tuple[str, str] | None = None

    def generate(self, jobs: Sequence[Job]) -> list[Generated]:
        """See `Engine`; all requests are under way at once.

        Raises:
            TeacherError: for a server that does not answer, or not with responses.
        """
        return self._results(
            [
                self._client.submit(
                    Request("/v1/completions", partial(_read, job=job), self._content(job), deadlines=_DEADLINES),
                    None if job.replica is None else self._client.replicas[job.replica],
                )
                for job in jobs
            ]
        )

    def load_model(self, folder: Path) -> None:
        """Reload the weights of every replica from a folder that it can read."""
        name = self._first_model()
        self._load("/collective_rpc", {"method": "reload_weights", "kwargs": {"weights_path": str(folder)}}, folder)
        self._mark(name)

    def load_adapters(self, folder: Path) -> None:
        """Load LoRA adapters in every replica, under a new name, and remove the ones before."""
        before, name = self.loaded, f"student-{secrets.token_hex(4)}"
        self._first_model()
        self._load("/v1/load_lora_adapter", {"lora_name": name, "lora_path": str(folder)}, folder)
        if before is not None:
            self._on_every_replica("/v1/unload_lora_adapter", {"lora_name": before[0]}, optional=True)
        self._mark(name)

    def has_loaded_weights(self) -> bool:
        """See `Engine`; also false where the server is away."""
        versions = self._versions()
        return versions is not None and self.loaded is not None and set(versions) == {self.loaded[1]}

    def was_restarted(self) -> bool:
        """Does every replica answer, and one of them with other weights?"""
        return self._versions() is not None and not self.has_loaded_weights()

    def _versions(self) -> list[Any] | None:
        """The versions of the weights of all replicas; None where one does not answer."""
        request = Request("/weight_info", lambda reply: reply.json().get("weight_version"))
        asked = [self._client.submit(request, replica, START) for replica in self._client.replicas]
        try:
            return [answer.result() for answer in asked]
        except TeacherError:
            return None

    def _first_model(self) -> str:
        """The name of the server's own model; a server that is away is waited for."""
        requests = [
            self._client.submit(Request("/v1/models", _read_first_model), each) for each in self._client.replicas
        ]
        return self._results(requests)[0]

    def _load(self, path: str, content: Any, folder: Path) -> None:
        """Have every replica load what is in the folder. It has just answered, so an error is not waited for."""
        try:
            self._on_every_replica(path, content, patience=START)
        except TeacherError as error:
            if "(status " not in str(error) or _NO_ROUTE in str(error):
                raise
            message = f"{error}; it has to read {folder}: name a folder that both share in the rollout's weights"
            raise TeacherError(message) from None

    def _mark(self, name: str) -> None:
        """Forget keys and values of earlier weights, and give the weights a new version."""
        self._on_every_replica("/reset_prefix_cache", {}, _succeeded)
        version = secrets.token_hex(8)
        self._on_every_replica("/update_weight_version", {"new_version": version})
        self.loaded = name, version

    def _on_every_replica(
        self,
        path: str,
        content: Any,
        read: Callable[[Reply], None] | None = None,
        optional: bool = False,
        patience: float | None = None,
    ) -> None:
        request = Request(path, read or (lambda reply: None), content, deadlines=_DEADLINES, optional=optional)
        try:
            self._results([self._client.submit(request, replica, patience) for replica in self._client.replicas])
        except TeacherError as error:
            if _NO_ROUTE not in str(error):
                raise
            message = f"{error}, which needs VLLM_SERVER_DEV_MODE=1 and VLLM_ALLOW_RUNTIME_LORA_UPDATING=True"
            raise TeacherError(message) from None

    def _results(self, futures: Sequence[Future[T]]) -> list[T]:
        """The results of requests that are under way; the first error ends them all."""
        try:
            while wait(futures, _POLL, FIRST_EXCEPTION).not_done:
                if failed := [future for future in futures if future.done() and future.exception() is not None]:
                    failed[0].result()
                self._check()
            return [future.result() for future in futures]
        finally:
            for future in futures:
                future.cancel()

    def _content(self, job: Job) -> dict[str, Any]:
        sampling = job.sampling
        assert self.loaded is not None
        content: dict[str, Any] = {
            "model": self.loaded[0],
            "prompt": job.prompt,
            "max_tokens": sampling.max_new_tokens,
            "temperature": sampling.temperature,
            "top_k": sampling.top_k,
            "top_p": sampling.top_p,
            "seed": job.seed,
            "stop_token_ids": list(sampling.stop_ids),
            "ignore_eos": True,  # only the sampling's own tokens end a response
            "return_token_ids": True,
            "return_tokens_as_token_ids": True,  # a server without a tokenizer cannot name them otherwise
        }
        if sampling.logprobs:
            content["logprobs"] = 0
        if job.banned:
            content["logit_bias"] = {str(token): bias for token, bias in job.biases().items()}
        return content


def _read(reply: Reply, job: Job) -> Generated:
    content = reply.json()
    try:
        [choice] = content["choices"]
        tokens = [int(token) for token in choice["token_ids"]]
        log_probs = [float(p) for p in choice["logprobs"]["token_logprobs"]] if job.sampling.logprobs else None
    except (KeyError, TypeError, ValueError):
        raise wrong(reply.url, "a reply without token_ids in vLLM's form") from None
    return checked(Generated(tokens, log_probs), job, reply.url)


def checked(response: Generated, job: Job, url: str) -> Generated:
    """The response, if it is one of the job's sampling.

    Raises:
        TeacherError: for no tokens, too many, unknown ones, tokens after a stop token, or an early end without one.
    """
    (tokens, log_probs), sampling = response, job.sampling
    if not 0 < len(tokens) <= sampling.max_new_tokens:
        raise wrong(url, f"a response of {len(tokens)} tokens where 1 to {sampling.max_new_tokens} were asked for")
    if not all(0 <= token < job.banned.start for token in tokens):
        raise wrong(url, "a token that the tokenizer does not have")
    stop = set(sampling.stop_ids)
    if stop.intersection(tokens[:-1]) or (tokens[-1] not in stop and len(tokens) < sampling.max_new_tokens):
        raise wrong(url, "a response that does not end at its first stop token")
    if log_probs is not None and (len(log_probs) != len(tokens) or not all(p <= _ROUNDING for p in log_probs)):
        raise wrong(url, "log-probabilities that do not fit the tokens")
    return response


def _read_first_model(reply: Reply) -> str:
    try:
        return str(reply.json()["data"][0]["id"])
    except (KeyError, IndexError, TypeError):
        raise wrong(reply.url, "no list of models in vLLM's form") from None


def _succeeded(reply: Reply) -> None:
    if not reply.json().get("success"):
        raise Unavailable("its cache is in use")

"""Generate responses with vLLM: a server that is started for the run, one that is there, or vLLM in this process.

vLLM gets the student's weights after each optimizer step, before responses are next needed. It is asked with token ids
and answers with token ids, with a seed for each response that is a function of (seed, step, row).
"""

import importlib.util
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..batch import Author, Example
from ..generation.sampling import Binding, Response, SamplingRollout, evaluation_mode
from ..method import is_distributed
from ..models.vocabulary import vocabulary_size
from ..rollout import WEIGHT_VERSION
from ..sampling import Sampling
from ..serving.client import Client, bearer_token
from ..serving.handshake import probe
from ..serving.student_engine import StudentEngine
from ..serving.student_weights import adapter_rank, check_adapters
from ..serving.vllm_engine import Engine, Job
from ..serving.vllm_in_process import InProcessEngine
from ..serving.vllm_process import VLLMProcess
from ..step import Step
from ..teacher import TeacherError

_CHECKED_TOKENS = 8
_CHECKED_TEMPERATURE = 0.5  # log-probabilities do not depend on it
_FLOAT32_ERROR, _OTHER_ERROR = 1e-3, 0.15  # of a log-probability; half precision rounds logits of 10 by 0.03
_LEAST_TEMPERATURE = 0.01  # vLLM raises lower ones to it
LOG = "vllm.log"


@dataclass
class VLLMRollout(SamplingRollout):
    """Generates with vLLM, which has the student's weights as of the last step; LoRA adapters are sent alone.

    Args:
        batch_size: requests that are under way at once.
        url: of a server, or a list of replicas, started with VLLM_SERVER_DEV_MODE=1.
        start: start a server on this machine for the run, and end it with the run.
        colocate: run vLLM in this process, on the student's GPU.
        python: the interpreter that has vLLM, for `start`; by default the one that runs understudy.
        env: environment variables for `start`, such as CUDA_VISIBLE_DEVICES.
        options: of vLLM: of its command line for `start`, of `vllm.LLM` for `colocate`.
        weights: a folder that this machine and the server share, for the student's weights; by default in memory.
        tolerance: by how much a log-probability may differ from the student's own when the two are compared; by default
            0.001 in float32, and 0.15 where the student or vLLM is in half precision.
        timeout: seconds for one attempt to reach the server; ten times as many for responses and weights.
        wait: seconds for which a server may be away before the run ends, with a checkpoint.
        token_env: the environment variable that holds the server's bearer token.
    """

    name: ClassVar[str] = "vllm"
    is_remote: ClassVar[bool] = True
    authors: ClassVar[frozenset[Author]] = frozenset({"student"})

    batch_size: int = 256
    url: str | list[str] | None = None
    start: bool = False
    colocate: bool = False
    python: str | None = None
    env: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    weights: str | None = None
    tolerance: float | None = None
    timeout: float = 60.0
    wait: float = 300.0
    token_env: str | None = None

    _transport: Any = field(default=None, repr=False)
    _engines: dict[int, StudentEngine] = field(default_factory=dict, init=False, repr=False)  # by the model's id
    _folder: Path = field(default=Path(), init=False, repr=False)  # of the run
    _cancelled: threading.Event | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if sum((self.url is not None, self.start, self.colocate)) != 1:
            raise ValueError("vllm needs one of url: of a server, start: true (for the run) and colocate: true")
        if (self.python is not None or self.env) and not self.start:
            raise ValueError("python and env are of the vLLM that start: true runs: leave them out")
        if self.options and self.url is not None:
            raise ValueError("options are for a vLLM that is started here: give them to the server at url itself")
        if not (self.timeout > 0 and self.wait >= 0):
            raise ValueError(f"timeout ({self.timeout:g}) and wait ({self.wait:g}) are seconds: give positive numbers")
        if self.url is not None:
            self._client([self.url] if isinstance(self.url, str) else self.url)  # refuses what is no URL

    def setup(self, folder: Path) -> None:
        self._folder = folder

    @property
    def runs_ahead(self) -> bool:
        """See `Rollout`: not on the GPU on which the student is trained."""
        return not self.colocate

    def bind(self, model: nn.Module, tokenizer: Any, author: Author = "student") -> SamplingRollout:
        """See `Rollout`.

        Raises:
            ValueError: for a teacher, for weights that vLLM does not have, and where there is no vLLM to start.
        """
        if author not in self.authors:
            raise ValueError(
                "rollout vllm generates the student's responses only: use generate where the method trains on the "
                "teacher's, or a teacher that generates them itself"
            )
        if self.colocate and is_distributed():
            raise ValueError("vllm with colocate runs in one process: use start: true with several")
        bound = super().bind(model, tokenizer, author)
        if id(model) not in self._engines:
            self._check_place(model)
            self._engines[id(model)] = self._engine_for(model, vocabulary_size(tokenizer))
        return bound

    def for_thread(self, cancelled: threading.Event) -> "VLLMRollout":
        """See `Rollout`: a rollout that does not read the student, whose weights vLLM has by then."""
        self._engine.prepare()
        if self._engine.needs_check:
            self._check_parity()
        rollout = self._bound_to(self._binding)
        rollout._cancelled = cancelled
        return rollout

    def _bound_to(self, binding: Binding | None, **changes: Any) -> "VLLMRollout":
        rollout = super()._bound_to(binding, **changes)
        assert isinstance(rollout, VLLMRollout)
        rollout._engines, rollout._folder = self._engines, self._folder
        return rollout

    @property
    def _engine(self) -> StudentEngine:
        return self._engines[id(self._bound.model)]

    def sync(self, step: Step) -> None:
        """The weights have changed; they are sent before responses are next needed."""
        self._engine.weights_have_changed(step.number)

    def generate(self, prompts: Sequence[Example], sampling: Sampling, step: Step) -> list[Example]:
        """See `Rollout`; a response's column `weight_version` is the number of optimizer steps of its weights.

        Raises:
            ValueError: for a temperature that vLLM would replace.
        """
        if 0 < sampling.temperature < _LEAST_TEMPERATURE:
            raise ValueError(
                f"vLLM samples at temperature 0 or at {_LEAST_TEMPERATURE} and more, and not at {sampling.temperature}"
            )
        examples = super().generate(prompts, sampling, step)
        version = {WEIGHT_VERSION: self._engine.version}
        return [replace(example, columns={**example.columns, **version}) for example in examples]

    def _respond(self, prompts: list[list[int]], uniforms: Tensor, sampling: Sampling) -> list[Response]:
        engine = self._engine
        if engine.needs_check:
            self._check_parity()
        seeds = (uniforms[:, 0] * 2**53).long().tolist()
        jobs = [Job(prompt, seed, sampling, engine.banned) for prompt, seed in zip(prompts, seeds, strict=True)]
        return [Response(*generated) for generated in engine.generate(jobs, self._cancelled)]

    def _check_parity(self) -> None:
        """Compare log-probabilities of every replica with the student's own: at the start, and after a step.

        One response is greedy, and must consist of the likeliest tokens. The other one is sampled at a temperature that
        its log-probabilities must not depend on. All processes compute the student's, which may be sharded.

        Raises:
            TeacherError: if they differ; on all processes.
        """
        bound, engine, sequence = self._bound, self._engine, probe(self._bound.vocabulary)
        prompt = [*sequence.prompt, *sequence.response]
        samplings = [Sampling(_CHECKED_TOKENS, temperature=t, logprobs=True) for t in (0.0, _CHECKED_TEMPERATURE)]
        replicas = len(self.url) if isinstance(self.url, list) else 1
        jobs = [Job(prompt, 0, each, engine.banned, replica) for replica in range(replicas) for each in samplings]
        responses = engine.generate(jobs)
        ids = torch.tensor([prompt + tokens for tokens, _ in responses])
        with evaluation_mode(bound.model), torch.no_grad():
            ids = ids.to(bound.model.get_input_embeddings().weight.device)
            logits = bound.model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[:, len(prompt) - 1 : -1]
        own = logits[..., : bound.vocabulary].float().log_softmax(-1).cpu()
        chosen = own.gather(-1, torch.tensor([tokens for tokens, _ in responses])[..., None])[..., 0]
        errors = (chosen - torch.tensor([log_probs for _, log_probs in responses])).abs()
        errors[:: len(samplings)] = errors[:: len(samplings)].maximum((own.amax(-1) - chosen)[:: len(samplings)])
        error = max(engine.from_all_processes(float(errors.nan_to_num(torch.inf).max())))
        exact = logits.dtype == torch.float32 and self.options.get("dtype", "float32") in ("float32", "float")
        default = _FLOAT32_ERROR if exact else _OTHER_ERROR
        if error > (default if self.tolerance is None else self.tolerance):
            raise TeacherError(
                f"vLLM does not generate with the student's weights, a log-probability is off by {error:.2g}: give it "
                "the student's model and dtype, raw log-probabilities (--logprobs-mode), and "
                "--hf-overrides '{\"tie_word_embeddings\": false}'; or raise the rollout's tolerance, or use generate",
                on_all_processes=True,
            )
        engine.checked.add(engine.version)

    def _check_place(self, model: Any) -> None:
        """Refuse what would fail when responses are first needed.

        Raises:
            ValueError: with the remedy.
        """
        if self.weights is not None and not Path(self.weights).is_dir():
            raise ValueError(f"{self.weights}, the folder for the student's weights, is not there: create it")
        if self.url is not None:
            return
        if self.python is None and importlib.util.find_spec("vllm") is None:
            raise ValueError(
                "there is no vLLM in this environment: pip install vllm, or with start: true name the interpreter of "
                "another environment in python"
            )
        if getattr(model, "hf_quantizer", None) is not None:
            raise ValueError(
                "vLLM is started with the student's weights as they are saved, which quantized ones may not be: serve "
                "the quantized model yourself and name it by url, or use rollout generate"
            )

    def _client(self, urls: Sequence[str]) -> Client:
        token = bearer_token(self.token_env)
        return Client(urls, self.timeout, self.wait, token, self._transport, self.batch_size)

    def _engine_for(self, model: Any, vocabulary: int) -> StudentEngine:
        options = {"dtype": str(model.dtype).removeprefix("torch.")}
        if check_adapters(model):
            options |= {"enable_lora": True, "max_loras": 1, "max_lora_rank": adapter_rank(model)}
        options |= self.options

        def process_for(folder: Path) -> VLLMProcess:
            flags = {"skip_tokenizer_init": True, **options}
            return VLLMProcess(str(folder), self._folder / LOG, python=self.python, options=flags, env=self.env)

        def engine_for(folder: Path) -> Engine:
            return InProcessEngine(folder, options)

        urls = [self.url] if isinstance(self.url, str) else self.url or []
        return StudentEngine(
            model,
            self.weights,
            vocabulary=vocabulary,
            process_for=process_for if self.start else None,
            client_for=self._client,
            engine_for=engine_for if self.colocate else None,
            urls=urls,
        )

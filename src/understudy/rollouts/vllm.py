"""Generate responses with vLLM: a server that is started for the run, one that is there, or vLLM in this process.

vLLM gets the student's weights after each optimizer step, before responses are next needed. It is asked with token ids
and answers with token ids, with a seed for each response that is a function of (seed, step, row).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..batch import Author, Example
from ..generation.sampling import Binding, Response, SamplingRollout, generation_mode
from ..method import is_distributed
from ..models.vocabulary import vocabulary_size
from ..rollout import WEIGHT_VERSION
from ..sampling import Sampling
from ..serving.client import Client, bearer_token
from ..serving.handshake import probe
from ..serving.student_engine import StudentEngine
from ..serving.student_weights import adapter_rank, has_adapters
from ..serving.vllm_engine import Engine, Job
from ..serving.vllm_in_process import InProcessEngine
from ..serving.vllm_process import VLLMProcess
from ..step import Step
from ..teacher import TeacherError

_CHECKED_TOKENS = 8
_FLOAT32_ERROR, _OTHER_ERROR = 1e-3, 0.15  # of a log-probability; half precision rounds logits of 10 by 0.03
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
        options: of vLLM: of its command line for `start`, of `vllm.LLM` for `colocate`.
        weights: a folder that this machine and the server share, for the student's weights; by default in memory.
        timeout: seconds for one attempt to reach the server; ten times as many for responses and weights.
        wait: seconds for which a server may be away before the run ends, with a checkpoint.
        token_env: the environment variable that holds the server's bearer token.
    """

    name: ClassVar[str] = "vllm"
    is_remote: ClassVar[bool] = True

    batch_size: int = 256
    url: str | list[str] | None = None
    start: bool = False
    colocate: bool = False
    python: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    weights: str | None = None
    timeout: float = 60.0
    wait: float = 300.0
    token_env: str | None = None

    _transport: Any = field(default=None, repr=False)
    _engines: dict[int, StudentEngine] = field(default_factory=dict, init=False, repr=False)  # by the model's id
    _folder: Path = field(default=Path(), init=False, repr=False)  # of the run

    def __post_init__(self) -> None:
        super().__post_init__()
        if sum((self.url is not None, self.start, self.colocate)) != 1:
            raise ValueError("vllm needs one of url: of a server, start: true (for the run) and colocate: true")
        if self.python is not None and not self.start:
            raise ValueError("python is the interpreter that start: true runs vLLM with: leave it out")
        if self.options and self.url is not None:
            raise ValueError("options are for a vLLM that is started here: give them to the server at url itself")
        if not (self.timeout > 0 and self.wait >= 0):
            raise ValueError(f"timeout ({self.timeout:g}) and wait ({self.wait:g}) are seconds: give positive numbers")
        if self.url is not None:
            self._client([self.url] if isinstance(self.url, str) else self.url)  # refuses what is no URL

    def setup(self, folder: Path) -> None:
        self._folder = folder

    def bind(self, model: nn.Module, tokenizer: Any, author: Author = "student") -> SamplingRollout:
        """See `Rollout`.

        Raises:
            ValueError: for a teacher, and for adapters that vLLM does not have.
        """
        if author != "student":
            raise ValueError(
                "rollout vllm generates the student's responses only: use generate where the method trains on the "
                "teacher's, or a teacher that generates them itself"
            )
        has_adapters(model)
        if self.colocate and is_distributed():
            raise ValueError("vllm with colocate runs in one process: use start: true with several")
        bound = super().bind(model, tokenizer, author)
        if id(model) not in self._engines:
            self._engines[id(model)] = self._engine_for(model, vocabulary_size(tokenizer))
        return bound

    def _bound_to(self, binding: Binding | None, **changes: Any) -> SamplingRollout:
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
        """See `Rollout`; a response's column `weight_version` is the number of optimizer steps of its weights."""
        examples = super().generate(prompts, sampling, step)
        version = {WEIGHT_VERSION: self._engine.version}
        return [replace(example, columns={**example.columns, **version}) for example in examples]

    def _respond(self, prompts: list[list[int]], uniforms: Tensor, sampling: Sampling) -> list[Response]:
        if self._engine.needs_check:
            self._check_parity()
        seeds = (uniforms[:, 0].double() * 2**53).long().tolist()
        jobs = [Job(prompt, seed, sampling, self._banned) for prompt, seed in zip(prompts, seeds, strict=True)]
        return [Response(*generated) for generated in self._engine.generate(jobs)]

    @property
    def _banned(self) -> range:
        """Ids beyond the tokenizer's in a server that is not started here; another has none."""
        if self.url is None:
            return range(0)
        size = self._bound.model.get_input_embeddings().weight.shape[0]
        return range(self._bound.vocabulary, size)

    def _check_parity(self) -> None:
        """Compare greedy tokens and their log-probabilities with the student's own: at the start, and after a step.

        Raises:
            TeacherError: if they differ.
        """
        bound, sequence = self._bound, probe(self._bound.vocabulary)
        prompt = [*sequence.prompt, *sequence.response]
        nothing_stops = Sampling(_CHECKED_TOKENS, temperature=0.0, logprobs=True)
        [(tokens, log_probs)] = self._engine.generate([Job(prompt, 0, nothing_stops, self._banned)])
        ids = torch.tensor([prompt + tokens], device=bound.model.get_input_embeddings().weight.device)
        with generation_mode(bound.model), torch.no_grad():
            logits = bound.model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0, len(prompt) - 1 : -1]
        own = logits[:, : bound.vocabulary].float().log_softmax(-1).cpu()
        chosen = own.gather(-1, torch.tensor(tokens)[:, None])[:, 0]
        error = float(torch.maximum((chosen - torch.tensor(log_probs)).abs(), own.amax(-1) - chosen).max())
        if not error <= (_FLOAT32_ERROR if logits.dtype == torch.float32 else _OTHER_ERROR):
            raise TeacherError(
                f"vLLM does not generate with the student's weights, a log-probability is off by {error:.2g}: give it "
                "the student's model and dtype, and --hf-overrides '{\"tie_word_embeddings\": false}', or use generate"
            )
        self._engine.checked.add(self._engine.version)

    def _client(self, urls: Sequence[str]) -> Client:
        token = bearer_token(self.token_env)
        return Client(urls, self.timeout, self.wait, token, self._transport, self.batch_size)

    def _engine_for(self, model: Any, vocabulary: int) -> StudentEngine:
        options = {"dtype": str(model.dtype).removeprefix("torch.")}
        if has_adapters(model):
            options |= {"enable_lora": True, "max_loras": 1, "max_lora_rank": adapter_rank(model)}
        options |= self.options

        def process_for(folder: Path) -> VLLMProcess:
            flags = {"skip_tokenizer_init": True, **options}
            return VLLMProcess(str(folder), self._folder / LOG, python=self.python, options=flags)

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

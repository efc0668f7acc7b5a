"""vLLM in this process, on the trainer's GPU: while the student learns it sleeps, its weights in main memory."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from .vllm_engine import Generated, Job, checked

_HERE = "this process"


class InProcessEngine:
    """`vllm.LLM` with weights from a folder; without a GPU there is no sleep.

    Args:
        folder: of the model, with its configuration.
        options: of `vllm.LLM`.

    Raises:
        ValueError: where vLLM is not installed.
    """

    def __init__(self, folder: Path, options: dict[str, Any]) -> None:
        try:
            import vllm  # type: ignore[import-not-found]
        except ImportError:
            raise ValueError(
                "rollout vllm with colocate needs vLLM in this environment: pip install 'understudy[vllm]', or start a "
                "server from another one with start: true and python: its interpreter"
            ) from None
        self._vllm, self._sleeps = vllm, torch.cuda.is_available()
        fixed = {"model": str(folder), "skip_tokenizer_init": True, "generation_config": "vllm"}
        self._llm: Any = vllm.LLM(**fixed, enable_sleep_mode=self._sleeps, **options)
        self._adapters: Any = None
        self._count = 0  # of adapters loaded so far
        self._sleep()

    def generate(self, jobs: Sequence[Job]) -> list[Generated]:
        """See `Engine`."""
        self._wake_up()
        try:
            prompts = [{"prompt_token_ids": job.prompt} for job in jobs]
            parameters = [self._parameters(job) for job in jobs]
            outputs = self._llm.generate(prompts, parameters, use_tqdm=False, lora_request=self._adapters)
        finally:
            self._sleep()
        return [checked(_generated(output.outputs[0]), job, _HERE) for output, job in zip(outputs, jobs, strict=True)]

    def load_model(self, folder: Path) -> None:
        self._wake_up()
        self._llm.collective_rpc("reload_weights", kwargs={"weights_path": str(folder)})
        self._llm.reset_prefix_cache()
        self._sleep()

    def load_adapters(self, folder: Path) -> None:
        from vllm.lora.request import LoRARequest  # type: ignore[import-not-found]

        self._count += 1
        self._adapters = LoRARequest(f"student-{self._count}", self._count, str(folder))

    def has_loaded_weights(self) -> bool:
        return True

    def _parameters(self, job: Job) -> Any:
        sampling = job.sampling
        return self._vllm.SamplingParams(
            max_tokens=sampling.max_new_tokens,
            temperature=sampling.temperature,
            top_k=sampling.top_k,
            top_p=sampling.top_p,
            seed=job.seed,
            stop_token_ids=list(sampling.stop_ids),
            ignore_eos=True,
            detokenize=False,
            logprobs=0 if sampling.logprobs else None,
            logit_bias=job.biases() or None,
        )

    def _wake_up(self) -> None:
        if self._sleeps:
            self._llm.wake_up()

    def _sleep(self) -> None:
        if self._sleeps:
            self._llm.sleep(level=1)


def _generated(output: Any) -> Generated:
    tokens = [int(token) for token in output.token_ids]
    if output.logprobs is None:
        return Generated(tokens, None)
    return Generated(tokens, [float(p[t].logprob) for p, t in zip(output.logprobs, tokens, strict=True)])

"""A judgement from names: a model, a dataset and a protocol become an evaluation."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress

from ..generation.stop_tokens import stop_ids
from ..models.context_window import context_window
from ..models.student import (
    check_tokenizers,
    check_vocabulary,
    load_config,
    load_model,
    load_tokenizer,
    loading,
)
from ..playground.names import resolve
from ..recipe import Data
from ..rollouts.generate import GenerateRollout
from ..run.distill import load_data
from ..sampling import Sampling
from ..teachers.local import LocalTeacher
from .evaluate import Evaluation, evaluate
from .settings import Protocol


@dataclass(frozen=True)
class Question:
    """Everything that a command line says of an evaluation."""

    model: str
    data: Data  # lengths apart, which follow from the protocol and the models
    protocol: Protocol
    teacher: str | None = None
    metrics: tuple[str, ...] = ()
    exposure: bool = False
    at_once: int | None = None  # answers written at once; None finds it out
    output: Path | None = None


def judge(question: Question, progress: Progress | None = None) -> Evaluation:
    """Load what is named and evaluate it, on the accelerator if there is one.

    Raises:
        ValueError: in one sentence, for what is not there, does not fit together or has no room; before weights are
            loaded where that can be known.
    """
    tokenizer = load_tokenizer(question.model)
    configs = [load_config(question.model)]
    check_vocabulary(tokenizer, configs[0], "the model has")
    if question.teacher is not None:
        check_tokenizers(tokenizer, load_tokenizer(question.teacher))
        configs.append(load_config(question.teacher))
        check_vocabulary(tokenizer, configs[1], "the teacher has")
    asked, window = question.protocol, context_window(*configs)
    longest = asked.max_new_tokens or min(256, (window or 512) // 2)
    if window is not None and longest >= window:
        raise ValueError(f"--max-new-tokens {longest} leaves no room for a prompt in a window of {window}: lower it")
    sampling = Sampling(longest, asked.temperature)
    lengths = {"max_length": window or 512 + longest, "max_prompt_length": asked.max_prompt_length}
    examples = load_data(question.data.model_copy(update=lengths), tokenizer, window, longest)
    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    student = load_model(question.model, dtype="auto").to(device)
    options: dict[str, Any] = {"metrics": question.metrics, "exposure": question.exposure, "output": question.output}
    if question.teacher is not None:
        with loading("model", question.teacher):
            options["teacher"] = LocalTeacher(resolve(question.teacher), vocabulary=len(tokenizer))
        options["teacher"].beside(device)
    if question.at_once is None:
        options["at_once"] = 64 if device.type == "cpu" else 256
    rollout = GenerateRollout() if question.at_once is None else GenerateRollout(question.at_once)
    sampling = replace(sampling, stop_ids=tuple(stop_ids(tokenizer, student)))
    return evaluate(student, tokenizer, examples, rollout, sampling, seed=asked.seeds, progress=progress, **options)

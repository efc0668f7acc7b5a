"""Training runs small enough for tests: data, arguments, models and a trainer in one call.

Everything that a test does not set is the same in all runs, so two runs differ only in what it sets.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from fakes import ragged_examples, tiny, words
from torch import Tensor, nn
from transformers import TrainingArguments

from understudy.batch import Example
from understudy.method import Method
from understudy.rollout import Rollout
from understudy.rollouts.generate import GenerateRollout
from understudy.sampling import Sampling
from understudy.teacher import Teacher
from understudy.teachers.local import LocalTeacher
from understudy.training.trainer import StudentTrainer


def student(kind: str = "llama", **options: Any) -> Any:
    return tiny(kind, seed=1, **options)


def teacher(kind: str = "llama", **options: Any) -> LocalTeacher:
    """A teacher wider than the student, and with other weights."""
    return LocalTeacher(tiny(kind, **{"width": 24, "seed": 2, **options}))


def short_sampling(**options: Any) -> Sampling:
    return Sampling(**{"max_new_tokens": 6, **options})


def arguments(folder: Path, **options: Any) -> TrainingArguments:
    defaults: dict[str, Any] = {
        "max_steps": 4,
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 4,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "dataloader_pin_memory": False,
    }
    return TrainingArguments(str(folder), **{**defaults, **options})


def trainer(
    folder: Path,
    method: Method,
    model: nn.Module | None = None,
    with_teacher: Teacher | None = None,
    rollout: Rollout | None = None,
    sampling: Sampling | None = None,
    examples: Sequence[Example] | None = None,
    options: dict[str, Any] | None = None,
    **changed: Any,
) -> StudentTrainer:
    """A trainer of `method`; `options` are the trainer's own arguments, `changed` those of TrainingArguments."""
    return StudentTrainer(
        student() if model is None else model,
        teacher() if with_teacher is None else with_teacher,
        method,
        GenerateRollout() if rollout is None else rollout,
        short_sampling() if sampling is None else sampling,
        processing_class=words(),
        args=arguments(folder, **changed),
        train_dataset=ragged_examples() if examples is None else examples,
        **(options or {}),
    )


def whole_and_accumulated(
    folder: Path, method: type[Method], teachers: Sequence[Teacher] = (), **options: Any
) -> list[StudentTrainer]:
    """The same three steps in float64 twice: with all of a step's examples at once, and in four parts.

    Either the runs have these teachers, one each, or each has the same model.
    """
    runs = []
    for index, (size, parts) in enumerate(((8, 1), (2, 4))):
        run = trainer(
            folder,
            method(**options),
            model=student().double(),
            with_teacher=teachers[index] if teachers else LocalTeacher(tiny("llama", width=24, seed=2).double()),
            examples=ragged_examples(24),
            per_device_train_batch_size=size,
            gradient_accumulation_steps=parts,
            max_steps=3,
        )
        run.train()
        runs.append(run)
    return runs


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def difference(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """The largest difference between two models' weights."""
    assert one.keys() == other.keys()
    return max(float((one[name] - other[name]).abs().max()) for name in one)


def logged(trained: StudentTrainer, name: str = "loss") -> list[float]:
    """What was logged under a name, line by line."""
    return [line[name] for line in trained.state.log_history if name in line]


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    """Are two models' weights the same to the bit?"""
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)

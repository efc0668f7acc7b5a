"""The method's loss and metrics on held-out data: a mean over the parts that the method names."""

from collections.abc import Mapping
from math import ceil
from typing import TYPE_CHECKING, cast

import torch
from torch import nn

from ..batch import Batch, Example, groups, micro_batches
from ..method import EvaluatedPart, Method, from_all_processes
from ..step import Step
from .step_metrics import StepMetrics

if TYPE_CHECKING:
    from .trainer import StudentTrainer


def held_out_line(trainer: "StudentTrainer", examples: list[Example]) -> dict[str, float]:
    """The loss and metrics of the method, and the response metrics. The method's state stays as it is.

    Raises:
        ValueError: without examples, and if a response metric has the name of another metric.
    """
    if not examples:
        raise ValueError("there is nothing to evaluate on: the eval_dataset is empty")
    method = trainer.method
    cast(nn.Module, trainer.model).eval()
    saved_state = {name: tensor.clone() for name, tensor in method.state_dict().items()}
    training, trainer.step_metrics = trainer.step_metrics, StepMetrics()  # evaluation has its own counts
    try:
        line = _measure_parts(trainer, examples)
    finally:
        trainer.step_metrics = training
        if saved_state or method.state_dict():
            method.load_state_dict(saved_state)  # undo what `collect` changed in this evaluation
    return line | _response_metrics(trainer, line)


def _measure_parts(trainer: "StudentTrainer", examples: list[Example]) -> dict[str, float]:
    """Loss and metrics by name: means over the parts in their shares, and with a part's name its own.

    A part without a share is measured if its responses are there: those of the examples that have one, or those of a
    model that can generate. All processes get the same values.
    """
    lines: list[tuple[EvaluatedPart, dict[str, float]]] = []
    for part in trainer.method.evaluated_parts():
        chosen, authors = examples, part.method.authors
        if not part.share and "dataset" in authors:
            chosen = [example for example in examples if example.response]
        if chosen and (part.share or _can_measure(trainer, part.method)):
            lines.append((part, _measure(trainer, part.method, chosen)))
    means = _means(lines)
    return means | {
        f"{name}_{part.name}": value
        for part, line in lines
        if part.name
        for name, value in line.items()
        if name != "tokens_per_second"
    }


def _can_measure(trainer: "StudentTrainer", method: Method) -> bool:
    """Can the responses of the method's authors be generated, and can the teacher score them?"""
    scores_them = trainer.teacher is None or trainer.teacher.scores_new_responses or method.authors == {"dataset"}
    return trainer.writers.can_generate(method.authors) and (scores_them or not method.requires)


def _measure(trainer: "StudentTrainer", method: Method, examples: list[Example]) -> dict[str, float]:
    """The method's loss and metrics on examples, of which every process takes some.

    All are collected at once, so that nothing depends on the size of a batch. Every process computes equally often, as
    sharded models need; what it computes to this end alone is not counted.
    """
    args, model = trainer.args, cast(nn.Module, trainer.model)
    own = examples[args.process_index :: args.world_size]
    collected = method.collect(own or examples[:1], trainer.writers, Step(0, args.seed, trainer.state.max_steps))
    parts = min(ceil(len(own or examples[:1]) / args.per_device_eval_batch_size), len(groups(collected)))
    split = micro_batches(collected, parts) if parts else []
    batches = [Batch.from_examples(examples, trainer.pad, args.device) for examples in split]
    counted = batches if own else []
    idle = max(from_all_processes([len(batches)])) - len(counted)
    total, normalizer = torch.zeros(2, dtype=torch.float64, device=args.device)
    with trainer.compute_loss_context_manager():
        for batch in counted:
            trainer.step_metrics.count(batch)
            total += trainer.weighted_loss(model, batch, method, diagnose=True)
            normalizer += batch.normalizer(method.reduction)
        for batch in batches[-1:] * idle:
            trainer.weighted_loss(model, batch, method, diagnose=False)
    line = trainer.step_metrics.log_line(trainer.accelerator)
    total, normalizer = trainer.accelerator.reduce(torch.stack([total, normalizer]), reduction="sum")
    loss = float(total / normalizer) + trainer.router.mean(line)
    return {"loss": loss} | {k: v for k, v in line.items() if not k.startswith("seconds")}


def _means(lines: list[tuple[EvaluatedPart, dict[str, float]]]) -> dict[str, float]:
    """For each name the mean of the parts that have it, in their shares."""
    names = dict.fromkeys(name for _, line in lines for name in line)
    means = {}
    for name in names:
        values = [(part.share, line[name]) for part, line in lines if part.share and name in line]
        if values:
            means[name] = sum(share * value for share, value in values) / sum(share for share, _ in values)
    return means


def _response_metrics(trainer: "StudentTrainer", line: Mapping[str, float]) -> dict[str, float]:
    """The trainer's response metrics, none of which may have the name of a metric in `line`.

    Raises:
        ValueError: naming it.
    """
    values = {} if trainer.response_metrics is None else trainer.response_metrics(cast(nn.Module, trainer.model))
    if taken := line.keys() & values.keys():
        raise ValueError(f"a response metric is named {min(taken)}, as a metric of the trainer: rename it")
    return values

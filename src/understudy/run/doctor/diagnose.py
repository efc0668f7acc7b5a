"""Examine a recipe: what `distill` would refuse before it loads weights, and what else is known without them.

The checks are those of `distill` itself, in the same order (`run/prepare.py`); they go on after an error. What they log
as a warning is a yellow finding here.
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import torch

from ...models.load import reason
from ...recipe import Recipe
from ...terminal import counted, sentence
from ..arguments import training_arguments
from ..build import check_processes
from ..folder import RunFolder
from ..lock import check_unlocked
from ..overview import planned_steps
from ..prepare import Prepared, prepare
from ..refusals import Refusals
from .data import data, first_example, step_lengths
from .disk import disk
from .findings import Diagnosis, Section, green, red, size, yellow
from .memory import Estimate, dtypes, estimate
from .teachers import experts, teachers
from .tokens import tokens

_TIGHT = 0.9  # share of what is free
_SECTIONS = {"method": "recipe", "rollout": "recipe", "student": "recipe", "training": "recipe"}  # of refusals
_LOGGERS = {"models": "tokens", "data": "data", "teachers": "teacher", "serving": "teacher"}  # of warnings
_REMEDIES = {
    "activations": "set training.gradient_checkpointing, or lower per_device_train_batch_size and raise "
    "gradient_accumulation_steps",
    "loss": "lower per_device_train_batch_size and raise gradient_accumulation_steps",
    "optimizer": "train adapters (student.peft), or choose another training.optim, such as adafactor",
    "gradients": "train adapters (student.peft)",
    "student": "train adapters (student.peft), or choose a smaller student",
    "KV cache": "lower the rollout's batch_size or max_new_tokens",
    "teacher": "give the teacher dtype: bfloat16 or a quantization, or let another machine serve it",
}


def diagnose(recipe: Recipe, restart: bool = False, processes: int | None = None) -> Diagnosis:
    """Examine a recipe without loading weights; nothing is trained or written.

    Args:
        restart: of `distill`, which would delete an earlier run in the folder.
        processes: of the run, if they are not those that this is started in.
    """
    refusals, arguments = Refusals(collect=True), None
    with _logged() as records:
        with refusals.attempt("training"):
            arguments = training_arguments(recipe)
        if arguments is not None:
            processes = processes or arguments.world_size
            folder = RunFolder(Path(arguments.output_dir or "."))
            with refusals.attempt("disk"):
                folder.check_free(recipe, restart)
                check_unlocked(folder, recipe)
            with refusals.attempt("training"):
                check_processes(recipe, arguments, processes)
        prepared = prepare(recipe, refusals)
        sections = [
            _section("tokens", lambda: tokens(recipe, prepared)),
            _section("data", lambda: data(recipe, prepared)),
            _section("teacher", lambda: teachers(recipe, prepared, refusals)),
        ]
        if arguments is not None:
            result = Estimate()
            about = (recipe, arguments, prepared, processes or 1, refusals, result)
            measured = _section("memory", lambda: _memory(*about))
            sections.append(measured)
            space = (arguments, prepared, result.student, result.optimizer_bytes, processes or 1)
            sections.append(_section("disk", lambda: disk(recipe, *space)))
            sections.insert(0, _section("recipe", lambda: _recipe(*about)))
    by_title = {section.title: section for section in [Section("recipe"), *sections]}
    for record in records:
        topic = _LOGGERS.get(record.name.split(".")[1] if "." in record.name else "", "recipe")
        level = yellow if record.levelno >= logging.WARNING else green
        by_title[topic].findings.append(level(record.getMessage()))
    for topic, error in refusals.collected:
        section, finding = by_title.setdefault(_SECTIONS.get(topic, topic), Section(topic)), red(sentence(error))
        if finding not in section.findings:  # several checks may load the same
            section.findings.append(finding)
    return Diagnosis(list(by_title.values()), first_example(prepared))


def _section(title: str, examine: Callable[[], Section]) -> Section:
    """A section of an examination, or one that says why there is none."""
    try:
        return examine()
    except Exception as error:  # tokenizers, configurations and models raise anything
        return Section(title, findings=[yellow(f"this could not be examined: {reason(error)}")])


@contextmanager
def _logged() -> Iterator[list[logging.LogRecord]]:
    """What understudy logs in this block, which is not printed."""
    logger, records = logging.getLogger("understudy"), []
    handler: Any = logging.Handler()
    handler.emit = lambda record: records.append(record)
    propagates, logger.propagate = logger.propagate, False
    logger.addHandler(handler)
    try:
        yield records
    finally:
        logger.removeHandler(handler)
        logger.propagate = propagates


def _recipe(
    recipe: Recipe, arguments: Any, prepared: Prepared, processes: int, refusals: Refusals, result: Estimate
) -> Section:
    """What the recipe trains, and what is known to go wrong in it."""
    section, student = Section("recipe"), result.student
    block, steps = recipe.student, planned_steps(arguments, len(prepared.train or ()), processes)
    origin = block.model or ("random weights" if block.fresh is not None else f"layers {block.layers} of the teacher")
    batch = arguments.train_batch_size * arguments.gradient_accumulation_steps * processes
    section.rows += [("student", origin), ("method", recipe.method[0])]
    section.rows.append(("training", f"about {counted(steps, 'step', 'steps')} of {counted(batch, 'row', 'rows')}"))
    if processes > 1:
        section.rows.append(("processes", str(processes)))
    if not refusals.collected:
        section.findings.append(green("there is nothing that distill would refuse before it loads weights"))
    if student is None:
        return section
    trained = [p for p in student.parameters() if p.requires_grad]
    if half := [p.dtype for p in trained if p.dtype.itemsize < 4]:
        share = "1/512" if half[0] == torch.bfloat16 else "1/4096"
        message = f"weights trained in {dtypes(student)} lose every update below {share} of a weight"
        section.findings.append(yellow(f"{message}: set student.dtype float32, and training.bf16 auto for speed"))
    if recipe.student.model is not None and (sentence := experts(recipe.student.model)) is not None:
        section.findings.append(green(f"the student is a mixture of experts: {sentence}"))
    return section


def _memory(
    recipe: Recipe, arguments: Any, prepared: Prepared, processes: int, refusals: Refusals, result: Estimate
) -> Section:
    """The section about memory, each device's against what is free there."""
    section = Section("memory")
    measured = estimate(recipe, arguments, prepared, step_lengths(prepared, arguments), processes, refusals)
    vars(result).update(vars(measured))
    for part in result.parts:
        kind = "exact" if part.is_exact else "estimated"
        place = "" if part.device == str(arguments.device) else f"on {part.device}: "
        section.rows.append((part.name, size(part.bytes), kind, f"{place}{part.about}"))
    section.findings += result.notes
    if result.student is None:
        section.findings.append(yellow("memory and disk are not estimated without a student: correct what is red"))
    for device in dict.fromkeys(part.device for part in result.parts):
        section.findings.append(_fits(device, result, processes))
    return section


def _fits(device: str, result: Estimate, processes: int) -> Any:
    needed, exact = result.largest(device), result.exact(device)
    free = _free_memory(device)
    share = "each of " if processes > 1 else ""
    what = f"{share}{device if device != 'cpu' else 'the CPU'} needs about {size(needed)}"
    if free is None:
        return yellow(f"{what}; how much is free there is not known: compare it with the device's memory")
    where = f"{size(free)} are free"
    if device == "cpu" and processes > 1:
        where += f" for {processes} processes"
        free //= processes
    largest = max((part for part in result.parts if part.device == device), key=lambda part: part.bytes)
    remedy = next((text for name, text in _REMEDIES.items() if largest.name.startswith(name)), _REMEDIES["teacher"])
    if exact > free:
        return red(f"{what}, of which {size(exact)} is exact, and {where}: {remedy}")
    if needed > _TIGHT * free:
        return yellow(f"{what}, and {where}: {remedy}")
    return green(f"{what}, and {where}")


def _free_memory(device: str) -> int | None:
    """Free bytes of a GPU or of the machine; None for other devices."""
    if device == "cpu":
        return psutil.virtual_memory().available
    if device.startswith("cuda") and torch.cuda.is_available():
        return torch.cuda.mem_get_info(torch.device(device))[0]
    return None

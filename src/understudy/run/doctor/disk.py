"""Disk space of checkpoints and of the saved student, against what is free where the run's folder is."""

import shutil
from pathlib import Path
from typing import Any

from transformers import TrainingArguments

from ...models.skeleton import weights_dtype
from ...recipe import Recipe
from ...training.checkpoint import step_of
from ..folder import RunFolder
from ..overview import planned_steps
from ..prepare import Prepared
from .findings import Section, green, red, size, yellow


def disk(
    recipe: Recipe, arguments: TrainingArguments, prepared: Prepared, student: Any, optimizer: int, processes: int
) -> Section:
    """The section about disk: `student` is a model without weights, `optimizer` the bytes of its state."""
    section, folder = Section("disk"), RunFolder(Path(arguments.output_dir or "."))
    add = section.findings.append
    if (last := folder.last_checkpoint()) is not None:
        add(green(f"distill resumes from {last}, at step {step_of(last)}"))
    if student is None:
        return section
    saved = [p for p in student.parameters() if p.requires_grad or not hasattr(student, "peft_config")]
    checkpoint = sum(p.nbytes for p in saved) + optimizer
    rows = 0 if prepared.train is None else len(prepared.train)
    written = _checkpoints(arguments, rows, processes)
    limit = arguments.save_total_limit
    kept = written if limit is None else min(written, limit + 1 + bool(arguments.load_best_model_at_end))
    final = student_bytes(recipe, prepared, student)
    total = checkpoint * kept + final
    section.rows.append(("checkpoint", size(checkpoint), "student and optimizer; what else it has is small"))
    about = f"of {written:,} checkpoints, with save_total_limit {'unset' if limit is None else limit}"
    section.rows.append(("kept at once", f"{kept:,}", about))
    section.rows.append(("student/", size(final), "the trained student" + (", merged" if recipe.student.merge else "")))
    place = next(path for path in (folder.path.absolute(), *folder.path.absolute().parents) if path.exists())
    free = shutil.disk_usage(place).free
    sums = f"{size(total)} of {size(free)} that are free at {place}"
    if total > free:
        remedy = "lower save_total_limit, raise save_steps, or give another training.output_dir"
        add(red(f"checkpoints and student need {sums}: {remedy}"))
    elif total > 0.9 * free:
        add(yellow(f"checkpoints and student need {sums}, which leaves little: give another training.output_dir"))
    else:
        add(green(f"checkpoints and student need {sums}"))
    return section


def _checkpoints(arguments: TrainingArguments, rows: int, processes: int) -> int:
    """How many checkpoints a run writes. At the end of training there is one, except with save_strategy no."""
    strategy = getattr(arguments.save_strategy, "value", str(arguments.save_strategy))
    steps = planned_steps(arguments, rows, processes)
    if strategy == "no":
        return 0
    if strategy == "epoch":
        return max(1, round(arguments.num_train_epochs))
    interval = arguments.save_steps if strategy == "steps" else arguments.eval_steps or steps
    interval = max(1, round(interval * steps if interval < 1 else interval))
    return max(1, -(-steps // interval))


def student_bytes(recipe: Recipe, prepared: Prepared, student: Any) -> int:
    """Bytes of the saved student: adapters alone, unless they are merged; in the dtype that it is saved in."""
    adapters = hasattr(student, "peft_config")
    if adapters and not recipe.student.merge:
        return sum(p.nbytes for p in student.parameters() if p.requires_grad)
    block = recipe.student
    came = weights_dtype(prepared.configs.student, "auto") if block.model is not None or block.layers else None
    chosen = weights_dtype(prepared.configs.student, block.save_dtype) if block.save_dtype != "auto" else None
    total = 0
    for name, parameter in student.named_parameters():
        if adapters and ("lora_" in name or ".original_module." in name):
            continue
        width = parameter.dtype.itemsize
        total += parameter.numel() * (chosen.itemsize if chosen else min(width, came.itemsize) if came else width)
    return total

"""What a run will do, in a few lines before it starts: models and their sizes, data, steps, where things go."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console

from ..budget import amount
from ..data.examples import Examples
from ..terminal import counted, show

if TYPE_CHECKING:
    from .build import Run

_QUANTILES = {"shortest": 0.0, "median": 0.5, "95 %": 0.95, "longest": 1.0}


def show_overview(run: "Run", folder: Any, console: Console) -> None:
    """Print the overview of a run that is about to be trained in `folder`."""
    for name, text in overview(run):
        show(f"{name:9} {text}", console)
    show(f"{'folder':9} {folder}", console)


def overview(run: "Run") -> Iterator[tuple[str, str]]:
    """The lines of an overview, (what, text) each."""
    recipe, trainer = run.recipe, run.trainer
    student = trainer.accelerator.unwrap_model(trainer.model)
    block = recipe.student
    origin = block.model or ("random weights" if block.fresh is not None else f"layers {block.layers} of the teacher")
    trained = sum(p.numel() for p in student.parameters() if p.requires_grad)
    total = sum(p.numel() for p in student.parameters())
    part = "" if trained == total else f", {trained:,} of them trained"
    yield "student", f"{origin}: {total:,} parameters{part}, {_place(student)}"
    yield from _teachers(run)
    yield "method", recipe.method[0]
    held_out = "" if run.held_out is None else f"; held out {len(run.held_out):,} of {run.held_out.source}"
    yield "data", f"{counted(len(run.train), 'row', 'rows')} of {run.train.source}{held_out}"
    yield "training", ", ".join(_training(run))


def _teachers(run: "Run") -> Iterator[tuple[str, str]]:
    """The teacher, or a line for each one that it consists of."""
    if run.teacher is None or run.recipe.teacher is None:
        return
    for key, part in run.teacher.parts().items():
        model = part.local_model
        size = "" if model is None else f": {sum(p.numel() for p in model.parameters()):,} parameters, {_place(model)}"
        name = part.model_name or run.recipe.teacher[0]
        yield "teacher", f"{key.removeprefix('teachers.')} is {name}{size}" if key else f"{name}{size}"


def _place(model: Any) -> str:
    """Dtype and device of a model's weights."""
    dtypes = {str(p.dtype).removeprefix("torch.") for p in model.parameters() if p.is_floating_point()}
    devices = {str(p.device) for p in model.parameters()}
    return f"{'/'.join(sorted(dtypes))} on {'/'.join(sorted(devices))}"


def _training(run: "Run") -> Iterator[str]:
    """Steps, batch size and precision."""
    arguments, budget = run.trainer.args, run.recipe.budget
    batch = arguments.train_batch_size * arguments.gradient_accumulation_steps * arguments.world_size
    rows = counted(batch, "row", "rows")
    steps = planned_steps(arguments, len(run.train), arguments.world_size)
    if arguments.max_steps > 0:
        yield f"{counted(steps, 'step', 'steps')} of {rows}"
    else:
        epochs = f"{arguments.num_train_epochs:g} {'epoch' if arguments.num_train_epochs == 1 else 'epochs'}"
        yield f"{epochs}, about {counted(steps, 'step', 'steps')} of {rows}"
    if budget is not None:
        yield f"at most {amount({budget.kind: budget.limit})}"
    if arguments.bf16 or arguments.fp16:
        yield f"mixed precision in {'bfloat16' if arguments.bf16 else 'float16'}"
    if arguments.world_size > 1:
        yield f"{arguments.world_size} processes"


def planned_steps(arguments: Any, rows: int, processes: int) -> int:
    """The number of optimizer steps of a run over a dataset of `rows`, about: an epoch's last step may be smaller."""
    if arguments.max_steps > 0:
        return arguments.max_steps
    batch = arguments.train_batch_size * arguments.gradient_accumulation_steps * processes
    return max(1, int(rows * arguments.num_train_epochs / batch))


def lengths(examples: Examples) -> Iterator[tuple[str, str]]:
    """Quantiles of the lengths of prompts and responses in tokens."""
    yield "prompts", _quantiles([len(example.prompt) for example in examples.examples])
    responses = [len(example.response) for example in examples.examples if example.response]
    if responses:
        yield "responses", _quantiles(responses)
    if missing := len(examples) - len(responses):
        yield "", f"{missing:,} of {len(examples):,} rows have no response"
    cut = {"prompts": examples.cut_prompts, "responses": examples.cut_responses, "rows skipped": examples.skipped}
    if any(cut.values()):
        yield "cut", ", ".join(f"{count:,} {name}" for name, count in cut.items() if count)


def _quantiles(values: Sequence[int]) -> str:
    numbers = torch.tensor(sorted(values), dtype=torch.float64)
    parts = [f"{name} {int(numbers.quantile(q, interpolation='nearest'))}" for name, q in _QUANTILES.items()]
    return f"{', '.join(parts)} tokens"

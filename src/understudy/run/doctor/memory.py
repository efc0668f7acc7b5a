"""Expected memory of a run by device: weights, gradients, optimizer, activations, loss, KV cache; nothing is loaded."""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from transformers import AutoConfig, AutoModelForSequenceClassification, Trainer, TrainingArguments

from ...models.load import ModelSource, load_config, reason, resolve
from ...models.skeleton import quantization_of, skeleton, weight_bytes, without_memory
from ...models.student import student_skeleton
from ...models.vocabulary import vocabulary_size
from ...recipe import Recipe, RecipeError
from ...teachers.routed import RoutedTeacher
from ..prepare import Prepared, teacher_parts, uses_teacher
from ..refusals import Refusals
from .findings import Finding, yellow
from .one_step import Lengths, kv_cache, micro_batch

When = Literal["always", "training", "generating"]
_BLOCKWISE_8_BIT = 2 * (1 + 4 / 256)  # bytes of two states of bitsandbytes, with a float32 for each block of 256
_SMALL = 4096  # elements up to which bitsandbytes' states are float32


@dataclass(frozen=True)
class Part:
    """The memory of one part of a run."""

    name: str
    bytes: int
    device: str
    when: When = "always"
    is_exact: bool = True
    about: str = ""


@dataclass
class Estimate:
    """The memory of a run, part by part, what is not known of it, and the models without weights."""

    parts: list[Part] = field(default_factory=list)
    notes: list[Finding] = field(default_factory=list)
    student: Any = None
    optimizer_bytes: int = 0  # of all processes, as a checkpoint has them

    def largest(self, device: str) -> int:
        """Bytes on a device while it trains or generates, whichever is more."""
        return max(self._sum(device, "training"), self._sum(device, "generating"))

    def exact(self, device: str) -> int:
        """Bytes on a device that are not estimated."""
        return sum(part.bytes for part in self.parts if part.device == device and part.is_exact)

    def _sum(self, device: str, when: When) -> int:
        return sum(part.bytes for part in self.parts if part.device == device and part.when in ("always", when))

    def add(self, what: str, measure: Callable[[], None]) -> None:
        """Measure something; what cannot be measured is noted.

        Raises:
            RecipeError: for what a run would refuse.
        """
        try:
            measure()
        except RecipeError:
            raise
        except Exception as error:  # models raise anything
            message = f"{what} is not estimated ({reason(error)}), so the sum is too small"
            self.notes.append(yellow(f"{message}: try the run with training.max_steps=2"))


def estimate(
    recipe: Recipe,
    arguments: TrainingArguments,
    prepared: Prepared,
    lengths: Lengths | None,
    processes: int,
    refusals: Refusals,
) -> Estimate:
    """The memory of each process of a run."""
    result, device = Estimate(), str(arguments.device)
    if prepared.configs.student is not None:

        def load() -> None:
            result.student = student_skeleton(recipe, prepared.configs.student)

        with refusals.attempt("recipe"), recipe.locating("student"):
            result.add("the student", load)
    teachers = _teachers(recipe, prepared, device, result, refusals)
    result.add("the reward model", lambda: _reward_model(recipe, device, result))
    if result.student is None or prepared.method is None:
        return result
    with without_memory(result.student, *teachers.values()):
        _student(recipe, arguments, prepared, processes, result)
        if lengths is not None:
            _steps(arguments, prepared, lengths, teachers, result)
    return result


def _steps(
    arguments: TrainingArguments, prepared: Prepared, lengths: Lengths, teachers: Mapping[str, Any], result: Estimate
) -> None:
    """A micro-batch and a rollout."""
    student, vocabulary = result.student, vocabulary_size(prepared.configs.tokenizer)
    device = str(arguments.device)
    live = list(teachers.values()) if prepared.method.requires else []

    def training() -> None:
        size = f"{lengths.sequences} sequences of up to {lengths.prompt + lengths.response:,} tokens"
        activations, loss = micro_batch(student, live, lengths, arguments, vocabulary)
        checkpointed = ", gradient checkpointing" if arguments.gradient_checkpointing else ""
        result.parts.append(Part("activations", activations, device, "training", False, f"{size}{checkpointed}"))
        rows = lengths.sequences * lengths.response
        about = f"{rows:,} response tokens: tiles, hidden rows, gradient of the head"
        result.parts.append(Part("loss", loss, device, "training", False, about))

    result.add("the memory of a micro-batch", training)
    for name, model in _writers(prepared, student, teachers).items():
        about = f"{lengths.generated} sequences of up to {lengths.prompt + lengths.response:,} tokens"

        def cache(name: str = name, model: Any = model, about: str = about) -> None:
            size = kv_cache(model, lengths, arguments)
            result.parts.append(Part(f"KV cache, {name}", size, device, "generating", False, about))

        if lengths.generated:
            result.add(f"the KV cache of the {name}'s rollout", cache)


def _writers(prepared: Prepared, student: Any, teachers: Mapping[str, Any]) -> dict[str, Any]:
    """The models that generate responses in this process, by author."""
    authors = prepared.method.authors
    writers = {"student": student} if "student" in authors and not prepared.rollout.is_remote else {}
    return {**writers, "teacher": next(iter(teachers.values()))} if "teacher" in authors and teachers else writers


def _student(
    recipe: Recipe, arguments: TrainingArguments, prepared: Prepared, processes: int, result: Estimate
) -> None:
    """Weights, gradients and optimizer of the student."""
    student, device = result.student, str(arguments.device)
    quantization = quantization_of(prepared.configs.student, recipe.student.options.get("quantization_config"))
    if recipe.student.model is None:
        quantization = None  # fresh weights, and layers, are not
    trained = [p for p in student.parameters() if p.requires_grad]
    total, share = sum(p.numel() for p in student.parameters()), processes if arguments.fsdp else 1
    count = sum(p.numel() for p in trained)
    about = f"{total:,} parameters, {dtypes(student)}" + (f"; {count:,} trained" if count < total else "")
    weights, gradients = weight_bytes(student, quantization), sum(p.nbytes for p in trained)
    is_exact = share == 1 and not arguments.deepspeed
    result.parts.append(Part("student", weights // share, device, "always", is_exact and not quantization, about))
    result.parts.append(Part("gradients", gradients // share, device, "training", is_exact, f"{count:,} numbers"))
    if processes > 1 and share == 1 and not arguments.deepspeed:
        about = f"all gradients once more, for {processes} processes"
        result.parts.append(Part("buckets of DDP", gradients, device, "always", False, about))
    if share > 1 or arguments.deepspeed:
        what = "shared evenly among the processes" if share > 1 else "not divided by DeepSpeed's stages here"
        result.notes.append(yellow(f"student, gradients and optimizer are {what}: the real sum depends on the setting"))

    def optimizer() -> None:
        result.optimizer_bytes, exact = optimizer_bytes(arguments, student, trained)
        name = f"{getattr(arguments.optim, 'value', arguments.optim)}, {result.optimizer_bytes / count:.3g} bytes each"
        size = result.optimizer_bytes // share
        result.parts.append(Part("optimizer", size, device, "always", exact and is_exact, name))

    result.add("the optimizer", optimizer)


def optimizer_bytes(arguments: TrainingArguments, student: Any, trained: list[Any]) -> tuple[int, bool]:
    """Bytes of the optimizer's state, and whether they are exact: of a step of the optimizer itself, without memory."""
    optimizer_class, options = Trainer.get_optimizer_cls_and_kwargs(arguments, student)
    if "bitsandbytes" in optimizer_class.__module__:
        if "8bit" not in str(arguments.optim):
            return sum(8 * p.numel() for p in trained), False
        return sum(int(p.numel() * (_BLOCKWISE_8_BIT if p.numel() >= _SMALL else 8)) for p in trained), False
    optimizer = optimizer_class(trained, **options)
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for parameter in trained:
        parameter.grad = None
    tensors = [x for state in optimizer.state.values() for x in state.values() if isinstance(x, torch.Tensor)]
    return sum(x.nbytes for x in tensors), True


def _teachers(recipe: Recipe, prepared: Prepared, device: str, result: Estimate, refusals: Refusals) -> dict[str, Any]:
    """The teachers in this process, as models without weights, by the keys that name them."""
    teacher, models = prepared.teacher, {}
    if teacher is None or prepared.method is None or not uses_teacher(prepared.method):
        return models
    parts: list[Part] = []
    for key, part in teacher_parts(recipe, teacher).items():
        source = part.source
        if source is None:
            continue

        def load(key: str = key, source: ModelSource = source) -> None:
            config = load_config(source.name)
            fields = quantization_of(config, source.quantization or source.options.get("quantization_config"))
            models[key] = model = skeleton(config, source.dtype)
            about = f"{sum(p.numel() for p in model.parameters()):,} parameters, {dtypes(model)}"
            about += f", quantised ({fields.get('quant_method') or 'bitsandbytes'})" if fields else ""
            place = source.device or device
            parts.append(Part(_name(key), weight_bytes(model, fields), place, "always", not fields, about))

        with refusals.attempt("teacher"), recipe.locating(key):
            result.add(_name(key), load)
    if isinstance(teacher, RoutedTeacher) and teacher.offload and parts:
        largest = max(parts, key=lambda each: each.bytes)
        about = f"the largest of {len(parts)}, which take turns: {largest.about}"
        result.parts.append(Part("teachers", largest.bytes, device, "always", False, about))
        result.parts += [Part(each.name, each.bytes, "cpu", "always", each.is_exact, each.about) for each in parts]
        return models
    result.parts += parts
    return models


def _name(key: str) -> str:
    return key if key == "teacher" else f"teacher {key.rpartition('.')[2]}"


def _reward_model(recipe: Recipe, device: str, result: Estimate) -> None:
    if recipe.reward is None or recipe.reward.model is None:
        return
    config = AutoConfig.from_pretrained(resolve(recipe.reward.model), trust_remote_code=False)
    model = skeleton(config, "auto", AutoModelForSequenceClassification)
    count = sum(p.numel() for p in model.parameters())
    result.parts.append(Part("reward model", weight_bytes(model), device, about=f"{count:,} parameters"))


def dtypes(model: Any) -> str:
    """The dtypes of a model's parameters, those of most numbers first."""
    counts: Counter[str] = Counter()
    for parameter in model.parameters():
        counts[str(parameter.dtype).removeprefix("torch.")] += parameter.numel()
    return "/".join(name for name, _ in counts.most_common())

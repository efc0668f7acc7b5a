"""Checks and settings before training: a trainable student, TrainingArguments for Examples, compiling or not."""

import copy
from collections.abc import Sized
from typing import Any

from torch import nn
from transformers import TrainingArguments

from ..budget import Budget
from ..fused_linear.compiling import compiling_pays_off
from ..models.load import load_tokenizer, refuse_other_tokens
from ..teacher import Teacher
from ..teachers.local import LocalTeacher
from .fields import check_arguments
from .sharding import check_followed, check_sharding, check_whole

_TOKENS_PER_RESPONSE = 64  # assumed, since responses are not generated yet


def check_models(student: nn.Module, teacher: Teacher | None, tokenizer: Any, args: TrainingArguments) -> None:
    """Refuse a student that cannot be trained, and a teacher that cannot score its tokens, follow it or be reached.

    Raises:
        ValueError, TeacherError: with the cause and the remedy.
    """
    check_whole(student)
    check_followed(teacher, args)
    check_trainable(student, teacher)
    check_same_tokenizer(tokenizer, teacher)
    if teacher is not None:
        teacher.setup(tokenizer)


def check_trainable(student: nn.Module, teacher: Teacher | None) -> None:
    """Refuse a student without trainable parameters, or with some that the teacher would follow.

    Raises:
        ValueError: with the cause and the remedy.
    """
    parts = [] if teacher is None else teacher.parts().values()
    trainable = {id(parameter) for parameter in student.parameters() if parameter.requires_grad}
    if not trainable:
        same = any(part.model is student for part in parts)
        if same:
            raise ValueError("the teacher is the student itself, and is frozen: load the teacher as a separate model")
        raise ValueError("all parameters of the student are frozen: unfreeze some, or add adapters")
    live: list[Any] = [part.model for part in parts if isinstance(part, LocalTeacher) and part.model_name is None]
    if any(id(parameter) in trainable for model in live for parameter in model.parameters()):
        raise ValueError(
            "the teacher has trainable parameters of the student, and would change with it: PEFT adds adapters to the "
            "model object that it is given. Load the teacher as a separate model"
        )


def check_same_tokenizer(tokenizer: Any, teacher: Teacher | None) -> None:
    """Refuse a teacher whose tokenizer, where it is known by name, differs from the student's.

    Raises:
        RecipeError: naming the first difference, or if the teacher's tokenizer cannot be loaded.
    """
    for part in [] if teacher is None else teacher.parts().values():
        if part.tokenizer_name is not None:
            refuse_other_tokens(tokenizer, load_tokenizer(part.tokenizer_name))


def adapted(args: TrainingArguments) -> TrainingArguments:
    """A copy of TrainingArguments with the settings that Examples need, and checkpoints kept by `SaveCheckpoints`.

    Raises:
        ValueError: for a field whose effect would be another than its name says, and for several GPUs in one process.
    """
    check_one_gpu(args)
    check_arguments(args)
    check_sharding(args)
    args = copy.copy(args)
    args.remove_unused_columns = False  # Examples have no columns
    args.dataloader_pin_memory = False  # Examples are not tensors
    args.logging_nan_inf_filter = False  # a loss that is NaN or infinite is an error here
    accelerator_config: Any = copy.copy(args.accelerator_config)
    accelerator_config.dispatch_batches = False  # Examples cannot be sent to other processes
    args.accelerator_config = accelerator_config
    args.save_total_limit = None
    return args


def check_one_gpu(args: TrainingArguments) -> None:
    """Refuse several GPUs in one process, among which Trainer would split batches of tensors.

    Raises:
        ValueError: with the remedy.
    """
    if args.n_gpu > 1:
        raise ValueError("several GPUs need one process each: start with torchrun or accelerate launch")


def compiles(args: TrainingArguments, dataset: Sized, vocabulary: int, budget: Budget | None) -> bool:
    """Should loss and decoding be compiled?

    Decided by the configured length of the whole run, so that a resumed run computes the same numbers.
    """
    examples: Any = args.max_steps * args.train_batch_size * args.gradient_accumulation_steps
    if args.max_steps <= 0:
        examples = len(dataset) * args.num_train_epochs
    tokens = _TOKENS_PER_RESPONSE * examples
    if budget is not None and budget.tokens is not None:
        tokens = min(tokens, budget.tokens)
    return args.torch_compile or compiling_pays_off(tokens, vocabulary, args.device.type)

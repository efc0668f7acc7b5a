"""What StudentTrainer accepts in place of its own types: names of models, bare models, rows of a dataset."""

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import datasets
from torch import nn
from transformers import set_seed

from ..batch import Example, check_example
from ..data.examples import Examples, examples_from_rows
from ..data.formats import Row
from ..method import Method
from ..models.context_window import context_window
from ..models.load import load_model, load_tokenizer
from ..sampling import Sampling
from ..teacher import Capability, Teacher
from ..teachers.local import LocalTeacher

_LONGEST = 512  # tokens of prompt and response, where neither `max_length` nor a context window says less


def as_teacher(teacher: Teacher | nn.Module | str | Path | None) -> Teacher | None:
    """A teacher in this process from a model, its name or its folder; a model is frozen."""
    if isinstance(teacher, nn.Module):
        return LocalTeacher(teacher)
    return LocalTeacher(str(teacher)) if isinstance(teacher, str | Path) else teacher


def as_tokenizer(tokenizer: Any, student: nn.Module | str | Path) -> Any:
    """The tokenizer, or the one that is saved under the student's name.

    Raises:
        ValueError: if there is neither.
    """
    if tokenizer is not None:
        return tokenizer
    config = getattr(student, "config", None)
    name = getattr(config, "name_or_path", "") if isinstance(student, nn.Module) else str(student)
    if not name:
        raise ValueError("the student has no name from which its tokenizer can be loaded: give a processing_class")
    return load_tokenizer(name)


def padding(tokenizer: Any) -> int:
    """The id that sequences are padded with. Masks come from lengths, so any id will do."""
    return next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)


def as_student(student: nn.Module | str | Path, peft_config: Any, seed: int) -> nn.Module:
    """The student, loaded in float32 if it is a name or folder, with adapters if there is a `peft_config`.

    The adapters' random weights are drawn from `seed`.

    Raises:
        ValueError: if it has adapters already.
    """
    model: Any = student
    if not isinstance(student, nn.Module):
        model = load_model(str(student), trainable=True, dtype="float32")
    if peft_config is None:
        return model
    if hasattr(model, "peft_config"):
        raise ValueError("the student has adapters already: merge them first, or train them without a peft_config")
    from peft import get_peft_model

    if peft_config.task_type is None:
        peft_config.task_type = "CAUSAL_LM"
    set_seed(seed)
    return get_peft_model(model, peft_config)


class RowReader:
    """Turns datasets and lists of rows into examples; everything else is returned unchanged.

    Args:
        options: of `examples_from_rows`. By default `max_length` is 512 or the models' context length, whichever is
            less, and prompts leave room for the responses that the method's models generate.
    """

    def __init__(
        self,
        tokenizer: Any,
        method: Method,
        sampling: Sampling,
        student: nn.Module,
        teacher: Teacher | None,
        options: Mapping[str, Any],
    ) -> None:
        self.tokenizer, self.method, self.sampling, self.options = tokenizer, method, sampling, options
        self.teacher = teacher if method.requires else None
        parts = [] if teacher is None else teacher.parts().values()
        self.models = [student, *(part.model for part in parts if part.can(Capability.MODEL))]

    @cached_property
    def _lengths(self) -> dict[str, int]:
        window = context_window(*(model.config for model in self.models if hasattr(model, "config")))
        longest = _LONGEST if window is None else min(_LONGEST, window - self.method.teacher_prefix_tokens)
        reserve = self.sampling.max_new_tokens if self.method.authors - {"dataset"} else 1
        return {"max_length": longest, "reserve": reserve}

    def read(self, dataset: Any, name: str) -> Any:
        """The examples of a dataset, which errors call `name`; those of each one in a dictionary of datasets.

        Raises:
            DataError: for a malformed row, or one without a response that the method needs.
            ValueError: for a dataset of several splits.
        """
        if isinstance(dataset, datasets.DatasetDict | datasets.IterableDatasetDict):
            raise ValueError(f"{name} has the splits {', '.join(map(str, dataset))}: choose one, such as {name}[...]")
        if isinstance(dataset, dict):
            return {key: self.read(part, f"{name} {key}") for key, part in dataset.items()}
        examples = dataset
        if _has_rows(dataset):
            examples = examples_from_rows(dataset, self.tokenizer, **{"source": name, **self._lengths, **self.options})
            if "dataset" in self.method.authors:
                examples.require_responses(type(self.method).__name__)
        else:
            self._check(dataset, name)
        if self.teacher is not None and isinstance(examples, Examples | list | tuple):
            self.teacher.check_data(_with_rows(examples, name), {})
        return examples

    def _check(self, dataset: Any, name: str) -> None:
        """Refuse an example that the method cannot train on now, and not at the step that comes to it."""
        if "dataset" in self.method.authors and isinstance(dataset, Examples | list | tuple):
            for index in range(len(dataset)):
                try:
                    check_example(dataset[index])
                except ValueError as error:
                    raise ValueError(f"{name}[{index}]: {error}") from None


def _with_rows(examples: Examples | Sequence[Example], name: str) -> Examples:
    """Examples without texts as those of a dataset, whose errors say which one it is."""
    if isinstance(examples, Examples):
        return examples
    return Examples(examples, [Row(f"{name}[{index}]", "") for index in range(len(examples))], name)


def _has_rows(dataset: Any) -> bool:
    if isinstance(dataset, Sequence) and not isinstance(dataset, str):
        return len(dataset) > 0 and isinstance(dataset[0], Mapping)
    return isinstance(dataset, datasets.Dataset | datasets.IterableDataset)

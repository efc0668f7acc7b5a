"""Load the examples that a recipe's data block describes: a file, a folder, a dataset of the hub, or the playground."""

import hashlib
from typing import Any

from ..playground.names import is_playground, rows
from ..recipe import Data, RecipeError
from .examples import Examples, examples_from_rows, load_examples


def load_data(
    data: Data, tokenizer: Any, context_length: int | None, reserve: int, teacher_context_length: int | None = None
) -> Examples:
    """The examples of a data block, cut to the models' context length, with room for `reserve` new tokens.

    The teacher's context length is for prompts of its own; by default it has no limit.

    Raises:
        RecipeError: if the block's max_length exceeds the context length; and DataError as `load_examples`.
    """
    options = data.model_dump(exclude={"dataset", "split", "name", "seed", "text_as"})
    options["teacher_max_length"] = teacher_context_length
    if context_length is not None and data.max_length > context_length:
        if "max_length" in data.model_fields_set:
            message = f"data.max_length {data.max_length} is more than the models' context length {context_length}"
            raise RecipeError(f"{message}: lower it", "data.max_length")
        options["max_length"] = context_length
    if is_playground(data.dataset):
        if data.text_as != "chunks":
            raise RecipeError(f"data.text_as: {data.text_as} is for .txt files: leave it out", "data.text_as")
        problems = rows(data.dataset, data.split, data.seed, data.limit)
        return examples_from_rows(problems, tokenizer, source=data.dataset, reserve=reserve, **options)
    source = {"split": data.split, "name": data.name, "text_as": data.text_as}
    return load_examples(data.dataset, tokenizer, reserve=reserve, **source, **options)


def data_settings(data: Data, tokenizer: Any) -> dict[str, Any]:
    """What the tokens of an example depend on: the block's fields, and a hash of the tokenizer's chat template."""
    template = tokenizer.chat_template
    digest = None if template is None else hashlib.sha256(str(template).encode()).hexdigest()[:16]
    return {**data.model_dump(exclude={"limit", "on_bad_row"}), "the chat template": digest}

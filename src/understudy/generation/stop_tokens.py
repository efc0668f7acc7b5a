"""Stop tokens: the ids that end a response, from tokenizer, chat template and generation config."""

from typing import Any

from ..data.chat import end_of_response_ids
from ..models.vocabulary import vocabulary_size


def stop_ids(tokenizer: Any, *models: Any) -> list[int]:
    """The ids that end a response, sorted.

    These are the tokenizer's end-of-sequence token, the token with which its chat template ends a turn, and the
    end-of-sequence tokens in the models' generation configs. Ids beyond the tokenizer's vocabulary are left out, since
    they are never drawn. Empty if there is none.
    """
    ids = set() if tokenizer.eos_token_id is None else set(end_of_response_ids(tokenizer))
    for model in models:
        ids.update(_as_list(getattr(getattr(model, "generation_config", None), "eos_token_id", None)))
    size = vocabulary_size(tokenizer)
    return sorted(i for i in ids if i < size)


def _as_list(value: int | list[int] | None) -> list[int]:
    return [] if value is None else [value] if isinstance(value, int) else list(value)

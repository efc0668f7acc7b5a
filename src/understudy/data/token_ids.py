"""Rows that hold token ids beside their texts, such as a file of responses, and are not tokenized again."""

from typing import Any, TypeGuard

from transformers import PreTrainedTokenizerBase

from .errors import BadRow, SourceRow

PROMPT, RESPONSE = "prompt_tokens", "tokens"  # columns


def token_ids(
    row: SourceRow, tokenizer: PreTrainedTokenizerBase, vocabulary: int
) -> tuple[list[int], list[int]] | None:
    """The ids of a row's prompt and response; None for a row without lists of ids.

    Raises:
        BadRow: for ids that the tokenizer does not have, or whose text is another than the row's `response`.
    """
    prompt, response = row.columns.get(PROMPT), row.columns.get(RESPONSE)
    if not _is_ids(prompt) or not _is_ids(response):
        return None
    remedy = "use the tokenizer with which the file was written, or remove the columns of ids"
    if unknown := [i for i in [*prompt, *response] if not 0 <= i < vocabulary]:
        raise BadRow(f"{row.where}: the id {unknown[0]} is none of the tokenizer's {vocabulary} tokens: {remedy}")
    text = row.columns.get("response")
    if isinstance(text, str) and tokenizer.decode(response, skip_special_tokens=True) != text:
        raise BadRow(f"{row.where}: the response's ids are not those of its text with this tokenizer: {remedy}")
    return list(prompt), list(response)


def _is_ids(value: Any) -> TypeGuard[list[int]]:
    return isinstance(value, list) and bool(value) and all(type(i) is int for i in value)

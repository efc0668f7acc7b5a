"""The size of a tokenizer's vocabulary, which models pad and added tokens may extend with gaps between their ids."""

from transformers import PreTrainedTokenizerBase


def vocabulary_size(tokenizer: PreTrainedTokenizerBase) -> int:
    """The number of ids up to the tokenizer's largest one.

    `len(tokenizer)` counts tokens, which is less where some ids have none (Kimi's special tokens leave gaps).
    """
    return max(tokenizer.get_vocab().values(), default=-1) + 1

"""The playground's tokenizers: every word of a task is one token, every digit is one token.

A word's token includes the space before it, as in GPT-2, so that joining the tokens gives the text back exactly. A
digit's token does not, so that it is the same everywhere; the space before a number is a token.
"""

import re

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from .arithmetic import NAMES, THEMES, THINGS
from .instructions.rows import instructions

PIECE = r"####| ?[A-Za-z]+|[\s\S]"  # the result's mark; a word with the space before it; any other character
SPECIAL = ("<pad>", "<eos>", "<unk>")


def vocabulary() -> list[str]:
    """The tokens of the arithmetic task in the order of their ids: special tokens, digits and signs, words."""
    sentences = [f.text for theme in THEMES for part in (theme.openings, theme.events, theme.questions) for f in part]
    words = {piece for text in sentences for piece in re.findall(PIECE, " " + re.sub(r"\{\w+\}", "", text))}
    starts = {re.findall(PIECE, f.text)[0] for theme in THEMES for f in theme.openings}  # no space at a text's start
    slots = {*NAMES, *(f" {word}" for word in (*NAMES, *THINGS))}
    tokens = {token for token in words | starts | slots if re.search("[A-Za-z]", token)}
    return [*SPECIAL, "####", *"0123456789+-*/=\n .,?", *sorted(tokens)]


def words_of_instructions() -> list[str]:
    """The tokens of the instruction task: all words of so many rows that none is missing."""
    rows = [*instructions(40_000), *instructions(2_000, split="unseen")]
    pieces = {piece for row in rows for text in (row["prompt"], row["completion"]) for piece in re.findall(PIECE, text)}
    return [*SPECIAL, *"0123456789\n .,:!?", *sorted(piece for piece in pieces if re.search("[A-Za-z]", piece))]


def tokenizer(name: str = "playground:arithmetic") -> PreTrainedTokenizerFast:
    """A tokenizer with which `decode(encode(text)) == text` for every text of a task; it adds no tokens."""
    tokens = words_of_instructions() if name == "playground:instructions" else vocabulary()
    if name == "playground:both":
        tokens = list(dict.fromkeys([*vocabulary(), *words_of_instructions()]))
    backend = Tokenizer(models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(PIECE), behavior="isolated")
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
        model_max_length=256,
    )

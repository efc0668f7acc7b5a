"""The bytes of each token of a tokenizer, so that tokens of different tokenizers can be compared.

Tokenizers write their tokens in different alphabets: byte-level BPE has a letter for each byte ("Ġthe" is " the"),
SentencePiece writes a space as ▁ and has byte tokens such as <0xE2>, WordPiece marks the tokens that continue a word by
##. As bytes they are all alike, and a text's tokens, one after the other, are the text.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from .errors import DataError

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


@dataclass(frozen=True)
class TokenBytes:
    """The bytes that each token of a tokenizer stands for after other text.

    A special token stands for its name, as in a text that contains it. WordPiece does not write whether a space comes
    before punctuation, so what such a token stands for depends on the text (`ambiguous`).
    """

    pieces: dict[int, bytes]  # by id; SentencePiece's byte tokens, which are rarely used, come last
    special: frozenset[int]
    ambiguous: frozenset[int]

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> "TokenBytes":
        """The bytes of a tokenizer's tokens.

        Raises:
            DataError: for a tokenizer whose tokens are no parts of the text, because it changes the text that it reads.
        """
        backend: Any = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise DataError(
                f"the tokens of a {type(tokenizer).__name__} cannot be read as bytes: use a model that comes with a "
                "tokenizer.json"
            )
        if backend.normalizer is not None and "A" not in backend.normalizer.normalize_str("A"):
            raise DataError(
                "the tokenizer makes capital letters small, so its tokens cannot be found in the text: use a model "
                "whose tokenizer leaves the text as it is"
            )
        added = tokenizer.added_tokens_decoder
        tokens = {i: token for token, i in sorted(tokenizer.get_vocab().items(), key=_order) if i not in added}
        steps = {step["type"]: step for step in _steps(json.loads(backend.to_str())["decoder"])}
        read, prefix = _reader(steps), steps.get("WordPiece", {}).get("prefix")
        pieces = {i: read(token) for i, token in tokens.items()} | {i: t.content.encode() for i, t in added.items()}
        return cls(
            {i: piece for i, piece in pieces.items() if piece},
            special=frozenset(i for i, token in added.items() if token.special),
            ambiguous=frozenset(i for i, token in tokens.items() if prefix and not _is_word_piece(token, prefix)),
        )

    def ids(self) -> dict[bytes, list[int]]:
        """The ids of the tokens that stand for the same bytes, in the order of `pieces`."""
        ids: dict[bytes, list[int]] = {}
        for i, piece in self.pieces.items():
            if i not in self.ambiguous:
                ids.setdefault(piece, []).append(i)
        return ids


def _order(item: tuple[str, int]) -> tuple[bool, int]:
    token, i = item
    return _BYTE_TOKEN.fullmatch(token) is not None, i


def _reader(steps: Mapping[str, Mapping[str, Any]]) -> Callable[[str], bytes]:
    """From a token to its bytes, by the steps of the tokenizer's decoder."""
    if "ByteLevel" in steps:
        byte_of = {letter: bytes([byte]) for byte, letter in _byte_letters()}
        return lambda token: b"".join(byte_of.get(letter, letter.encode()) for letter in token)
    if "Metaspace" in steps or steps.get("Replace", {}).get("pattern") == {"String": "▁"}:
        return _sentencepiece
    if "WordPiece" in steps:
        prefix = steps["WordPiece"]["prefix"]
        return lambda token: _wordpiece(token, prefix)
    if not steps:
        return lambda token: f" {token}".encode()  # words, which are joined by spaces
    if steps.keys() <= {"Fuse", "Strip"}:
        return str.encode
    raise DataError(
        f"tokens that are decoded by {' and '.join(steps)} cannot be read as bytes: use a model whose tokenizer is a "
        "byte-level BPE, SentencePiece or WordPiece"
    )


def _steps(decoder: dict[str, Any] | None) -> Iterator[dict[str, Any]]:
    """The steps of a decoder, which may be nested."""
    if decoder is not None and decoder["type"] == "Sequence":
        for step in decoder["decoders"]:
            yield from _steps(step)
    elif decoder is not None:
        yield decoder


def _byte_letters() -> Iterator[tuple[int, str]]:
    """The letter that stands for each byte in byte-level BPE (GPT-2): itself where it is printable."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = 0
    for byte in range(256):
        yield byte, chr(byte if byte in printable else 256 + others)
        others += byte not in printable


def _sentencepiece(token: str) -> bytes:
    byte = _BYTE_TOKEN.fullmatch(token)
    return bytes([int(byte[1], 16)]) if byte else token.replace("▁", " ").encode()


def _is_word_piece(token: str, prefix: str) -> bool:
    return token.startswith(prefix) or token[0].isalnum()


def _wordpiece(token: str, prefix: str) -> bytes:
    if token.startswith(prefix):
        return token.removeprefix(prefix).encode()
    return f" {token}".encode() if token[0].isalnum() and not _is_ideograph(token[0]) else token.encode()


def _is_ideograph(letter: str) -> bool:
    """Is this a character of Chinese or Japanese, which are written without spaces?"""
    return any(first <= ord(letter) <= last for first, last in ((0x3400, 0x9FFF), (0xF900, 0xFAFF), (0x20000, 0x323AF)))

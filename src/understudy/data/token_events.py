"""Which tokens of two vocabularies are one event, so that next-token distributions over both can be compared.

Tokens are compared as bytes. Each kind of events is a partition of both vocabularies, the last part of which is "any
other token": special tokens that the other vocabulary lacks, and tokens whose bytes depend on the text before them.

    shared       an event for each string that both vocabularies have
    first_piece  the same events, and a token that the other vocabulary lacks belongs to the event of the first token
                 with which the other tokenizer would begin its string
    first_byte   an event for each byte with which tokens of both begin

With first pieces every token is led to one event: the first piece is shorter than the token and belongs to the other
vocabulary, so the first piece of the first piece of … is in the end a string that both have.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

from .retokenize import Retokenizer
from .token_bytes import TokenBytes
from .tokenize import TextEncoder

Kind = Literal["shared", "first_piece", "first_byte"]


@dataclass(frozen=True)
class EventsOfTokens:
    """The event of each token, by id; the last event is any other token."""

    source: list[int]
    target: list[int]
    count: int


def events_of_tokens(retokenizer: Retokenizer, kind: Kind, sizes: tuple[int, int]) -> EventsOfTokens:
    """The events over which the source's and the target's next tokens are compared.

    Args:
        sizes: the number of ids of source and target.
    """
    sides = (retokenizer.source_bytes, retokenizer.target_bytes)
    if kind == "first_byte":
        events, count = _by_first_byte(retokenizer, sides)
    else:
        pairs = retokenizer.shared_tokens()
        events = ({pair[0]: k for k, pair in enumerate(pairs)}, {pair[1]: k for k, pair in enumerate(pairs)})
        count = len(pairs) + 1
        if kind == "first_piece":
            _add_by_first_piece(events, retokenizer, sides)
    source, target = ([of.get(i, count - 1) for i in range(size)] for of, size in zip(events, sizes, strict=True))
    return EventsOfTokens(source, target, count)


def _by_first_byte(
    retokenizer: Retokenizer, sides: tuple[TokenBytes, TokenBytes]
) -> tuple[tuple[dict[int, int], dict[int, int]], int]:
    """The events of a first byte that both have, and one for the tokens that end a response."""
    first = [{i: piece[0] for i, piece in _ordinary(side).items()} for side in sides]
    both = sorted(set(first[0].values()) & set(first[1].values()))
    number = {byte: k for k, byte in enumerate(both)}
    source, target = ({i: number[byte] for i, byte in of.items() if byte in number} for of in first)
    end = len(both)
    return (source | {retokenizer.ends[0]: end}, target | {retokenizer.ends[1]: end}), end + 2


def _add_by_first_piece(
    events: tuple[dict[int, int], dict[int, int]], retokenizer: Retokenizer, sides: tuple[TokenBytes, TokenBytes]
) -> None:
    """Add the tokens that the other vocabulary lacks; shorter ones first, because longer ones are led to them."""
    by_bytes = {piece: events[0][i] for i, piece in _ordinary(sides[0]).items() if i in events[0]}
    missing = []
    for side, tokens in enumerate(sides):
        lacking = {i: piece for i, piece in _ordinary(tokens).items() if i not in events[side]}
        first = first_pieces(set(lacking.values()), sides[1 - side], retokenizer.encoders[1 - side])
        missing += [(len(piece), side, i, piece, first.get(piece)) for i, piece in lacking.items()]
    for _, side, i, piece, first in sorted(missing, key=lambda entry: entry[:3]):
        event = by_bytes.get(piece)
        if event is None and first is not None:
            event = events[1 - side].get(first)
        if event is not None and i not in retokenizer.ends:
            events[side][i] = event


def first_pieces(pieces: set[bytes], tokens: TokenBytes, encoder: TextEncoder) -> dict[bytes, int]:
    """The token with which a tokenizer begins each string, where there is one that the string begins with.

    A string that is no text by itself, such as half a character, begins with the longest token that fits.
    """
    texts = sorted(piece for piece in pieces if _is_text(piece))
    encoded = encoder.encode_responses([text.decode() for text in texts])
    first = {text: ids[0] for text, ids in zip(texts, encoded, strict=True) if ids}
    first = {piece: token for piece, token in first.items() if _begins(piece, token, tokens)}
    longest = _longest(tokens)
    first |= {piece: token for piece in pieces - first.keys() if (token := longest(piece)) is not None}
    return first


def _begins(piece: bytes, token: int, tokens: TokenBytes) -> bool:
    """Does the string begin with the token, and go on after it?"""
    start = tokens.pieces.get(token, piece)
    return token not in tokens.special and len(start) < len(piece) and piece.startswith(start)


def _longest(tokens: TokenBytes) -> Callable[[bytes], int | None]:
    ids: Mapping[bytes, list[int]] = {
        piece: of for piece, of in tokens.ids().items() if not tokens.special.issuperset(of)
    }

    def longest(piece: bytes) -> int | None:
        begins = (piece[:end] for end in range(len(piece) - 1, 0, -1))
        return next((ids[begin][0] for begin in begins if begin in ids), None)

    return longest


def _ordinary(tokens: TokenBytes) -> dict[int, bytes]:
    """The tokens that stand for the same bytes in every text."""
    return {i: piece for i, piece in tokens.pieces.items() if i not in tokens.special and i not in tokens.ambiguous}


def _is_text(piece: bytes) -> bool:
    try:
        piece.decode()
    except UnicodeDecodeError:
        return False
    return True

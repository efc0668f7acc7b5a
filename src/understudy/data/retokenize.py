"""Re-tokenize prompts and responses for a model with another tokenizer, and find the token boundaries that both share.

A response is the bytes of its tokens. The other tokenizer reads the same bytes; where a token begins in both at the
same byte, the two models have read the same text and predict what comes next.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from ..batch import Example
from .chat import ChatTemplate, ResponseEnd, end_of_response_ids
from .errors import BadRow
from .token_bytes import TokenBytes
from .tokenize import TextEncoder

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Retokenized:
    """An example in the tokens of another tokenizer."""

    prompt: list[int]
    response: list[int]  # its last token is the one that ends a response
    indices: list[int | None]  # for each token of the example's response, the one here that begins at the same byte
    spans: "list[Span]"  # where one of the two has several tokens between two such places


class Span(NamedTuple):
    """The same bytes in the tokens of both tokenizers, one or both of which have several."""

    tokens: range  # of the example's response
    others: range  # of the response here


class Retokenizer:
    """Translates examples from the tokens of one tokenizer, the source, to those of another, the target.

    Args:
        chat_template_kwargs: of the target's chat template.

    Raises:
        DataError: for a tokenizer whose tokens cannot be read as bytes, or that has no end-of-sequence token.
    """

    def __init__(
        self,
        source: PreTrainedTokenizerBase,
        target: PreTrainedTokenizerBase,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        self.source = source
        self._stop_ids = end_of_response_ids(source)
        self.source_bytes, self.target_bytes = TokenBytes.of(source), TokenBytes.of(target)
        self._target_ids = self.target_bytes.ids()
        self.encoders = TextEncoder(source), TextEncoder(target)
        self._template = ChatTemplate(target, chat_template_kwargs or {})
        self.ends = _ends(source, target)
        self._warned: set[str] = set()

    def shared_tokens(self) -> list[tuple[int, int]]:
        """The tokens that both tokenizers have: pairs of ids, source and target, that stand for the same bytes.

        Of several tokens with the same bytes the first belongs to the first, the second to the second. One pair are
        the tokens that end a response, whatever they are called.
        """
        pairs = [
            pair
            for piece, ids in self.source_bytes.ids().items()
            for pair in zip(ids, self._target_ids.get(piece, []), strict=False)
            if pair[0] != self.ends[0] and pair[1] != self.ends[1]
        ]
        return sorted([*pairs, self.ends])

    def retokenize(self, examples: Sequence[Example]) -> list[Retokenized]:
        """The examples in the target's tokens.

        A prompt that a chat template rendered is rendered by the target's own. Any other is read as it is, without
        special tokens.
        """
        texts = [self._text(example.response) for example in examples]
        responses = self.encoders[1].encode_responses([text.decode() for text, _ in texts])
        results = []
        for example, (text, offsets), response in zip(examples, texts, responses, strict=True):
            pieces = [self.target_bytes.pieces.get(token) for token in response]
            starts = token_starts(pieces, text)
            indices = [None if offset is None else starts.get(offset) for offset in offsets]
            spans = [span for span in _spans(indices) if _bytes(pieces, span.others) == _between(text, offsets, span)]
            results.append(Retokenized(self._prompt(example), [*response, self.ends[1]], indices, spans))
        return results

    def _text(self, response: Sequence[int]) -> tuple[bytes, list[int | None]]:
        """The bytes of a response that the target can read, and where each token begins in them.

        They end before a special token that the target does not have, and before bytes that are no UTF-8, as in a
        response that is cut inside a character. A token after these begins nowhere (None).
        """
        text, offsets = b"", []
        for place, token in enumerate(response):
            offsets.append(len(text))
            piece = self.source_bytes.pieces.get(token)
            is_end = token in self._stop_ids and place == len(response) - 1
            if piece is None or is_end or (token in self.source_bytes.special and piece not in self._target_ids):
                break
            text += piece
        try:
            text.decode()
        except UnicodeDecodeError as error:
            text = text[: error.start]
        return text, [*offsets, *[None] * (len(response) - len(offsets))]

    def _prompt(self, example: Example) -> list[int]:
        """The prompt's ids in the target; at least one."""
        if (text := self._rendered(example)) is not None:
            return self.encoders[1].encode([text])[0]
        text = self.source.decode(
            example.prompt_for_teacher, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        assert isinstance(text, str)
        encoder = self.encoders[1]
        ids, prefix = encoder.encode([text])[0], encoder.prefix
        ids = ids if ids[: len(prefix)] == prefix else [*prefix, *ids]
        return ids or [self.ends[1]]  # as in pretraining, where a text follows the end of another

    def _rendered(self, example: Example) -> str | None:
        """The example's conversation as the target's chat template renders it; None where it does not."""
        conversation = example.conversation
        if conversation is None or example.teacher_prompt is not None:
            return None
        if example.last_turn() is not example:
            return self._warn("it reads conversations with several turns to train on", "set data.train_on: last")
        if not self._template.tokenizer.chat_template:
            return self._warn("it has no chat template, and reads conversations", "choose a chat model as the teacher")
        try:
            return self._template.render_prompt(f"row {example.row}", **conversation)
        except BadRow as error:
            return self._warn(f"{error}. It reads such a prompt", "choose a teacher whose template can render it")

    def _warn(self, what: str, remedy: str) -> None:
        """Log once that the teacher reads prompts in another way than a chat model is used to."""
        if remedy not in self._warned:
            self._warned.add(remedy)
            logger.warning("the teacher: %s as the student's prompts without special tokens; %s", what, remedy)


def token_starts(pieces: Sequence[bytes | None], text: bytes) -> dict[int, int]:
    """From the bytes of a text at which a token begins to that token's index; the end of the text is one as well.

    Where a token's bytes are not those of the text but for white space, as with a tokenizer that leaves it out, the
    token begins nowhere. After an unknown token (None), and one that the text does not have, nothing is known.
    """
    starts: dict[int, int] = {}
    place = 0
    for index, piece in enumerate(pieces):
        if piece is not None and text.startswith(piece, place):
            starts[place] = index
            place += len(piece)
            continue
        word = (piece or b"").strip()
        place = len(text) - len(text[place:].lstrip())
        if not word or not text.startswith(word, place):
            return starts
        place += len(word)
    if place == len(text):
        starts[place] = len(pieces)
    return starts


def _spans(indices: Sequence[int | None]) -> Iterator[Span]:
    """Between two neighbouring places at which both have a token: the tokens of both, where these are several."""
    places = [(place, index) for place, index in enumerate(indices) if index is not None]
    for (start, first), (end, last) in pairwise(places):
        if end - start > 1 or last - first > 1:
            yield Span(range(start, end), range(first, last))


def _bytes(pieces: Sequence[bytes | None], places: range) -> bytes:
    return b"".join(pieces[place] or b"" for place in places)


def _between(text: bytes, offsets: Sequence[int | None], span: Span) -> bytes:
    return text[offsets[span.tokens.start] : offsets[span.tokens.stop]]


def _ends(source: PreTrainedTokenizerBase, target: PreTrainedTokenizerBase) -> tuple[int, int]:
    """The tokens that end a response: those of both chat templates, or else both end-of-sequence tokens.

    Raises:
        DataError: for a tokenizer without an end-of-sequence token.
    """
    names = [ResponseEnd.of(tokenizer).token for tokenizer in (source, target)]
    if None in names:
        names = [source.eos_token, target.eos_token]
    ids: list[Any] = [t.convert_tokens_to_ids(str(name)) for t, name in zip((source, target), names, strict=True)]
    return ids[0], ids[1]

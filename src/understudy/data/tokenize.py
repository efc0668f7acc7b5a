"""Tokenize prompts, responses and plain texts, and cut them to a maximum length."""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise

from transformers import PreTrainedTokenizerBase

from ..batch import Example
from ..terminal import counted
from .chat import Span, end_of_response_ids
from .errors import BadRow, DataError, printable
from .formats import Document, Row

logger = logging.getLogger(__name__)


class TextEncoder:
    """Tokenizes texts that others follow or that follow others.

    `prefix` holds the tokens that the tokenizer's post-processor adds before a text (Llama's BOS). They are looked up
    once, because applied to every text the post-processor could add an end-of-sequence token after prompts.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        text, newline, both = self.encode(["a", "\n", "\na"])
        processed = tokenizer("a")["input_ids"]
        starts = (i for i in range(len(processed)) if processed[i : i + len(text)] == text)
        self.prefix: list[int] = list(processed[: next(starts, 0)])
        # SentencePiece tokenizers add a space before the first word of a text, which a response is not.
        self.newline = newline if both[: len(newline)] == newline and both[len(newline) :] != text else []

    def encode(self, texts: list[str]) -> list[list[int]]:
        """The ids of each text, without special tokens that are not in the text itself."""
        if not texts:
            return []
        return self.tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]

    def encode_responses(self, texts: list[str]) -> list[list[int]]:
        """The ids of each text as the continuation of another: without the space that some tokenizers add before it."""
        if not self.newline:
            return self.encode(texts)
        after_newline, separate = self.encode([f"\n{text}" if text else "" for text in texts]), self.encode(texts)
        size = len(self.newline)
        pairs = zip(separate, after_newline, strict=True)
        return [after[size:] if after[:size] == self.newline else ids for ids, after in pairs]


@dataclass
class ExampleBuilder:
    """Builds examples of token ids from rows and documents, and counts what is cut and skipped.

    Prompt and response are tokenized separately and joined as ids, so the response begins exactly where generation
    begins. It ends with a stop token unless it is cut. Plain prompts begin with the tokens that the tokenizer adds
    before a text (Llama's BOS), and never end with an end-of-sequence token, which some tokenizers add.
    `examples_from_rows` documents the options.
    """

    tokenizer: PreTrainedTokenizerBase
    max_length: int
    max_prompt_length: int
    text_prompt: int
    on_bad_row: str
    on_long_prompt: str
    teacher_max_length: int | None = None
    reserve: int = 1
    cut_prompts: int = 0
    cut_responses: int = 0
    cut_teacher_prompts: int = 0
    skipped: list[BadRow] = field(default_factory=list)

    def __post_init__(self) -> None:
        for option, choices in {"on_bad_row": ("error", "skip"), "on_long_prompt": ("cut", "skip", "error")}.items():
            if getattr(self, option) not in choices:
                raise DataError(f'{option} is "{getattr(self, option)}", and can be {" or ".join(choices)}')
        self.stop_ids = end_of_response_ids(self.tokenizer)
        self.encoder = TextEncoder(self.tokenizer)

    def report_bad_row(self, error: BadRow) -> None:
        """Raise the error or count the row as skipped, as `on_bad_row` says."""
        if self.on_bad_row == "error":
            raise error
        self.skipped.append(error)

    def examples(self, texts: list[Row | Document]) -> Iterator[tuple[Example, Row]]:
        """Examples, each with its texts: those of the rows, then those of the documents."""
        yield from self._from_rows([text for text in texts if isinstance(text, Row)])
        yield from self._from_documents([text for text in texts if isinstance(text, Document)])

    def _from_rows(self, rows: list[Row]) -> Iterator[tuple[Example, Row]]:
        prompts = self._prompts(rows)
        responses = self.encoder.encode_responses([row.response for row in rows])
        teacher_prompts = self.encoder.encode([row.teacher_prompt or "" for row in rows])
        parts = zip(rows, prompts, responses, teacher_prompts, strict=True)
        for row, (prompt, trained), response, teacher_prompt in parts:
            if row.ids is not None:
                prompt, response = row.ids
                trained = [False] * len(prompt)
            if not prompt or (row.response and not response):
                self.report_bad_row(BadRow(f"{row.where}: the {'response' if prompt else 'prompt'} has no token"))
                continue
            if row.ids is None and not row.chat:
                size = len(prompt)
                prompt = self._with_prefix(prompt)
                trained = [False] * (len(prompt) - size) + trained
            if len(prompt) > self.max_prompt_length:
                too_long = f"{row.where}: the prompt has {len(prompt)} tokens, and {self.max_prompt_length} fit"
                if self.on_long_prompt == "error":
                    raise DataError(f"{too_long}; raise max_length, or let on_long_prompt cut or skip it")
                if self.on_long_prompt == "skip":
                    self.skipped.append(BadRow(too_long))
                    continue
                self.cut_prompts += 1
                prompt = self._cut_prompt(prompt, self.max_prompt_length)
                trained = trained[-len(prompt) :]
            is_open = bool(response) and response[-1] not in self.stop_ids
            if is_open and row.ids is None:
                response = [*response, self.tokenizer.eos_token_id]
            room = self.max_length - len(prompt)
            is_cut = len(response) > room
            self.cut_responses += is_cut
            truncated = is_cut or (is_open and row.ids is not None)  # by the length limit of its rollout
            example = _example(prompt, trained, response[:room], truncated, row)
            if row.teacher_prompt is not None:
                ids = self._for_teacher(row, teacher_prompt, max(len(example.response), self.reserve))
                if ids is None:
                    continue
                example = replace(example, teacher_prompt=ids)
            yield example, row

    def _for_teacher(self, row: Row, prompt: list[int], response: int) -> list[int] | None:
        """The ids of the teacher's own prompt, before `response` tokens; None for a row that is skipped."""
        if not prompt:
            self.report_bad_row(BadRow(f"{row.where}: the teacher's prompt has no token"))
            return None
        prompt = prompt if row.chat else self._with_prefix(prompt)
        limit = len(prompt) if self.teacher_max_length is None else self.teacher_max_length - response
        if len(prompt) <= limit:
            return prompt
        too_long = f"{row.where}: the teacher's prompt has {len(prompt)} tokens, and {limit} fit"
        if self.on_long_prompt == "error" or limit < 1:
            raise DataError(f"{too_long} into its context window; shorten it, or let on_long_prompt cut or skip it")
        if self.on_long_prompt == "skip":
            self.skipped.append(BadRow(too_long))
            return None
        self.cut_teacher_prompts += 1
        return self._cut_prompt(prompt, limit)

    def _with_prefix(self, prompt: list[int]) -> list[int]:
        prefix = self.encoder.prefix
        return prompt if prompt[: len(prefix)] == prefix else [*prefix, *prompt]

    def _prompts(self, rows: list[Row]) -> list[tuple[list[int], list[bool]]]:
        """The ids of each row's prompt, and which of them are trained on, as the assistant's earlier turns are."""
        whole = iter(self.encoder.encode([row.prompt for row in rows if not row.turns]))
        parts = [_split_at(row.prompt, row.turns) for row in rows if row.turns]
        firsts = iter(self.encoder.encode([first for first, *_ in parts]))
        others = iter(self.encoder.encode_responses([text for _, *texts in parts for text in texts]))
        sizes = iter(len(texts) for texts in parts)
        prompts = []
        for row in rows:
            if row.turns:
                pieces = [next(firsts), *(next(others) for _ in range(next(sizes) - 1))]  # every second one is a turn
                ids = [i for piece in pieces for i in piece]
                prompts.append((ids, [bool(place % 2) for place, piece in enumerate(pieces) for _ in piece]))
            else:
                prompts.append((ids := next(whole), [False] * len(ids)))
        return prompts

    def _cut_prompt(self, prompt: list[int], limit: int) -> list[int]:
        """The end of a prompt, after the BOS, since many models have never seen a text without it."""
        prefix = self.encoder.prefix if prompt[: len(self.encoder.prefix)] == self.encoder.prefix else []
        prefix = prefix[: limit - 1]
        return prefix + prompt[len(prompt) - limit + len(prefix) :]

    def _from_documents(self, documents: list[Document]) -> Iterator[tuple[Example, Row]]:
        if not documents:
            return
        if self.text_prompt < 1 or self.text_prompt > self.max_prompt_length:
            raise DataError(
                f"text_prompt is {self.text_prompt}, and a prompt can have 1 to {self.max_prompt_length} tokens"
            )
        chunks, places = self._chunks(documents)
        prompts = [chunk[: self.text_prompt] for chunk in chunks]
        responses = [chunk[self.text_prompt :] for chunk in chunks]
        texts = self.tokenizer.batch_decode(prompts + responses, skip_special_tokens=True)
        for index, (where, prompt, response) in enumerate(zip(places, prompts, responses, strict=True)):
            if not response:
                size = counted(len(prompt), "token", "tokens")
                reason = f"a piece of {size} is no longer than text_prompt ({self.text_prompt}); lower that, or set"
                self.skipped.append(BadRow(f"{where}: {reason} text_as: lines where each line of a .txt is a prompt"))
                continue
            truncated = response[-1] != self.tokenizer.eos_token_id
            text = texts[len(chunks) + index]
            yield Example(prompt, response, truncated=truncated), Row(where, texts[index], (text,), text)

    def _chunks(self, documents: list[Document]) -> tuple[list[list[int]], list[str]]:
        """The documents' ids in chunks of up to `max_length`, and for each chunk the place of its document."""
        room = self.max_length - len(self.encoder.prefix)
        lines = [document.text.strip().splitlines(keepends=True) for document in documents]
        sizes = iter(self.encoder.encode([line for document in lines for line in document]))
        texts = [_join_lines([(line, len(next(sizes))) for line in document], room) for document in lines]
        ids = iter(self.encoder.encode([text for document in texts for text in document]))
        chunks, places = [], []
        for document, document_texts in zip(documents, texts, strict=True):
            for _ in document_texts:
                text_ids = next(ids)  # may be a little longer than the sum of its lines, so it is cut once more
                starts = range(0, len(text_ids), room)
                chunks += [self.encoder.prefix + text_ids[start : start + room] for start in starts]
            places += [document.where] * (len(chunks) - len(places))
            if len(chunks[-1]) < self.max_length:
                chunks[-1].append(self.tokenizer.eos_token_id)
        return chunks, places

    def log_counts(self, count: int, source: str, remedy: str) -> None:
        """Warn of prompts and responses that were cut, and rows that were skipped."""
        if self.cut_prompts:
            logger.warning(
                "%d of %d prompts of %s are longer than %d tokens and lost their beginning; %s",
                *(self.cut_prompts, count, printable(source), self.max_prompt_length, remedy),
            )
        if self.cut_teacher_prompts:
            logger.warning(
                "%d of %d prompts of %s are too long for the teacher's context window (%d) and lost their beginning",
                *(self.cut_teacher_prompts, count, printable(source), self.teacher_max_length or 0),
            )
        if self.cut_responses:
            logger.warning(
                "%d of %d responses of %s reach beyond max_length %d and lose their end in training; raise max_length "
                "(references are not cut)",
                *(self.cut_responses, count, printable(source), self.max_length),
            )
        if self.skipped:
            first = self.skipped[0]
            logger.warning(
                "%s of %s skipped, the first because %s",
                *(counted(len(self.skipped), "row", "rows"), printable(source), first),
            )


def _example(prompt: list[int], trained: list[bool], response: list[int], truncated: bool, row: Row) -> Example:
    """The example of a row; from its first complete trained turn on, the prompt belongs to the response."""
    start = next((i for i in range(1, len(prompt)) if trained[i] and not trained[i - 1]), len(prompt))
    mask = None if start == len(prompt) else [*trained[start:], *[True] * len(response)]
    response = [*prompt[start:], *response]
    further = {"columns": row.columns, "conversation": row.conversation}
    return Example(prompt[:start], response, truncated=truncated, trained=mask, **further)


def _split_at(text: str, turns: Sequence[Span]) -> list[str]:
    """The text before the first turn, the first turn, the text between, the second turn, …, the text after the last."""
    places = [0, *(place for turn in turns for place in turn), len(text)]
    return [text[start:end] for start, end in pairwise(places)]


def _join_lines(lines: list[tuple[str, int]], room: int) -> list[str]:
    """Join lines, as pairs (line, tokens), into texts of up to `room` tokens; a longer line is a text by itself."""
    texts: list[str] = []
    text, used = "", 0
    for line, size in lines:
        if text and used + size > room:
            texts.append(text)
            text, used = "", 0
        if text or line.strip():  # no text begins with a blank line
            text, used = text + line, used + size
    return [*texts, text] if text else texts

"""Examples: a dataset as token ids, ready to train on.

The one idea: prompt and response are tokenised apart and meet as ids. The response begins exactly where generation
would begin, and ends with a token that says so unless it was cut; whatever is cut or skipped is counted and reported.

`rows.py` finds the rows, `formats.py` says what their columns mean; here texts become ids of bounded length.
"""

import hashlib
import logging
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from ..batch import Example
from .formats import Document, Format, Row, stop_ids
from .rows import BadRow, DataError, SourceRow, read_rows

__all__ = ["BadRow", "DataError", "Examples", "Row", "examples_from_rows", "load_examples", "stop_ids"]

logger = logging.getLogger(__name__)

AT_ONCE = 1000  # rows that are tokenised in one call


@dataclass(frozen=True, eq=False)
class Examples(Dataset[Example]):
    """Examples for a DataLoader (with `collate_fn=list`) or a Trainer.

    `rows[i]` holds the texts of example i: the prompt, and every reference to compare an answer with.
    """

    examples: Sequence[Example]
    rows: Sequence[Row]
    source: str
    cut_prompts: int = 0
    cut_responses: int = 0
    skipped: int = 0

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> Example:
        return self.examples[index]

    @cached_property
    def has_responses(self) -> bool:
        """Does every example have a response? One that has none is a prompt for methods that let a model answer."""
        return all(example.response for example in self.examples)

    def require_responses(self, by: str = "this method") -> None:
        """Refuse prompts without a response, on behalf of what trains on responses.

        Raises:
            DataError: naming how many rows have none, and the first of them.
        """
        bare = [row.where for example, row in zip(self.examples, self.rows, strict=True) if not example.response]
        if bare:
            count = "no row" if len(bare) == len(self) else f"only {len(self) - len(bare)} of {len(self)} rows"
            raise DataError(
                f"{by} trains on responses, and {count} of {self.source} has one (the first without: {bare[0]}); "
                "give a completion, output or answer column, or name it with columns"
            )

    @cached_property
    def fingerprint(self) -> str:
        """16 hexadecimal digits that change with any token of any example."""
        digest = hashlib.sha256()
        for example in self.examples:
            ids = array("q", [len(example.prompt), *example.prompt, len(example.response), *example.response])
            digest.update(ids.tobytes())
        return digest.hexdigest()[:16]


def load_examples(
    dataset: str | Path,
    tokenizer: PreTrainedTokenizerBase,
    *,
    split: str = "train",
    name: str | None = None,
    **options: Any,
) -> Examples:
    """Read a file, a folder or a dataset of the hub as examples.

    `split` and `name` are those of `rows.read_rows`, the `options` those of `examples_from_rows`.

    Raises:
        DataError: if the dataset is not there or cannot be read, and as `examples_from_rows`.
    """
    return examples_from_rows(read_rows(dataset, split, name), tokenizer, source=str(dataset), **options)


def examples_from_rows(
    rows: Iterable[Mapping[str, Any] | SourceRow | BadRow],
    tokenizer: PreTrainedTokenizerBase,
    *,
    source: str = "rows",
    columns: Mapping[str, str] | None = None,
    template: str | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    max_length: int = 512,
    max_prompt_length: int | None = None,
    reserve: int = 1,
    text_prompt: int = 32,
    on_bad_row: Literal["error", "skip"] = "error",
    on_long_prompt: Literal["cut", "skip", "error"] = "cut",
    limit: int | None = None,
) -> Examples:
    """Turn rows, which may be plain dictionaries, into examples.

    Plain prompts begin with what the tokenizer puts before a text (Llama's BOS) and never end with what some put
    behind it; responses have the stop token alone behind them. Texts are joined as they are, without a space.

    Running text (rows with the column `text`) is cut into windows of up to `max_length` tokens. A window holds whole
    lines, so it begins where a line begins; only a line longer than a window is cut inside. Its first `text_prompt`
    tokens are the prompt, the others the response, which has no stop token unless the document ends with it. A window
    with no more tokens than that is skipped.

    Args:
        source: what complaints call the rows' origin.
        columns: what the data calls our columns, such as {"prompt": "en", "completion": "de"}.
        template: a format string over the data's columns that writes the prompt.
        chat_template_kwargs: handed to the tokenizer's chat template.
        max_length: the most tokens of prompt and response together; longer responses lose their end.
        max_prompt_length: the most tokens of a prompt; longer ones keep a BOS and their end. Unless it is given,
            a prompt may take `max_length - reserve`.
        reserve: tokens that stay free for a response behind every prompt, such as a rollout's max_new_tokens.
        text_prompt: the tokens of a window of running text that serve as its prompt.
        on_bad_row: stop at a malformed row, or skip and count it.
        on_long_prompt: cut, skip or refuse a prompt that is too long.
        limit: take so many examples from the beginning.

    Raises:
        DataError: in one sentence, for a malformed row, lengths that leave no room, and a dataset without any example.
    """
    form = Format(tokenizer, columns, template, chat_template_kwargs)
    cutter = _Cutter(
        tokenizer,
        max_length=max_length,
        max_prompt_length=_prompt_room(max_length, max_prompt_length, reserve),
        text_prompt=text_prompt,
        on_bad_row=on_bad_row,
        on_long_prompt=on_long_prompt,
    )
    if limit is not None and limit < 1:
        raise DataError(f"limit is {limit}, and a dataset needs at least one example")
    texts = _read(rows, form, source, cutter.complain)
    made: list[tuple[Example, Row]] = []
    while limit is None or len(made) < limit:
        some = list(islice(texts, AT_ONCE if limit is None else min(AT_ONCE, limit - len(made))))
        if not some:
            break
        made.extend(cutter.examples(some))
    made = made[:limit]
    if not made:
        if not cutter.skipped:
            raise DataError(f"{source} holds no rows")
        count = len(cutter.skipped)
        raise DataError(f"{source} holds no usable row: {count} skipped, the first because {cutter.skipped[0]}")
    cutter.report(len(made), source, _remedy(max_length, max_prompt_length, reserve))
    return Examples(
        examples=[replace(example, row=index) for index, (example, _) in enumerate(made)],
        rows=[row for _, row in made],
        source=source,
        cut_prompts=cutter.cut_prompts,
        cut_responses=cutter.cut_responses,
        skipped=len(cutter.skipped),
    )


def _prompt_room(max_length: int, max_prompt_length: int | None, reserve: int) -> int:
    """The tokens a prompt may have, such that `reserve` tokens of response fit behind it."""
    room = max_length - reserve if max_prompt_length is None else max_prompt_length
    if reserve < 1 or room < 1 or room + reserve > max_length:
        prompt = "a prompt" if max_prompt_length is None else f"a prompt of max_prompt_length {max_prompt_length}"
        raise DataError(
            f"max_length {max_length} has no room for {prompt} and {reserve} tokens of response; raise max_length, or "
            "lower what has to fit into it"
        )
    return room


def _remedy(max_length: int, max_prompt_length: int | None, reserve: int) -> str:
    """What gives prompts more room than `_prompt_room` found."""
    if max_prompt_length is not None:
        return f"raise max_prompt_length ({max_prompt_length})"
    return f"raise max_length ({max_length})" + (f" or lower max_new_tokens ({reserve})" if reserve > 1 else "")


def _read(
    rows: Iterable[Mapping[str, Any] | SourceRow | BadRow],
    form: Format,
    source: str,
    complain: Callable[[BadRow], None],
) -> Iterator[Row | Document]:
    """What the rows say, without the bad ones, of which `complain` hears."""
    for number, row in enumerate(rows, 1):
        try:
            if isinstance(row, BadRow):
                raise row
            text = form.read(row if isinstance(row, SourceRow) else SourceRow(f"{source}, row {number}", dict(row)))
        except BadRow as error:
            complain(error)
        else:
            yield text


@dataclass
class _Cutter:
    """Tokenises texts and cuts them to length, and counts what that costs."""

    tokenizer: PreTrainedTokenizerBase
    max_length: int
    max_prompt_length: int
    text_prompt: int
    on_bad_row: str
    on_long_prompt: str
    cut_prompts: int = 0
    cut_responses: int = 0
    skipped: list[BadRow] = field(default_factory=list)

    def __post_init__(self):
        for option, choices in {"on_bad_row": ("error", "skip"), "on_long_prompt": ("cut", "skip", "error")}.items():
            if getattr(self, option) not in choices:
                raise DataError(f'{option} is "{getattr(self, option)}", and can be {" or ".join(choices)}')
        self.stops = stop_ids(self.tokenizer)
        # What the tokenizer's own post-processor puts before a text. Asking for it once, instead of letting it work on
        # every text, keeps it from putting an end-of-sequence token behind prompts.
        text, newline, both = self.encode(["a", "\n", "\na"])
        whole = self.tokenizer("a")["input_ids"]
        at = next((start for start in range(len(whole)) if whole[start : start + len(text)] == text), 0)
        self.prefix: list[int] = list(whole[:at])
        # SentencePiece tokenizers put a space before the first word of a text. A response does not begin a text.
        self.newline = newline if both[: len(newline)] == newline and both[len(newline) :] != text else []

    def complain(self, error: BadRow) -> None:
        if self.on_bad_row == "error":
            raise error
        self.skipped.append(error)

    def encode(self, texts: list[str]) -> list[list[int]]:
        """The ids of each text, without any special token that is not in the text itself."""
        if not texts:
            return []
        return self.tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]

    def encode_responses(self, texts: list[str]) -> list[list[int]]:
        """The ids of each text as it stands behind another: without the space some tokenizers put before a text."""
        if not self.newline:
            return self.encode(texts)
        behind, alone = self.encode([f"\n{text}" if text else "" for text in texts]), self.encode(texts)
        cut = len(self.newline)
        return [b[cut:] if b[:cut] == self.newline else a for a, b in zip(alone, behind, strict=True)]

    def examples(self, texts: list[Row | Document]) -> Iterator[tuple[Example, Row]]:
        yield from self._pairs([text for text in texts if isinstance(text, Row)])
        yield from self._windows([text for text in texts if isinstance(text, Document)])

    def _pairs(self, rows: list[Row]) -> Iterator[tuple[Example, Row]]:
        prompts = self.encode([row.prompt for row in rows])
        responses = self.encode_responses([row.response for row in rows])
        for row, prompt, response in zip(rows, prompts, responses, strict=True):
            if not prompt or (row.response and not response):
                self.complain(BadRow(f"{row.where}: the {'response' if prompt else 'prompt'} has no token"))
                continue
            if not row.chat and prompt[: len(self.prefix)] != self.prefix:
                prompt = self.prefix + prompt
            if len(prompt) > self.max_prompt_length:
                too_long = f"{row.where}: the prompt has {len(prompt)} tokens, and {self.max_prompt_length} have room"
                if self.on_long_prompt == "error":
                    raise DataError(f"{too_long}; raise max_length, or let on_long_prompt cut or skip it")
                if self.on_long_prompt == "skip":
                    self.skipped.append(BadRow(too_long))
                    continue
                self.cut_prompts += 1
                prompt = self._end_of(prompt)
            if response and response[-1] not in self.stops:
                response = [*response, self.tokenizer.eos_token_id]
            room = self.max_length - len(prompt)
            truncated = len(response) > room
            self.cut_responses += truncated
            yield Example(prompt, response[:room], truncated=truncated, columns=row.columns), row

    def _end_of(self, prompt: list[int]) -> list[int]:
        # A model that knows no text without a BOS gets one with a shortened prompt, too.
        head = self.prefix if prompt[: len(self.prefix)] == self.prefix else []
        head = head[: self.max_prompt_length - 1]
        return head + prompt[len(prompt) - self.max_prompt_length + len(head) :]

    def _windows(self, documents: list[Document]) -> Iterator[tuple[Example, Row]]:
        if not documents:
            return
        if self.text_prompt < 1 or self.text_prompt > self.max_prompt_length:
            raise DataError(
                f"text_prompt is {self.text_prompt}, and a prompt can have 1 to {self.max_prompt_length} tokens"
            )
        room = self.max_length - len(self.prefix)
        lines = [document.text.strip().splitlines(keepends=True) for document in documents]
        sizes = iter(self.encode([line for document in lines for line in document]))
        chunks = [_chunks([(line, len(next(sizes))) for line in document], room) for document in lines]
        ids = iter(self.encode([chunk for document in chunks for chunk in document]))
        windows, wheres = [], []
        for document, pieces in zip(documents, chunks, strict=True):
            for _ in pieces:
                chunk = next(ids)  # may differ a little from the sum of its lines, so it is cut once more
                windows += [self.prefix + chunk[start : start + room] for start in range(0, len(chunk), room)]
            wheres += [document.where] * (len(windows) - len(wheres))
            if len(windows[-1]) < self.max_length:
                windows[-1].append(self.tokenizer.eos_token_id)
        prompts = [window[: self.text_prompt] for window in windows]
        responses = [window[self.text_prompt :] for window in windows]
        texts = self.tokenizer.batch_decode(prompts + responses, skip_special_tokens=True)
        for index, (where, prompt, response) in enumerate(zip(wheres, prompts, responses, strict=True)):
            if not response:
                self.skipped.append(BadRow(f"{where}: a piece of {len(prompt)} tokens is no longer than text_prompt"))
                continue
            truncated = response[-1] != self.tokenizer.eos_token_id
            text = texts[len(windows) + index]
            yield Example(prompt, response, truncated=truncated), Row(where, texts[index], (text,), text)

    def report(self, count: int, source: str, remedy: str) -> None:
        if self.cut_prompts:
            logger.warning(
                "%d of %d prompts of %s are longer than %d tokens and lost their beginning; %s",
                *(self.cut_prompts, count, source, self.max_prompt_length, remedy),
            )
        if self.cut_responses:
            logger.warning(
                "%d of %d responses of %s reach beyond max_length %d and lose their end in training; raise max_length "
                "(references stay whole)",
                *(self.cut_responses, count, source, self.max_length),
            )
        if self.skipped:
            count, first = len(self.skipped), self.skipped[0]
            logger.warning("%d rows of %s were skipped, the first because %s", count, source, first)


def _chunks(lines: list[tuple[str, int]], room: int) -> list[str]:
    """Join lines, given with their sizes, into texts of up to `room` tokens; a longer line makes a text of its own."""
    chunks: list[str] = []
    chunk, filled = "", 0
    for line, size in lines:
        if chunk and filled + size > room:
            chunks.append(chunk)
            chunk, filled = "", 0
        if chunk or line.strip():  # no chunk begins with a blank line
            chunk, filled = chunk + line, filled + size
    return [*chunks, chunk] if chunk else chunks

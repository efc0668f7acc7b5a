"""Example: a prompt and a response as token ids. Batch: examples as the tensors that a model reads.

Before the model everything is a ragged list of token ids; after it there is one row per trained response token. Padding
happens once, in `Batch.from_examples`; masks come from lengths, never from comparing ids with a padding id.

Shapes: B sequences, T positions, N trained response tokens in the whole batch.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor

Author = Literal["dataset", "student", "teacher", "corpus"]
Reduction = Literal["sequence", "token", "sum", "pair"]


@dataclass(frozen=True)
class Example:
    """A prompt and one response to it, as token ids; the response includes its end-of-sequence token, if it has one."""

    prompt: list[int]
    response: list[int]
    author: Author = "dataset"  # who generated the response
    row: int = -1  # the dataset row that the prompt comes from
    pair: int = -1  # examples that are compared with each other share this number and one micro-batch
    truncated: bool = False  # was the response cut off by a length limit?
    trained: Sequence[bool] | None = None  # which response tokens are trained on; None: all. The others are only read
    teacher_prompt: list[int] | None = None  # what the teacher reads in place of `prompt`
    streams: Mapping[str, Sequence[float]] = field(default_factory=dict)  # by name, a number per response token
    inputs: Mapping[str, Any] = field(default_factory=dict, repr=False, compare=False)  # further model inputs
    columns: Mapping[str, Any] = field(default_factory=dict, repr=False, compare=False)  # the dataset row
    # what a chat template rendered as the prompt of `last_turn`: its `messages` and `tools`; None for a plain text
    conversation: Mapping[str, Any] | None = field(default=None, repr=False, compare=False)

    def __len__(self) -> int:
        return len(self.prompt) + len(self.response)

    @property
    def prompt_for_teacher(self) -> list[int]:
        """The prompt's ids as the teacher reads them."""
        return self.prompt if self.teacher_prompt is None else self.teacher_prompt

    @property
    def trained_tokens(self) -> list[int]:
        """Indices in the response, counted from 0, of the tokens that are trained on."""
        if self.trained is None:
            return list(range(len(self.response)))
        return [place for place, is_trained in enumerate(self.trained) if is_trained]

    def last_turn(self) -> "Example":
        """The example with the last part of the response that is trained on as its response, and all before as prompt.

        In a conversation of which all turns of the assistant are trained on, this is the last one: what a model is to
        generate.
        """
        starts = [place for before, place in pairwise(self.trained_tokens) if place - before > 1]
        if self.trained is None or not starts:
            return self
        first = starts[-1]
        prompt = [*self.prompt, *self.response[:first]]
        teacher_prompt = self.teacher_prompt and [*self.teacher_prompt, *self.response[:first]]
        streams = {name: values[first:] for name, values in self.streams.items()}
        changes = {"prompt": prompt, "teacher_prompt": teacher_prompt, "streams": streams}
        return replace(self, response=self.response[first:], trained=self.trained[first:], **changes)


@dataclass(frozen=True)
class Batch:
    """Examples as tensors, padded on the right.

    `predicts` marks the positions whose next token is trained on: of a response that is trained on as a whole, the last
    prompt token (it predicts the response's first token) up to the last but one token of the sequence. `tokens`,
    `sequence_ids` and every stream are in that order.
    """

    input_ids: Tensor  # (B, T)
    attention_mask: Tensor  # (B, T)
    predicts: Tensor  # (B, T) bool
    tokens: Tensor  # (N,) the trained response tokens, sequence after sequence
    sequence_ids: Tensor  # (N,) the sequence that each of them belongs to
    lengths: Tensor  # (B,) trained response tokens per sequence
    examples: tuple[Example, ...]

    @classmethod
    def from_examples(cls, examples: Sequence[Example], pad: int, device: torch.device | str = "cpu") -> "Batch":
        """Pad `examples` to their longest with the id `pad` (which may equal the end-of-sequence id).

        Raises:
            ValueError: for no examples, and for an example that has no prompt token, no trained response token, or a
                `trained` mask of another length than its response.
        """
        if not examples:
            raise ValueError("a batch needs at least one example")
        for example in examples:
            check_example(example)
        width = max(map(len, examples))
        input_ids = torch.tensor([[*e.prompt, *e.response] + [pad] * (width - len(e)) for e in examples])
        predicts = torch.zeros(len(examples), width, dtype=torch.bool)
        for sequence, example in enumerate(examples):
            predicts[sequence, [len(example.prompt) - 1 + place for place in example.trained_tokens]] = True
        lengths = predicts.sum(-1)
        end = torch.tensor([[len(e)] for e in examples])
        return cls(
            input_ids=input_ids.to(device),
            attention_mask=(torch.arange(width) < end).long().to(device),
            predicts=predicts.to(device),
            tokens=input_ids.roll(-1, dims=1)[predicts].to(device),
            sequence_ids=torch.arange(len(examples)).repeat_interleave(lengths).to(device),
            lengths=lengths.to(device),
            examples=tuple(examples),
        )

    def to(self, device: torch.device | str) -> "Batch":
        """The same batch with its tensors on `device`."""
        return replace(self, **{name: x.to(device) for name, x in vars(self).items() if isinstance(x, Tensor)})

    def as_read_by_teacher(self) -> "Batch":
        """The same N rows after the teacher's own prompts, in examples that have a `teacher_prompt`."""
        if all(example.teacher_prompt is None for example in self.examples):
            return self
        examples = [replace(example, prompt=example.prompt_for_teacher) for example in self.examples]
        # masks come from lengths, so any id can be the padding
        return Batch.from_examples(examples, pad=0, device=self.input_ids.device)

    def split_by_length(self, size: int) -> list[tuple["Batch", Tensor]]:
        """The sequences, shortest first, in batches of similar length that are no wider than they need to be.

        Each but the last has at least `size` padded tokens, and comes with the indices (n,) of its rows among the N of
        this batch.
        """
        runs: list[list[int]] = []
        for sequence in sorted(range(len(self.examples)), key=lambda i: len(self.examples[i])):
            if not runs or len(runs[-1]) * len(self.examples[runs[-1][-1]]) >= size:
                runs.append([])
            runs[-1].append(sequence)
        return [self.select(run) for run in runs]

    def select(self, sequences: Sequence[int]) -> tuple["Batch", Tensor]:
        """Some of the sequences as a batch that is no wider than it needs to be.

        It comes with the indices (n,) of its rows among the N of this batch.
        """
        run = list(sequences)
        ends = self.lengths.cumsum(0).tolist()
        examples = tuple(self.examples[i] for i in run)
        width = max(map(len, examples))
        lengths = self.lengths[run]
        starts = [ends[i] - length for i, length in zip(run, lengths.tolist(), strict=True)]
        indices = [n for i, start in zip(run, starts, strict=True) for n in range(start, ends[i])]
        index = torch.tensor(indices, device=self.tokens.device)
        sequence_ids = torch.arange(len(run), device=lengths.device).repeat_interleave(lengths)
        ids, mask, predicts = (x[run, :width] for x in (self.input_ids, self.attention_mask, self.predicts))
        return Batch(ids, mask, predicts, self.tokens[index], sequence_ids, lengths, examples), index

    def stream(self, name: str) -> Tensor:
        """(N,) the examples' stream of that name, at the trained response tokens; float32.

        Raises:
            ValueError: if an example does not have it, or not one number per response token.
        """
        values: list[float] = []
        for example in self.examples:
            numbers = example.streams.get(name)
            if numbers is None or len(numbers) != len(example.response):
                has = "none" if numbers is None else f"{len(numbers)} numbers for {len(example.response)} tokens"
                raise ValueError(
                    f'the method reads the stream "{name}", a number per response token, and the example of row '
                    f"{example.row} has {has}"
                )
            values += [numbers[place] for place in example.trained_tokens]
        return torch.tensor(values, dtype=torch.float32, device=self.tokens.device)

    def per_sequence(self, values: Tensor) -> Tensor:
        """Sum token values (N,) into sequence values (B,)."""
        return values.new_zeros(len(self.examples)).index_add(0, self.sequence_ids, values)

    def written_by(self, author: Author) -> Tensor:
        """(N,) bool: does this token belong to a response of `author`?"""
        return torch.tensor([e.author == author for e in self.examples], device=self.tokens.device)[self.sequence_ids]

    def weights(self, reduction: Reduction) -> Tensor:
        """(N,) the weight of each token in Σ weight · value, before division by `normalizer(reduction)`.

        With D_bt the value of token t of sequence b:

            sequence   (1/B) Σ_b (1/|y_b|) Σ_t D_bt      the GKD paper's (Eq. 2)
            token      Σ_bt D_bt / Σ_b |y_b|
            sum        (1/B) Σ_b Σ_t D_bt                the divergence between whole sequences
            pair       Σ / number of pairs               for losses that compare the responses of a pair
        """
        if reduction == "sequence":
            return self.lengths.reciprocal()[self.sequence_ids]
        return torch.ones(len(self.tokens), device=self.tokens.device)

    def normalizer(self, reduction: Reduction) -> int:
        """What the weighted sum is divided by: the batch's tokens, its pairs, or its sequences."""
        if reduction == "pair":
            return len({example.pair for example in self.examples if example.pair >= 0})
        return len(self.tokens) if reduction == "token" else len(self.examples)


def check_example(example: Example) -> None:
    """Refuse an example that cannot be trained on.

    Raises:
        ValueError: naming its row and what is wrong.
    """
    if not example.prompt or not example.response:
        part = "prompt" if not example.prompt else "response"
        raise ValueError(f"the example of row {example.row} has an empty {part}; every example needs both")
    if example.trained is not None and len(example.trained) != len(example.response):
        raise ValueError(
            f"the example of row {example.row} has {len(example.response)} response tokens, but a `trained` mask of "
            f"length {len(example.trained)}: give one value per response token"
        )
    if example.trained is not None and not any(example.trained):
        raise ValueError(f"the example of row {example.row} has no response token to train on: leave the row out")


def groups(examples: Iterable[Example]) -> list[list[Example]]:
    """The examples in lists that must not be separated: the examples of a pair together, every other one by itself."""
    by_key: dict[tuple[str, int], list[Example]] = {}
    for index, example in enumerate(examples):
        key = ("pair", example.pair) if example.pair >= 0 else ("single", index)
        by_key.setdefault(key, []).append(example)
    return list(by_key.values())


def micro_batches(examples: Sequence[Example], parts: int) -> list[list[Example]]:
    """Split examples into exactly `parts` micro-batches, none empty, the largest as small as possible.

    Groups are sorted by length and cut into consecutive runs, so that a micro-batch holds sequences of similar length
    and little padding; the cuts minimise the largest padded size (sequences × longest), which is the peak of memory.

    Raises:
        ValueError: if there are fewer groups than parts.
    """
    ordered = sorted(groups(examples), key=_longest)
    if len(ordered) < parts:
        raise ValueError(
            f"{len(ordered)} examples (pairs count once) cannot fill {parts} micro-batches; "
            "lower gradient_accumulation_steps or raise the batch size"
        )
    low, high = 1, len(examples) * _longest(ordered[-1])
    while low < high:
        middle = (low + high) // 2
        if len(_runs(ordered, parts, middle)) > parts:
            low = middle + 1
        else:
            high = middle
    return _runs(ordered, parts, high)


def _runs(ordered: list[list[Example]], parts: int, limit: int) -> list[list[Example]]:
    """Groups, shortest first, in runs as long as the padded size `limit` allows, but at least `parts` runs."""
    runs: list[list[Example]] = []
    for index, group in enumerate(ordered):
        full = not runs or (len(runs[-1]) + len(group)) * _longest(group) > limit
        if full or len(ordered) - index <= parts - len(runs):
            runs.append([])
        runs[-1].extend(group)
    return runs


def _longest(group: list[Example]) -> int:
    return max(map(len, group))

"""Examples, the ragged things a method trains on, and Batch, the tensors a model reads.

The one idea: everything before the model is ragged lists of token ids, everything after it is one row per
response token. Padding happens once, here; masks come from lengths, never from comparing ids with a padding id.

Shapes: B sequences, T positions, N response tokens in the whole batch.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor

Author = Literal["dataset", "student", "teacher", "corpus"]
Reduction = Literal["sequence", "token", "sum"]


@dataclass(frozen=True)
class Example:
    """A prompt and one response to it, as token ids; the response includes its end-of-sequence token, if it has one."""

    prompt: list[int]
    response: list[int]
    author: Author = "dataset"
    row: int = -1  # the dataset row that the prompt comes from
    pair: int = -1  # examples that are compared with each other share this number and one micro-batch
    truncated: bool = False  # did the response run out of room before it ended?
    columns: Mapping[str, Any] = field(default_factory=dict, repr=False, compare=False)  # the dataset's row
    rewards: Mapping[str, float] = field(default_factory=dict, compare=False)  # what the response is worth, by name
    advantage: float = 0.0  # its reward over that of others
    streams: Mapping[str, Sequence[float]] = field(default_factory=dict)  # a number per response token, by name

    def __len__(self) -> int:
        return len(self.prompt) + len(self.response)


@dataclass(frozen=True)
class Batch:
    """Examples as tensors, padded on the right.

    `predicts` marks the positions whose next token belongs to a response: the last prompt token (it predicts the
    response's first token) up to the last but one token of the sequence. `tokens` and `owner` come in that order.
    """

    input_ids: Tensor  # (B, T)
    attention_mask: Tensor  # (B, T)
    predicts: Tensor  # (B, T) bool
    tokens: Tensor  # (N,) the response tokens, sequence after sequence
    owner: Tensor  # (N,) the sequence that each response token belongs to
    lengths: Tensor  # (B,) response tokens per sequence
    examples: tuple[Example, ...]

    @classmethod
    def of(cls, examples: Sequence[Example], pad: int, device: torch.device | str = "cpu") -> "Batch":
        """Pad `examples` to their longest with the id `pad` (which may equal the end-of-sequence id).

        Raises:
            ValueError: for no examples, and for an example without a prompt token or without a response token.
        """
        if not examples:
            raise ValueError("a batch needs at least one example")
        for example in examples:
            if not example.prompt or not example.response:
                part = "prompt" if not example.prompt else "response"
                raise ValueError(f"the example of row {example.row} has an empty {part}; every example needs both")
        width = max(map(len, examples))
        input_ids = torch.tensor([[*e.prompt, *e.response] + [pad] * (width - len(e)) for e in examples])
        position = torch.arange(width)
        start = torch.tensor([[len(e.prompt)] for e in examples])
        stop = torch.tensor([[len(e)] for e in examples])
        lengths = (stop - start)[:, 0]
        predicts = (start - 1 <= position) & (position < stop - 1)
        return cls(
            input_ids=input_ids.to(device),
            attention_mask=(position < stop).long().to(device),
            predicts=predicts.to(device),
            tokens=torch.tensor([token for e in examples for token in e.response]).to(device),
            owner=torch.arange(len(examples)).repeat_interleave(lengths).to(device),
            lengths=lengths.to(device),
            examples=tuple(examples),
        )

    def to(self, device: torch.device | str) -> "Batch":
        """The same batch with its tensors on `device`."""
        return replace(self, **{name: x.to(device) for name, x in vars(self).items() if isinstance(x, Tensor)})

    def pieces(self, size: int) -> list[tuple["Batch", Tensor]]:
        """The sequences, shortest first, in batches of like length that are no wider than they need to be.

        Each has at least `size` padded tokens, as far as there are any, and comes with the places (n,) that its
        response tokens have among the N here.
        """
        ends = self.lengths.cumsum(0).tolist()
        runs: list[list[int]] = []
        for row in sorted(range(len(self.examples)), key=lambda row: len(self.examples[row])):
            if not runs or len(runs[-1]) * len(self.examples[runs[-1][-1]]) >= size:
                runs.append([])
            runs[-1].append(row)
        pieces = []
        for rows in runs:
            examples = tuple(self.examples[row] for row in rows)
            width = max(map(len, examples))
            places = [place for row in rows for place in range(ends[row] - len(self.examples[row].response), ends[row])]
            at = torch.tensor(places, device=self.tokens.device)
            lengths = self.lengths[rows]
            owner = torch.arange(len(rows), device=lengths.device).repeat_interleave(lengths)
            ids, mask, predicts = (x[rows, :width] for x in (self.input_ids, self.attention_mask, self.predicts))
            pieces.append((Batch(ids, mask, predicts, self.tokens[at], owner, lengths, examples), at))
        return pieces

    def per_sequence(self, values: Tensor) -> Tensor:
        """Sum token values (N,) into sequence values (B,)."""
        return values.new_zeros(len(self.examples)).index_add(0, self.owner, values)

    def written_by(self, author: Author) -> Tensor:
        """(N,) bool: does this response token belong to a response of `author`?"""
        return torch.tensor([e.author == author for e in self.examples], device=self.owner.device)[self.owner]

    def weights(self, reduction: Reduction) -> Tensor:
        """(N,) what each token counts in Σ weight · value, before division by `units(reduction)`.

        With D_bt the value of token t of sequence b:

            sequence   (1/B) Σ_b (1/|y_b|) Σ_t D_bt      the GKD paper's (Eq. 2)
            token      Σ_bt D_bt / Σ_b |y_b|
            sum        (1/B) Σ_b Σ_t D_bt                the divergence between whole sequences
        """
        if reduction == "sequence":
            return self.lengths.reciprocal()[self.owner]
        return torch.ones(len(self.tokens), device=self.tokens.device)

    def units(self, reduction: Reduction) -> int:
        """What the weighted sum is divided by: the batch's tokens for `token`, its sequences otherwise."""
        return len(self.tokens) if reduction == "token" else len(self.examples)


def groups(examples: Iterable[Example]) -> list[list[Example]]:
    """The examples in lists that must not be separated: those of one pair together, every other one alone."""
    together: dict[tuple[str, int], list[Example]] = {}
    for index, example in enumerate(examples):
        key = ("pair", example.pair) if example.pair >= 0 else ("single", index)
        together.setdefault(key, []).append(example)
    return list(together.values())


def deal(examples: Sequence[Example], parts: int) -> list[list[Example]]:
    """Deal examples into exactly `parts` micro-batches, none empty, the largest as small as it can be.

    Groups are sorted by length and cut into consecutive runs, so that a micro-batch holds sequences of like length and
    little padding; the cuts make the largest padded size (sequences × longest), which is the peak of memory, minimal.

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
    """Groups, shortest first, in runs as long as the padded size `limit` lets them be, but at least `parts` runs."""
    runs: list[list[Example]] = []
    for index, group in enumerate(ordered):
        full = not runs or (len(runs[-1]) + len(group)) * _longest(group) > limit
        if full or len(ordered) - index <= parts - len(runs):
            runs.append([])
        runs[-1].extend(group)
    return runs


def _longest(group: list[Example]) -> int:
    return max(map(len, group))

"""What `understudy serve` computes: the scores of the sequences of all waiting requests, and responses to prompts.

Shapes: N trained tokens of a request, V vocabulary, K likeliest tokens, D width.
"""

from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor

from ..batch import Batch, Example
from ..fused_linear.distributions import Dense, Distribution, Projected
from ..fused_linear.head import Head
from ..fused_linear.tiles import rows_per_tile
from ..models.context_window import context_window
from ..models.fingerprint import fingerprint, vocabulary_fingerprint
from ..models.vocabulary import vocabulary_size
from ..rollout import Rollout
from ..sampling import Sampling
from ..step import Step
from ..teacher import Teacher
from . import wire


class Scorer:
    """Answers requests with a live teacher.

    Args:
        rollout: generates responses with the teacher's model.
        batch_tokens: padded tokens per forward.
    """

    def __init__(self, teacher: Teacher, tokenizer: Any, name: str, rollout: Rollout, batch_tokens: int) -> None:
        self.teacher, self.batch_tokens = teacher, batch_tokens
        self.rollout = rollout.bind(teacher.model, tokenizer, "teacher")
        model: Any = teacher.model
        distribution = teacher.score(Batch.from_examples([Example([0], [0])], 0)).distribution
        self.head: Head | None = distribution.head if isinstance(distribution, Projected) else None
        transform = {} if self.head is None else vars(self.head.transform)
        self.info = wire.Info(
            protocol=wire.PROTOCOL,
            version=version("understudy"),
            model=name,
            fingerprint=fingerprint(model),
            vocabulary=vocabulary_fingerprint(tokenizer),
            vocabulary_size=vocabulary_size(tokenizer),
            context_length=context_window(model.config),
            dtype=wire.dtype_name(next(model.parameters()).dtype),
            hidden=self.head is not None,
            **transform,
        )

    def packed_head(self) -> bytes:
        """The reply to GET /head."""
        assert self.head is not None
        return wire.pack(self.head.tensors())

    def refusal(self, request: wire.ScoreRequest) -> str | None:
        """Why a request cannot be answered, in words; None: it can be."""
        if request.top_k is None and self.head is None:
            return "this model's head cannot be sent: ask for top_k"
        if (request.top_k or 0) > self.info.vocabulary_size:
            return f"top_k is above the {self.info.vocabulary_size} tokens of the vocabulary"
        for sequence in request.sequences:
            places = sequence.trained
            if places != sorted(set(places)) or not 0 <= places[0] <= places[-1] < len(sequence.response):
                return "trained holds other numbers than indices in the response, in their order"
            if reason := self._refused_ids([*sequence.prompt, *sequence.response]):
                return reason
        return None

    def refused_prompts(self, request: wire.GenerateRequest) -> str | None:
        """As `refusal`, for GET /generate."""
        if len(request.rows) != len(request.prompts):
            return "rows and prompts differ in number"
        return next(filter(None, map(self._refused_ids, request.prompts)), None)

    def _refused_ids(self, ids: Sequence[int]) -> str | None:
        if max(ids) >= self.info.vocabulary_size:
            return f"the token id {max(ids)} is none of the {self.info.vocabulary_size} of the vocabulary"
        length = self.info.context_length
        if length is not None and len(ids) > length:
            return f"a sequence of {len(ids)} tokens does not fit into the context window of {length}"
        return None

    def score(self, requests: Sequence[wire.ScoreRequest]) -> list[bytes]:
        """The replies to requests, whose sequences are scored together, those of similar length in one forward."""
        replies: list[bytes] = [b""] * len(requests)
        for top_k in {request.top_k for request in requests}:
            places = [place for place, request in enumerate(requests) if request.top_k == top_k]
            examples = [[s.example() for s in requests[place].sequences] for place in places]
            columns = self._scored([example for part in examples for example in part], top_k)
            counts = [sum(len(e.trained_tokens) for e in part) for part in examples]
            parts = {name: values.split(counts) for name, values in columns.items()}
            for index, place in enumerate(places):
                replies[place] = wire.pack({name: values[index] for name, values in parts.items()})
        return replies

    def _scored(self, examples: Sequence[Example], top_k: int | None) -> dict[str, Tensor]:
        """`hidden`, or `values`, `support` and `chosen`, of all trained tokens."""
        whole = Batch.from_examples(examples, 0)
        columns: list[dict[str, Tensor]] = []
        indices: list[Tensor] = []
        for part, index in whole.split_by_length(self.batch_tokens):
            scores = self.teacher.score(part)
            distribution = scores.distribution
            if top_k is None:
                assert isinstance(distribution, Projected)
                columns.append({"hidden": distribution.hidden.cpu()})
            else:
                columns.append(_likeliest(distribution.cut(self.info.vocabulary_size), scores.tokens, top_k))
            indices.append(index)
        order = torch.cat(indices).argsort()
        return {name: torch.cat([column[name] for column in columns])[order] for name in columns[0]}

    def generate(self, request: wire.GenerateRequest) -> wire.GenerateReply:
        """Responses of the teacher.

        Raises:
            ValueError: for sampling parameters that there are none of, or that the rollout refuses.
        """
        try:
            sampling, step = Sampling(**request.sampling), Step(**request.step)
        except TypeError as error:
            raise ValueError(str(error)) from None
        prompts = [Example(ids, [], row=row) for ids, row in zip(request.prompts, request.rows, strict=True)]
        examples = self.rollout.generate(prompts, sampling, step)
        return wire.GenerateReply(
            responses=[example.response for example in examples],
            truncated=[example.truncated for example in examples],
            streams=[{name: list(values) for name, values in example.streams.items()} for example in examples],
        )


def _likeliest(distribution: Distribution, tokens: Tensor, k: int) -> dict[str, Tensor]:
    """The K likeliest tokens (N, K) and the chosen ones (N,), a few rows at a time."""
    assert isinstance(distribution, Projected | Dense)
    columns: dict[str, list[Tensor]] = {"values": [], "support": [], "chosen": []}
    size = max(1, rows_per_tile(distribution.vocabulary, tokens.device) // 4)
    for start in range(0, len(tokens), size):
        log_probs = distribution.log_probs(slice(start, start + size)).float()
        chosen = tokens[start : start + size, None].to(log_probs.device)
        values, support = log_probs.topk(k)
        for name, column in (("values", values), ("support", support), ("chosen", log_probs.gather(-1, chosen)[:, 0])):
            columns[name].append(column.cpu())
    return {name: torch.cat(parts) for name, parts in columns.items()}

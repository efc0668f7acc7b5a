"""Cross-tokenizer distillation: a teacher of another family, whose tokenizer differs from the student's.

The teacher reads the same text in its own tokens. Where a token of each begins at the same byte, both models predict
what comes after the same text, and are compared over events e that hold tokens of both vocabularies:

    D(p‖q) = Σ_e f(Σ_{v in e} p_v, Σ_{v in e} q_v)

At other places nothing is compared: the divergence is 0. Which tokens are one event is the option `events`; with
`spans` the text between two such places is one event more (`fused_linear.spans`).
"""

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from ..batch import Batch, Example
from ..data.retokenize import Retokenized, Retokenizer
from ..data.token_events import Kind, events_of_tokens
from ..fused_linear.distributions import Dense, Projected
from ..fused_linear.events import Events, OtherVocabulary, RankEvents, TokenEvents
from ..fused_linear.spans import Spans
from ..models.context_window import context_window
from ..models.load import check_vocabulary, load_config, load_tokenizer
from ..models.vocabulary import vocabulary_size
from ..scores import Scores
from ..teacher import Capability, Teacher
from . import TEACHERS

logger = logging.getLogger(__name__)


class CrossTokenizerTeacher(Teacher):
    """Any causal language model of transformers, in this process, with a tokenizer of its own.

    What it provides is the divergence over events of both vocabularies. The log-probability of the response's own
    tokens is known for some of them only, so it is not provided.

    Args:
        model: the teacher, or a name or folder to load it from.
        tokenizer: the teacher's, or its name or folder; by default the model's.
        events: what is compared where a token of both begins: `first_piece`, `shared` and `first_byte` are groups of
            tokens (`data.token_events`), `ranks` compares sorted probabilities (ULD).
        spans: compare the text between two such places as well, where it is several tokens of a model.
        chat_template_kwargs: arguments of the teacher's chat template, such as enable_thinking.
        dtype, device, quantization, options: as of the teacher `local`.
    """

    provides: ClassVar[frozenset[Capability]] = frozenset({Capability.TOP_K})

    def __init__(
        self,
        model: nn.Module | str,
        *,
        tokenizer: PreTrainedTokenizerBase | str | None = None,
        events: Kind | Literal["ranks"] = "first_piece",
        spans: bool = False,
        chat_template_kwargs: dict[str, Any] | None = None,
        dtype: str = "auto",
        device: str | None = None,
        quantization: dict[str, Any] | None = None,
        options: dict[str, Any] | None = None,
    ) -> None:
        if tokenizer is None and not isinstance(model, str):
            raise ValueError("a teacher with another tokenizer needs it beside its model: give a tokenizer")
        if events not in (kinds := ("first_piece", "shared", "first_byte", "ranks")):
            raise ValueError(f"events are {', '.join(kinds)}, and not {events}")
        if spans and events == "ranks":
            raise ValueError(
                "a span is an event of its tokens, and ranks have none: leave out spans, or set other events"
            )
        local: Any = TEACHERS.get("local")
        self.teacher = local(model, dtype=dtype, device=device, quantization=quantization, options=options)
        self._tokenizer: Any = model if tokenizer is None else tokenizer
        self._chat_template_kwargs = chat_template_kwargs
        self.source = self.teacher.source
        self._retokenizer: Retokenizer | None = None
        self._kind: Kind | Literal["ranks"] = events
        self._spans, self._warned = spans, False

    @property
    def own_tokenizer(self) -> str | None:
        return self._tokenizer if isinstance(self._tokenizer, str) else None

    @property
    def local_model(self) -> Any:
        return self.teacher.model

    def to(self, device: torch.device) -> None:
        self.teacher.to(device)

    def setup(self, tokenizer: Any) -> None:
        if self._retokenizer is not None and self._retokenizer.source is tokenizer:
            return
        own = load_tokenizer(self._tokenizer) if isinstance(self._tokenizer, str) else self._tokenizer
        name = self.teacher.model_name
        config = self.teacher.model.config.get_text_config() if name is None else load_config(name)
        check_vocabulary(own, config, "the teacher has")
        self.tokenizer = own
        self._retokenizer = Retokenizer(tokenizer, own, self._chat_template_kwargs)
        self._vocabulary, self._window = vocabulary_size(own), context_window(config)
        self._events = self._events_of(self._retokenizer, vocabulary_size(tokenizer))

    def _events_of(self, retokenizer: Retokenizer, student_size: int) -> Events:
        logger.info(
            "the teacher's tokenizer has %d of the student's %d tokens", len(retokenizer.shared_tokens()), student_size
        )
        if self._kind == "ranks":
            return RankEvents(min(student_size, self._vocabulary))
        events = events_of_tokens(retokenizer, self._kind, (student_size, self._vocabulary))
        return TokenEvents(torch.tensor(events.target), torch.tensor(events.source), events.count)

    @torch.no_grad()
    def score(self, batch: Batch) -> Scores:
        """Scores over the events, (N, E), of the text that each response token follows.

        Raises:
            ValueError: before `setup`, and for examples with further inputs, such as images.
        """
        if self._retokenizer is None:
            raise ValueError("the student's tokenizer is unknown: call the teacher's setup with it before score")
        if any(example.inputs for example in batch.examples):
            raise ValueError("a teacher with another tokenizer reads text alone, and an example has further inputs")
        parts = [self._fitted(part) for part in self._retokenizer.retokenize(batch.examples)]
        own = Batch.from_examples([Example(part.prompt, part.response) for part in parts], 0, batch.input_ids.device)
        places = _Places.of(batch.examples, parts)
        index = torch.tensor(places.rows, device=batch.tokens.device)
        scores = self.teacher.score(own).cut(self._vocabulary)
        distribution = _rows(scores.distribution, index.clamp(min=0))
        spans = self._span_scores(places, scores) if self._spans else None
        return Scores(batch.tokens, OtherVocabulary(distribution, self._events.to(index.device), index >= 0, spans))

    def _span_scores(self, places: "_Places", scores: Scores) -> Spans:
        assert isinstance(self._events, TokenEvents)
        sizes = torch.tensor([len(others) for _, others in places.spans], dtype=torch.long)
        others = torch.tensor([i for _, part in places.spans for i in part], dtype=torch.long)
        chosen = scores.rows(others.to(scores.tokens.device)).chosen
        owner = torch.arange(len(sizes)).repeat_interleave(sizes).to(chosen.device)
        firsts = torch.tensor([part[0] for _, part in places.spans], dtype=torch.long)
        lengths = torch.tensor([len(part) for part, _ in places.spans], dtype=torch.long)
        return Spans(
            rows=torch.tensor([part[0] for part, _ in places.spans], dtype=torch.long),
            members=torch.tensor([row for part, _ in places.spans for row in part], dtype=torch.long),
            owner=torch.arange(len(lengths)).repeat_interleave(lengths),
            log_probs=chosen.new_zeros(len(sizes)).index_add(0, owner, chosen),
            events=self._events.teacher[scores.tokens.cpu()[firsts]],
        )

    def _fitted(self, part: Retokenized) -> Retokenized:
        """What fits into the teacher's context window: the prompt loses its beginning, the response its end."""
        if self._window is None or len(part.prompt) + len(part.response) <= self._window:
            return part
        if not self._warned:
            self._warned = True
            logger.warning(
                "prompts and responses reach beyond the teacher's context window of %d of its tokens; it reads the "
                "prompt's end, and nothing is compared after the window's end: lower data.max_length",
                self._window,
            )
        prompt = part.prompt[-(self._window - 1) :]
        response = part.response[: self._window - len(prompt)]
        indices = [None if index is None or index >= len(response) else index for index in part.indices]
        spans = [span for span in part.spans if span.others.stop <= len(response)]
        return Retokenized(prompt, response, indices, spans)


class _Places(NamedTuple):
    """Where the N rows of a batch are among the rows of the teacher's own batch."""

    rows: list[int]  # (N,); −1 where nothing is compared
    spans: list[tuple[list[int], list[int]]]  # the rows of a span's tokens in both batches

    @classmethod
    def of(cls, examples: Sequence[Example], parts: Sequence[Retokenized]) -> "_Places":
        rows: list[int] = []
        spans: list[tuple[list[int], list[int]]] = []
        first = 0  # of the example, among the teacher's rows
        for example, part in zip(examples, parts, strict=True):
            row_of = {place: len(rows) + number for number, place in enumerate(example.trained_tokens)}
            rows += [-1 if (index := part.indices[place]) is None else first + index for place in row_of]
            for span in part.spans:
                if all(place in row_of for place in span.tokens):
                    spans.append(([row_of[place] for place in span.tokens], [first + i for i in span.others]))
            first += len(part.response)
        return cls(rows, spans)


def _rows(distribution: Any, index: Tensor) -> Projected | Dense:
    """The distributions of some rows, (N,) indices."""
    if isinstance(distribution, Projected):
        return replace(distribution, hidden=distribution.hidden[index.to(distribution.hidden.device)])
    return Dense(distribution.values[index.to(distribution.values.device)])

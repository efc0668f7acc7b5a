"""Cross-tokenizer distillation: a teacher of another family, whose tokenizer differs from the student's.

The teacher reads the same text in its own tokens. Where a token of each begins at the same byte, both models predict
what comes after the same text, and are compared over the tokens that both vocabularies have and "any other token":

    D(p‖q) = Σ_{v shared} f(p_v, q_v) + f(1 − Σ p_v, 1 − Σ q_v)

Merging tokens never increases an f-divergence, so this is a lower bound of the divergence between the two models' next
tokens, and exact where the tokenizers are the same. At other places nothing is compared: the divergence is 0.
"""

import logging
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from ..batch import Batch, Example
from ..data.retokenize import Retokenized, Retokenizer
from ..fused_linear.distributions import Dense, Projected
from ..fused_linear.merged import SharedTokens
from ..models.context_window import context_window
from ..models.load import check_vocabulary, load_config, load_tokenizer
from ..models.vocabulary import vocabulary_size
from ..scores import Scores
from ..teacher import Capability, Teacher
from . import TEACHERS

logger = logging.getLogger(__name__)


class CrossTokenizerTeacher(Teacher):
    """Any causal language model of transformers, in this process, with a tokenizer of its own.

    What it provides is the divergence over shared tokens. The log-probability of the response's own tokens is known for
    some of them only, so it is not provided.

    Args:
        model: the teacher, or a name or folder to load it from.
        tokenizer: the teacher's, or its name or folder; by default the model's.
        chat_template_kwargs: arguments of the teacher's chat template, such as enable_thinking.
        dtype, device, quantization, options: as of the teacher `local`.
    """

    provides: ClassVar[frozenset[Capability]] = frozenset({Capability.TOP_K})

    def __init__(
        self,
        model: nn.Module | str,
        *,
        tokenizer: PreTrainedTokenizerBase | str | None = None,
        chat_template_kwargs: dict[str, Any] | None = None,
        dtype: str = "auto",
        device: str | None = None,
        quantization: dict[str, Any] | None = None,
        options: dict[str, Any] | None = None,
    ) -> None:
        if tokenizer is None and not isinstance(model, str):
            raise ValueError("a teacher with another tokenizer needs it beside its model: give a tokenizer")
        local: Any = TEACHERS.get("local")
        self.teacher = local(model, dtype=dtype, device=device, quantization=quantization, options=options)
        self._tokenizer: Any = model if tokenizer is None else tokenizer
        self._chat_template_kwargs = chat_template_kwargs
        self.source = self.teacher.source
        self._retokenizer: Retokenizer | None = None
        self._warned = False

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
        self._retokenizer = Retokenizer(tokenizer, own, self._chat_template_kwargs)
        self._vocabulary, self._window = vocabulary_size(own), context_window(config)
        pairs = self._retokenizer.shared_tokens()
        logger.info(
            "the teacher's tokenizer has %d of the student's %d tokens; the others are compared as one event",
            len(pairs),
            vocabulary_size(tokenizer),
        )
        self._support, self._other_ids = torch.tensor(pairs).unbind(-1)

    @torch.no_grad()
    def score(self, batch: Batch) -> Scores:
        """Scores over the shared tokens, (N, K+1), of the text that each response token follows.

        Raises:
            ValueError: before `setup`, and for examples with further inputs, such as images.
        """
        if self._retokenizer is None:
            raise ValueError("the student's tokenizer is unknown: call the teacher's setup with it before score")
        if any(example.inputs for example in batch.examples):
            raise ValueError("a teacher with another tokenizer reads text alone, and an example has further inputs")
        parts = [self._fitted(part) for part in self._retokenizer.retokenize(batch.examples)]
        own = Batch.from_examples([Example(part.prompt, part.response) for part in parts], 0, batch.input_ids.device)
        rows, first = [], 0
        for example, part in zip(batch.examples, parts, strict=True):
            places = [part.indices[place] for place in example.trained_tokens]
            rows += [-1 if place is None else first + place for place in places]
            first += len(part.response)
        device = batch.tokens.device
        index = torch.tensor(rows, device=device)
        distribution = self.teacher.score(own).cut(self._vocabulary).distribution
        ids = self._support.to(device), self._other_ids.to(device)
        return Scores(batch.tokens, SharedTokens(_rows(distribution, index.clamp(min=0)), *ids, known=index >= 0))

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
        return Retokenized(prompt, response, indices)


def _rows(distribution: Any, index: Tensor) -> Projected | Dense:
    """The distributions of some rows, (N,) indices."""
    if isinstance(distribution, Projected):
        return replace(distribution, hidden=distribution.hidden[index.to(distribution.hidden.device)])
    return Dense(distribution.values[index.to(distribution.values.device)])

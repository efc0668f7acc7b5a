"""Scores from vLLM, and from servers that speak its schema: the top K tokens of every position, and the one there.

`prompt_logprobs: K` of /v1/completions gives, for every position of a prompt of token ids, the distribution *that
predicted* the token there, keyed by token id: K entries, and one more where the token is none of these. These are the
model's own log-probabilities, at temperature 1 whatever the request says. Every request carries the handshake's probe
as one more prompt, so that another model behind the same URL is never trained on.
"""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from ..batch import Example
from ..fused_linear.distributions import Projected
from ..fused_linear.merged import TopK
from ..models.load import PROBE
from ..models.vocabulary import vocabulary_size
from ..teacher import TeacherError
from .checks import checked_top_k, wrong
from .client import Client, Replica, Reply, Request
from .handshake import START, TOLERANCE, difference, probabilities, probe, prove

DEFAULT_TOP_K = 20  # vLLM's own limit, unless it is started with --max-logprobs
_IDS = 1000  # of the vocabulary that the probe is from, where its size is not known


class VLLMProtocol:
    """The client's side of the protocol.

    Args:
        top_k: how many of the likeliest tokens to ask for.
        model: which of the server's models; None: the one that it has.
        compared: is the teacher's tokenizer known, and compared elsewhere?
    """

    def __init__(self, top_k: int, model: str | None, compared: bool) -> None:
        self.top_k, self.model, self._compared = top_k, model, compared
        self.fingerprint: str | None = None  # the model's name: vLLM does not tell more
        self.context_length: int | None = None
        self._vocabulary: int | None = None
        self._expected: torch.Tensor | None = None  # the probabilities of the probe

    def connect(self, client: Client, tokenizer: Any) -> None:
        """Choose the model, compare tokenizers, and prove every replica.

        Raises:
            TeacherError: with the cause and the remedy.
        """
        self._expected = None
        for replica in client.replicas:
            models = client.submit(Request("/v1/models", _read_models), replica, START).result()
            self._choose(models, replica)
            if tokenizer is not None:
                self._compare_tokenizers(client, replica, tokenizer)
        self._vocabulary = None if tokenizer is None else vocabulary_size(tokenizer)

        def ask(replica: Replica, example: Example) -> Projected | TopK:
            return client.submit(self.request([example]), replica, START).result()

        try:
            self._expected = prove(ask, client.replicas, self._vocabulary or _IDS)
        except TeacherError as error:
            if "status 400" in str(error) and "logprobs" in str(error):
                remedy = f"lower top_k, or start the server with --max-logprobs {self.top_k}"
                raise TeacherError(f"{error}: {remedy}") from None
            raise

    def request(self, examples: Sequence[Example]) -> Request[Projected | TopK]:
        """The request for the distributions of the examples' trained tokens."""
        prompts = [*examples, *([] if self._expected is None else [probe(self._vocabulary or _IDS)])]
        content = {
            "model": self.model,
            "prompt": [[*example.prompt, *example.response] for example in prompts],
            "prompt_logprobs": self.top_k,
            "max_tokens": 1,
            "temperature": 1.0,
        }
        return Request("/v1/completions", partial(self._read_scores, examples=prompts), content)

    def to(self, device: torch.device) -> None:
        """Nothing is on a device."""

    def _choose(self, models: dict[str, int | None], replica: Replica) -> None:
        """The model, and its context length less the token that has to be generated."""
        names = ", ".join(models)
        if self.model is None and len(models) != 1:
            raise TeacherError(f"the server at {replica.url} has the models {names}: name one of them as model")
        name = self.model or next(iter(models))
        if name not in models:
            raise TeacherError(f'the server at {replica.url} has no model "{name}": it has {names}')
        self.model = self.fingerprint = name
        length = models[name]
        lengths = [self.context_length, None if length is None else length - 1]
        self.context_length = min(filter(None, lengths), default=None)

    def _compare_tokenizers(self, client: Client, replica: Replica, tokenizer: Any) -> None:
        content = {"model": self.model, "prompt": PROBE, "add_special_tokens": False}
        request = Request("/tokenize", lambda reply: reply.json().get("tokens"), content, optional=True)
        tokens = client.submit(request, replica, START).result()
        if tokens is None and not self._compared:
            raise TeacherError(
                f"the server at {replica.url} has no /tokenize, with which its tokenizer could be compared with the "
                "student's: name the teacher's tokenizer as tokenizer"
            )
        if tokens is not None and tokens != tokenizer.encode(PROBE, add_special_tokens=False):
            raise TeacherError(
                f"the tokenizer of the server at {replica.url} splits text into other tokens than the student's: "
                "choose a teacher and a student of one family"
            )

    def _read_scores(self, reply: Reply, examples: Sequence[Example]) -> TopK:
        """The scores of the examples; the last one is the probe, if there is an answer to expect."""
        tops = self._read_choices(reply, examples)
        if self._expected is not None:
            distance = difference(probabilities(tops.pop()), self._expected)
            if distance > TOLERANCE:
                raise TeacherError(
                    f"the server at {reply.url} gives other probabilities than when the run began (by {distance:.2g}): "
                    f"let it serve the same {self.model} again"
                )
        k = min(top.values.shape[1] for top in tops)
        columns = [(top.values[:, :k], top.support[:, :k], top.chosen_values) for top in tops]
        return TopK(*(torch.cat(column) for column in zip(*columns, strict=True)))

    def _read_choices(self, reply: Reply, examples: Sequence[Example]) -> list[TopK]:
        content = reply.json()
        try:
            choices = sorted(content["choices"], key=lambda choice: choice["index"])
            if [choice["index"] for choice in choices] != list(range(len(examples))):
                raise wrong(reply.url, f"scores of {len(choices)} sequences where {len(examples)} were asked for")
            return [
                self._read_example(choice["prompt_logprobs"], example, reply.url)
                for choice, example in zip(choices, examples, strict=True)
            ]
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise wrong(reply.url, f"a reply without prompt_logprobs in vLLM's form ({error!r})") from None

    def _read_example(self, entries: Any, example: Example, url: str) -> TopK:
        if len(entries) != len(example):
            raise wrong(url, f"log-probabilities of {len(entries)} tokens where {len(example)} were asked for")
        chosen: list[float] = []
        rows: list[list[tuple[float, int]]] = []
        for place in example.trained_tokens:
            entry = {
                int(token): float(value["logprob"]) for token, value in entries[len(example.prompt) + place].items()
            }
            if len(entry) not in (self.top_k, self.top_k + 1) or example.response[place] not in entry:
                raise wrong(
                    url, f"{len(entry)} tokens of a position where {self.top_k} and the one there were asked for"
                )
            if not all(map(math.isfinite, entry.values())):
                raise wrong(url, "log-probabilities that are not finite")
            chosen.append(entry[example.response[place]])
            likeliest = sorted(((value, token) for token, value in entry.items()), reverse=True)[: self.top_k]
            rows.append([(v, t) for v, t in likeliest if self._vocabulary is None or t < self._vocabulary])
        k = min(map(len, rows))  # less than top_k where padding of the vocabulary is among the top tokens
        values = torch.tensor([[value for value, _ in row[:k]] for row in rows])
        support = torch.tensor([[token for _, token in row[:k]] for row in rows])
        return checked_top_k(TopK(values, support, torch.tensor(chosen)), len(rows), k, self._vocabulary, url)


def _read_models(reply: Reply) -> dict[str, int | None]:
    """The names of the server's models, with their context lengths where it tells them."""
    try:
        return {str(model["id"]): model.get("max_model_len") for model in reply.json()["data"]}
    except (KeyError, TypeError, AttributeError):
        raise TeacherError(
            f"the server at {reply.url} does not list its models as vLLM does: correct its url"
        ) from None

"""Scores from `understudy serve`: hidden rows and, once, the head; or the top K tokens.

Hidden rows are exact for every divergence and every temperature, and D numbers where logits would be V. Each reply
carries the fingerprint of the weights that computed it, so that another model behind the same URL is never trained on.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from pydantic import ValidationError

from ..batch import Example
from ..fused_linear.distributions import Projected
from ..fused_linear.head import Head, Transform
from ..fused_linear.merged import TopK
from ..models.fingerprint import vocabulary_fingerprint
from ..models.vocabulary import vocabulary_size
from ..teacher import TeacherError
from . import wire
from .checks import checked_hidden, checked_top_k, wrong
from .client import Client, Replica, Reply, Request, Unavailable
from .handshake import START, TOLERANCE, difference, probabilities, probe, prove


class UnderstudyProtocol:
    """The client's side of the protocol.

    Args:
        top_k: ask for this many of the likeliest tokens; None: for hidden rows.
    """

    def __init__(self, top_k: int | None) -> None:
        self.top_k = top_k
        self._info: wire.Info | None = None
        self._head: Head | None = None

    @property
    def fingerprint(self) -> str | None:
        return None if self._info is None else self._info.fingerprint

    @property
    def context_length(self) -> int | None:
        return None if self._info is None else self._info.context_length

    def connect(self, client: Client, tokenizer: Any) -> None:
        """Compare tokenizers, fetch the head, and prove every replica.

        Raises:
            TeacherError: with the cause and the remedy.
        """
        for replica in client.replicas:
            info = client.submit(Request("/info", _read_info), replica, START).result()
            self._check(info, replica, tokenizer)
            self._info = self._info or info
        assert self._info is not None
        if self.top_k is None:
            request = Request("/head", self._read_head, deadlines=10)
            self._head = client.submit(request, client.replicas[0], START).result()

        def ask(replica: Replica, example: Example, top_k: int | None = self.top_k) -> Projected | TopK:
            return client.submit(self._request([example], top_k), replica, START).result()

        vocabulary = self._info.vocabulary_size
        answer = prove(ask, client.replicas, vocabulary)
        if self.top_k is None:
            likeliest = probabilities(ask(client.replicas[0], probe(vocabulary), min(8, vocabulary)))
            of_head = torch.where(likeliest > 0, answer[:, : likeliest.shape[-1]], 0.0)
            if difference(likeliest, of_head) > TOLERANCE:
                raise TeacherError(
                    f"the head that the server at {client.replicas[0].url} sends does not give its model's own "
                    "probabilities: set top_k, and it sends log-probabilities in place of hidden rows"
                )

    def request(self, examples: Sequence[Example]) -> Request[Projected | TopK]:
        """The request for the distributions of the examples' trained tokens."""
        return self._request(examples, self.top_k)

    def _request(self, examples: Sequence[Example], top_k: int | None) -> Request[Projected | TopK]:
        content = wire.ScoreRequest(sequences=[wire.Sequence.of(e) for e in examples], top_k=top_k).model_dump()
        rows = sum(len(example.trained_tokens) for example in examples)
        return Request("/score", partial(self._read_scores, rows=rows, top_k=top_k), content)

    def to(self, device: torch.device) -> None:
        """Put the head on a device."""
        if self._head is not None:
            self._head = self._head.to(device)

    def _check(self, info: wire.Info, replica: Replica, tokenizer: Any) -> None:
        url = replica.url
        if info.protocol != wire.PROTOCOL:
            raise TeacherError(
                f"the server at {url} is understudy {info.version}, whose protocol {info.protocol} is not this "
                f"version's {wire.PROTOCOL}: install the same version on both sides"
            )
        if tokenizer is not None and info.vocabulary != vocabulary_fingerprint(tokenizer):
            raise TeacherError(
                f"the tokenizer of {info.model} at {url} ({info.vocabulary_size} tokens) is not the student's "
                f"({vocabulary_size(tokenizer)}): choose a teacher and a student of one family"
            )
        self._check_fingerprint(info.fingerprint, url)
        if self.top_k is None and not info.hidden:
            raise TeacherError(
                f"the server at {url} cannot send hidden rows of {info.model}, whose logits are not its head's product "
                "in a way that is known: set top_k, such as top_k: 64"
            )
        if self.top_k is not None and self.top_k >= info.vocabulary_size:
            raise TeacherError(f"top_k {self.top_k} is not below the {info.vocabulary_size} tokens of {info.model}")

    def check_fingerprint(self, reply: Reply) -> None:
        """Refuse a reply of other weights than those of the handshake.

        Raises:
            TeacherError: with both fingerprints.
        """
        self._check_fingerprint(reply.headers.get(wire.FINGERPRINT), reply.url)

    def _check_fingerprint(self, fingerprint: str | None, url: str) -> None:
        if self._info is not None and fingerprint != self._info.fingerprint:
            raise TeacherError(
                f"the server at {url} has other weights (fingerprint {fingerprint}) than this run's teacher "
                f"({self._info.fingerprint}): let it serve {self._info.model} again"
            )

    def _read_head(self, reply: Reply) -> Head:
        assert self._info is not None
        tensors = wire.unpack(reply.content)
        self.check_fingerprint(reply)
        if "weight" not in tensors:
            raise Unavailable("its reply is damaged")
        if not all(torch.isfinite(tensor).all() for tensor in tensors.values()):
            raise wrong(reply.url, "a head that is not finite")
        return Head(tensors["weight"], tensors.get("bias"), Transform(self._info.scale, self._info.softcap))

    def _read_scores(self, reply: Reply, rows: int, top_k: int | None) -> Projected | TopK:
        assert self._info is not None
        tensors = wire.unpack(reply.content)
        self.check_fingerprint(reply)
        try:
            if top_k is not None:
                top = TopK(tensors["values"], tensors["support"], tensors["chosen"])
                return checked_top_k(top, rows, top_k, self._info.vocabulary_size, reply.url)
            hidden = tensors["hidden"]
        except KeyError as error:
            raise wrong(reply.url, f"no {error.args[0]}") from None
        assert self._head is not None
        return Projected(checked_hidden(hidden, rows, self._head.weight.shape[1], reply.url), self._head, constant=True)


def _read_info(reply: Reply) -> wire.Info:
    content = reply.json()
    try:
        return wire.Info.model_validate(content)
    except ValidationError:
        raise TeacherError(
            f"the server at {reply.url} is no `understudy serve` of this version: set protocol, or correct its url"
        ) from None

"""Responses that `understudy serve` generates with its teacher, drawn as a local teacher's: by seed, step and row."""

from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

from pydantic import ValidationError

from ..batch import Author, Example
from ..rollout import Rollout, with_response
from ..sampling import Sampling
from ..step import Step
from .checks import wrong
from .client import Client, Reply, Request
from .understudy_protocol import UnderstudyProtocol
from .wire import GenerateReply, GenerateRequest

_DEADLINES = 10  # generating takes longer than scoring


class ServedRollout(Rollout):
    """Generates responses by a server, which has a model of its own."""

    def __init__(self, client: Client, protocol: UnderstudyProtocol) -> None:
        self._client, self._protocol = client, protocol

    def bind(self, model: Any, tokenizer: Any, author: Author = "teacher") -> "ServedRollout":
        """This rollout itself."""
        return self

    def generate(self, prompts: Sequence[Example], sampling: Sampling, step: Step) -> list[Example]:
        """See `Rollout`.

        Raises:
            TeacherError: for a server that does not answer, or not with responses.
        """
        if not prompts:
            return []
        content = GenerateRequest(
            prompts=[prompt.teacher_prompt or prompt.prompt for prompt in prompts],
            rows=[prompt.row for prompt in prompts],
            sampling=asdict(sampling),
            step=asdict(step),
        ).model_dump()
        read = partial(self._read, count=len(prompts) * sampling.n)
        reply = self._client.submit(Request("/generate", read, content, deadlines=_DEADLINES)).result()
        repeated = [prompt for prompt in prompts for _ in range(sampling.n)]
        return [
            with_response(prompt, response, "teacher", truncated, streams)
            for prompt, response, truncated, streams in zip(
                repeated, reply.responses, reply.truncated, reply.streams, strict=True
            )
        ]

    def _read(self, reply: Reply, count: int) -> GenerateReply:
        content = reply.json()
        self._protocol.check_fingerprint(reply)
        try:
            answer = GenerateReply.model_validate(content)
        except ValidationError:
            raise wrong(reply.url, "no responses") from None
        if not (len(answer.responses) == len(answer.truncated) == len(answer.streams) == count):
            raise wrong(reply.url, f"{len(answer.responses)} responses where {count} were asked for")
        if not all(answer.responses):
            raise wrong(reply.url, "an empty response")
        return answer

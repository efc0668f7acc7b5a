"""A rollout of your own over a socket: responses come from a server, which loads the student's weights after each step.

Client and server exchange lines of JSON: {"load": file} is answered when the weights are loaded, {"prompts": …,
"sampling": …, "step": …} by the responses. In a recipe:

    rollout: {socket_rollout:SocketRollout: {port: 9000, weights: /dev/shm/student.safetensors, max_new_tokens: 64}}
"""

import json
import socket
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from safetensors.torch import save_model

from understudy import Author, Example, Rollout, Sampling, Step, stop_ids, with_response


@dataclass(frozen=True)
class SocketRollout(Rollout):
    """Sends prompts to a server at `host`:`port`, and the student's weights through the file `weights`."""

    port: int
    weights: str
    host: str = "127.0.0.1"
    _model: Any = None
    _stop_ids: tuple[int, ...] = ()

    def bind(self, model: Any, tokenizer: Any, author: Author = "student") -> "SocketRollout":
        if author != "student":
            raise ValueError("the server generates for the student only: use generate for a teacher's responses")
        bound = replace(self, _model=model, _stop_ids=tuple(stop_ids(tokenizer, model)))
        bound.sync(Step(0))
        return bound

    def sync(self, step: Step) -> None:
        save_model(self._model, self.weights)
        self._ask({"load": self.weights})

    def generate(self, prompts: Sequence[Example], sampling: Sampling, step: Step) -> list[Example]:
        sampling = replace(sampling, stop_ids=sampling.stop_ids or self._stop_ids)
        rows = [{"prompt": e.prompt, "row": e.row} for e in prompts]
        responses = self._ask({"prompts": rows, "sampling": asdict(sampling), "step": asdict(step)})
        parents = [prompt for prompt in prompts for _ in range(sampling.n)]
        return [
            with_response(parent, ids, "student", truncated=ids[-1] not in sampling.stop_ids)
            for parent, ids in zip(parents, responses, strict=True)
        ]

    def _ask(self, message: dict[str, Any]) -> Any:
        with socket.create_connection((self.host, self.port)) as connection, connection.makefile("rw") as lines:
            lines.write(json.dumps(message) + "\n")
            lines.flush()
            return json.loads(lines.readline())

"""The handshake with a server that scores: is it reproducible, and is every distribution at the position it is for?

A short probe is scored three times. The second answer must be the same as the first. In the third, the last but one
token is replaced by another one whose probability there is known: its own log-probability must be that one, no
distribution up to that place may change, and the distribution of the last token, which comes after, must.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..batch import Example
from ..fused_linear.distributions import Projected
from ..fused_linear.merged import TopK
from ..teacher import TeacherError
from .client import Replica

Scored = Projected | TopK
TOLERANCE = 0.05  # of a probability; kernels of other batch sizes round otherwise
START = 3.0  # seconds for which a server may fail before a run has begun


def probe(vocabulary: int) -> Example:
    """A sequence of eight different tokens of a vocabulary, of which two are the prompt."""
    first = min(4, vocabulary // 4)  # the ids before are often special tokens
    ids = [first + i * (vocabulary - first) // 8 for i in range(8)]
    order = (3, 0, 6, 2, 7, 4, 1, 5)
    return Example([ids[i] for i in order[:2]], [ids[i] for i in order[2:]])


def prove(ask: Callable[[Replica, Example], Scored], replicas: Sequence[Replica], vocabulary: int) -> Tensor:
    """Prove reproducibility and alignment of every replica; returns the `probabilities` of the probe.

    Raises:
        TeacherError: naming what is wrong, and with replicas that disagree.
    """
    first: Tensor | None = None
    for replica in replicas:
        example, url = probe(vocabulary), replica.url
        answer = probabilities(ask(replica, example))[:, :vocabulary]  # without padding of the vocabulary
        noise = difference(answer, probabilities(ask(replica, example))[:, :vocabulary])
        if noise > TOLERANCE:
            raise TeacherError(
                f"the server at {url} gives other probabilities when it is asked again (by {noise:.2g}): turn off what "
                "makes its scores random"
            )
        _prove_alignment(ask, replica, example, answer, noise)
        first = answer if first is None else first
        if (distance := difference(first, answer)) > TOLERANCE:
            raise TeacherError(
                f"the servers at {replicas[0].url} and {url} disagree (by {distance:.2g} in a probability): let all of "
                "them serve the same model"
            )
    assert first is not None
    return first


def _prove_alignment(
    ask: Callable[[Replica, Example], Scored], replica: Replica, example: Example, answer: Tensor, noise: float
) -> None:
    place = len(example.response) - 2
    likeliest = answer[place].topk(2).indices.tolist()
    token = next(i for i in likeliest if i != example.response[place])
    response = [*example.response[:place], token, example.response[-1]]
    scored = ask(replica, replace(example, response=response))
    after = probabilities(scored)[:, : answer.shape[-1]]
    same = difference(answer[: place + 1], after[: place + 1])
    if same > TOLERANCE or difference(answer[-1:], after[-1:]) <= noise:
        raise TeacherError(
            f"the server at {replica.url} does not report each position's distribution where it belongs: the "
            "distribution that predicts a token must depend on all tokens before it and on none after; use another one"
        )
    if isinstance(scored, TopK) and scored.chosen_values is not None:
        chosen, expected = float(scored.chosen_values[place].exp()), float(answer[place, token])
        if abs(chosen - expected) > TOLERANCE:
            raise TeacherError(
                f"the server at {replica.url} gives a token the probability {chosen:.3g} as the one that is there, and "
                f"{expected:.3g} as one of the top tokens: use a server that reports both at temperature 1"
            )


def probabilities(scored: Scored) -> Tensor:
    """Probabilities (N, V), float32, of a few rows; tokens that were not reported have 0."""
    if isinstance(scored, Projected):
        return scored.log_probs().exp().float()
    width = int(scored.support.max()) + 1
    return torch.zeros(len(scored.support), width).scatter(-1, scored.support, scored.values.exp().float())


def difference(one: Tensor, other: Tensor) -> float:
    """The largest difference of two tables of probabilities, the narrower of which has zeros at its right."""
    width = max(one.shape[-1], other.shape[-1])
    one, other = (torch.nn.functional.pad(x, (0, width - x.shape[-1])) for x in (one, other))
    return float((one - other).abs().max())

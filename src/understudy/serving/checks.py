"""Checks of every reply that holds scores: the count of rows, K, finite numbers, and that they are probabilities.

Shapes: N trained tokens, K tokens of a top-K reply, D width.
"""

import torch
from torch import Tensor

from ..fused_linear.merged import TopK
from ..teacher import TeacherError

_ROUNDING = 2e-2  # of a sum of probabilities whose logarithms come from a model in bfloat16


def checked_hidden(hidden: Tensor, rows: int, width: int, url: str) -> Tensor:
    """The hidden rows (N, D), if they are what was asked for.

    Raises:
        TeacherError: for another number of rows or another width, and for numbers that are not finite.
    """
    if hidden.shape != (rows, width):
        raise wrong(url, f"hidden rows of shape {tuple(hidden.shape)} where {(rows, width)} were asked for")
    if not torch.isfinite(hidden).all():
        raise wrong(url, "hidden rows that are not finite")
    return hidden


def checked_top_k(top: TopK, rows: int, k: int, vocabulary: int | None, url: str) -> TopK:
    """The top-K distributions of N rows, if they are what was asked for.

    Args:
        vocabulary: token ids are below it; None: it is not known.

    Raises:
        TeacherError: for another number of rows, another K, values that are not finite or no log-probabilities of
            distinct tokens, and where the chosen token is likelier than the top token.
    """
    chosen = top.chosen_values
    if top.values.shape != (rows, k) or top.support.shape != (rows, k) or chosen is None or chosen.shape != (rows,):
        shape = tuple(top.values.shape)
        raise wrong(url, f"log-probabilities of shape {shape} where {(rows, k)} were asked for")
    if not (torch.isfinite(top.values).all() and torch.isfinite(chosen).all()):
        raise wrong(url, "log-probabilities that are not finite")
    total = float(top.values.double().exp().sum(-1).max())
    if total > 1 + _ROUNDING or (top.values > _ROUNDING).any():
        raise wrong(url, f"numbers that are no log-probabilities: those of one position sum to {total:.4g}")
    if (chosen > top.values.amax(-1) + _ROUNDING).any():
        raise wrong(url, "a log-probability of the chosen token that is above that of the likeliest token")
    ordered = top.support.sort(-1).values
    if (ordered[:, 1:] == ordered[:, :-1]).any():
        raise wrong(url, "one token twice at one position")
    if int(ordered[:, 0].min()) < 0 or (vocabulary is not None and int(ordered[:, -1].max()) >= vocabulary):
        raise wrong(url, f"a token id that is none of the tokenizer's {vocabulary}")
    return top


def wrong(url: str, what: str) -> TeacherError:
    """The error about a reply that holds `what`."""
    return TeacherError(f"the server at {url} sends {what}: nothing was trained with it; repair or replace the server")

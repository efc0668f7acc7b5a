"""Metrics of responses alone: accuracy, lengths, and the text metrics of the folder metrics/, also by length.

DPKD's tables (arXiv 2406.19774) split the test prompts by the length of their reference, because a short answer is
right or wrong while a long one is more or less similar. With bounds (8, 20), `rouge_l` is also computed as
`rouge_l_1_to_8`, `rouge_l_9_to_20` and `rouge_l_from_21`, over the responses whose first reference has so many tokens.
"""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from .. import metrics as text_metrics
from ..metric import Score
from .responses import Response, Responses


@dataclass(frozen=True)
class ResponseMetrics:
    """The metrics of responses, over several seeds their means and standard deviations."""

    numbers: dict[str, float]
    signatures: dict[str, str]  # how the text metrics were computed
    scores: dict[str, list[float]]  # by metric the number of each prompt, its mean over seeds; none of a corpus (BLEU)


def buckets(bounds: Sequence[int]) -> list[str]:
    """The names of the buckets of lengths: bounds (8, 20) give 1_to_8, 9_to_20 and from_21.

    Raises:
        ValueError: for bounds that do not rise from 1.
    """
    if any(low >= high for low, high in pairwise([0, *bounds])):
        text = ",".join(map(str, bounds))
        raise ValueError(f"the lengths {text} do not divide responses: give rising numbers, such as 8,20")
    ranges = [f"{low + 1}_to_{high}" for low, high in pairwise([0, *bounds])]
    return [*ranges, f"from_{bounds[-1] + 1}"] if bounds else []


def with_buckets(metrics: Sequence[str], bounds: Sequence[int]) -> list[str]:
    """The names of metrics, and of the same by length."""
    return [*metrics, *(f"{metric}_{bucket}" for metric in metrics for bucket in buckets(bounds))]


def response_metrics(
    generated: Responses,
    prompts: int,
    metrics: Sequence[str],
    bounds: Sequence[int] = (),
    tokenizer: Any = None,
) -> ResponseMetrics:
    """The metrics of `generated`, which has a response to each of `prompts` prompts for every seed, seed by seed.

    Args:
        metrics: names of text metrics, over the prompts that have references.
        bounds: of the lengths in tokens of `tokenizer` by which these are also computed.
    """
    by_seed = generated.by_seed(prompts)
    numbers = over_seeds([_counts(part) for part in by_seed]) | {"seconds": generated.seconds}
    if generated.tokens:
        numbers["tokens_per_second"] = generated.tokens / generated.seconds
    quality = [name for name in metrics if not text_metrics.compares_responses(name)]
    scored = [_scored(quality, part, bounds, tokenizer) for part in by_seed]
    diversity = _diversity([name for name in metrics if name not in quality], by_seed)
    numbers |= over_seeds([{name: score.value for name, score in part.items()} for part in scored])
    numbers |= {name: score.value for name, score in diversity.items()}
    signatures = {name: score.signature for name, score in (scored[0] | diversity).items()}
    scores = {name: [part[name].by_response for part in scored] for name in scored[0]}
    correct = [[response.line["correct"] for response in part] for part in by_seed]
    scores |= {"accuracy": correct} if not any(None in part for part in correct) else {}
    means = {name: list(map(statistics.fmean, zip(*of, strict=True))) for name, of in scores.items()}
    return ResponseMetrics(numbers, signatures, {name: values for name, values in means.items() if values})


def over_seeds(by_seed: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The numbers of a single seed; of several, their means and, as `<name>_std`, their sample standard deviations."""
    if len(by_seed) == 1:
        return dict(by_seed[0])
    numbers = {}
    for name in by_seed[0]:
        values = [part[name] for part in by_seed]
        numbers[name] = statistics.fmean(values)
        if name != "examples":
            numbers[f"{name}_std"] = statistics.stdev(values)
    return numbers


def _counts(responses: Sequence[Response]) -> dict[str, float]:
    correct = [response.line["correct"] for response in responses if response.line["correct"] is not None]
    return {
        **({"accuracy": sum(correct) / len(correct)} if correct else {}),
        "examples": float(len(responses)),
        "response_length": sum(len(response.example.response) for response in responses) / len(responses),
        "truncated": sum(response.example.truncated for response in responses) / len(responses),
    }


def _scored(
    metrics: Sequence[str], responses: Sequence[Response], bounds: Sequence[int], tokenizer: Any
) -> dict[str, Score]:
    """The text metrics of the responses of one seed, over all and in the buckets that are not empty."""
    lines = [response.line for response in responses if response.line["references"]]
    texts, references = [line["response"] for line in lines], [line["references"] for line in lines]
    scores = text_metrics.score(metrics, texts, references)
    names = buckets(bounds)
    lengths = [len(tokenizer(of[0], add_special_tokens=False)["input_ids"]) for of in references] if names else []
    places = [sum(length > bound for bound in bounds) for length in lengths]
    for place, bucket in enumerate(names):
        rows = [row for row, other in enumerate(places) if other == place]
        if rows:
            part = text_metrics.score(metrics, [texts[row] for row in rows], [references[row] for row in rows])
            scores |= {f"{name}_{bucket}": score for name, score in part.items()}
    return scores


def _diversity(metrics: Sequence[str], by_seed: Sequence[Sequence[Response]]) -> dict[str, Score]:
    """The metrics that compare the responses to a prompt with each other."""
    prompts = [[response.line["response"] for response in prompt] for prompt in zip(*by_seed, strict=True)]
    other_responses = [texts[:i] + texts[i + 1 :] for texts in prompts for i in range(len(texts))]
    return text_metrics.score(metrics, [text for texts in prompts for text in texts], other_responses)

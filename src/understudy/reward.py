"""Rewards of responses: Python functions, reward models, or both, and the advantages computed from them.

A reward is a number computed from texts, without any gradient. Methods learn from the advantage, the reward minus the
mean reward of the other responses to the same prompt: the same expected policy gradient, with a smaller variance.
"""

import logging
import math
from collections import defaultdict
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import replace
from functools import cache, cached_property
from typing import Any, Literal, cast

import torch

from .batch import Example
from .method import from_all_processes, process_rank
from .models.load import load_model, resolve
from .registry import import_object

logger = logging.getLogger(__name__)

Scorer = Callable[[list[str], list[str], list[Mapping[str, Any]]], Sequence[float]]


class Reward:
    """A weighted sum of scorers, each `(prompts, responses, rows) → one number per response`.

    Prompts and responses are texts without special tokens; `rows` are the columns of the dataset's rows.

    Args:
        functions: scorers with their weights, or scorers alone, whose weights are 1.
        normalize: divide advantages by the standard deviation of the group's rewards (as GRPO does).
    """

    def __init__(self, functions: Mapping[Scorer, float] | Sequence[Scorer], normalize: bool = False) -> None:
        weighted = functions if isinstance(functions, Mapping) else dict.fromkeys(functions, 1.0)
        if not weighted:
            raise ValueError("a reward needs at least one function or a model")
        self.functions = {_name(function): (function, float(weight)) for function, weight in weighted.items()}
        if len(self.functions) < len(weighted):
            raise ValueError("two of the reward's functions have the same name, by which they are logged: rename one")
        self.normalize = normalize

    def load(self) -> None:
        """Load the weights of reward models, which are otherwise loaded when first used.

        Raises:
            RecipeError: if they cannot be loaded, or some are missing.
        """
        for function, _ in self.functions.values():
            if isinstance(function, RewardModel):
                _ = function.model

    @property
    def names(self) -> tuple[str, ...]:
        """The logged metrics: the sum, and its parts if there are several."""
        return ("reward", *(f"reward_{name}" for name in self.functions if len(self.functions) > 1))

    def score(self, examples: Sequence[Example], tokenizer: Any, groups: Sequence[int] | None = None) -> list[Example]:
        """The examples with the streams `reward`, its parts and `advantage`, each constant over a response.

        Responses of the same number in `groups` are compared with each other; by default all are, those of all
        processes together, so every process must call this equally often.

        Raises:
            ValueError: if a function returns something else than a finite number for every response.
        """
        if not examples:  # this process has none to compare with those of the others
            _shared_advantages([], [], self.normalize)
            return []
        prompts = tokenizer.batch_decode([e.prompt for e in examples], skip_special_tokens=True)
        responses = tokenizer.batch_decode([e.response for e in examples], skip_special_tokens=True)
        rows = [e.columns for e in examples]
        parts = {
            name: _numbers(name, function(prompts, responses, rows), len(examples))
            for name, (function, _) in self.functions.items()
        }
        totals = [sum(w * parts[name][i] for name, (_, w) in self.functions.items()) for i in range(len(examples))]
        several = {f"reward_{name}": part for name, part in parts.items()} if len(parts) > 1 else {}
        values = {"reward": totals, **several}
        values["advantage"] = _shared_advantages(totals, groups or range(len(totals)), self.normalize)
        return [
            replace(e, streams={**e.streams, **{name: [v[i]] * len(e.response) for name, v in values.items()}})
            for i, e in enumerate(examples)
        ]


def advantages(rewards: Sequence[float], groups: Sequence[Hashable], normalize: bool = False) -> list[float]:
    """Each reward minus the mean of the other rewards of its group (leave-one-out, RLOO; Kool et al., 2019).

    A group is the responses that were drawn for one prompt, or all responses where no group has several. Leaving a
    response's own reward out of its baseline keeps the policy gradient unbiased. The advantage in a group of one is 0.
    """
    members: dict[Hashable, list[int]] = defaultdict(list)
    for index, group in enumerate(groups):
        members[group].append(index)
    if all(len(group) == 1 for group in members.values()):
        members = {0: list(range(len(rewards)))}
    result = [0.0] * len(rewards)
    for group in members.values():
        if len(group) < 2:
            continue
        mean = sum(rewards[i] for i in group) / len(group)
        deviation = math.sqrt(sum((rewards[i] - mean) ** 2 for i in group) / (len(group) - 1))
        scale = len(group) / (len(group) - 1) / ((deviation + 1e-8) if normalize else 1.0)
        for i in group:
            result[i] = (rewards[i] - mean) * scale
    return result


def _shared_advantages(rewards: Sequence[float], groups: Sequence[int], normalize: bool) -> list[float]:
    """The advantages of this process's responses among those of all processes; no group is on two of them."""
    rank = process_rank()
    everyone = from_all_processes([((rank, group), reward) for group, reward in zip(groups, rewards, strict=True)])
    if len(everyone) == 1:
        _warn_of_a_single_response()
    values = advantages([reward for _, reward in everyone], [key for key, _ in everyone], normalize)
    return [value for ((process, _), _), value in zip(everyone, values, strict=True) if process == rank]


@cache
def _warn_of_a_single_response() -> None:
    """Once in a process."""
    logger.warning(
        "a step has a single response, which can be compared with no other, so its reward teaches nothing: raise the "
        "rollout's n or the batch size"
    )


class RewardModel:
    """A scorer from a sequence-classification model: its single logit, or the probability of one of its labels.

    Args:
        name: a model by name or folder.
        label: the class whose probability is the reward, such as "entailment"; needed if there are several.
        reads: `text` joins prompt and response; `pair` gives them as the tokenizer's two texts, as NLI models expect.
        batch_size: texts per forward.
    """

    def __init__(
        self, name: str, label: str | None = None, reads: Literal["text", "pair"] = "text", batch_size: int = 16
    ) -> None:
        from transformers import AutoConfig, AutoTokenizer

        self.name, self.reads, self.batch_size = name, reads, batch_size
        self.tokenizer = AutoTokenizer.from_pretrained(resolve(name), trust_remote_code=False)
        labels: Any = AutoConfig.from_pretrained(resolve(name), trust_remote_code=False).label2id
        if label is not None and label not in labels:
            raise ValueError(f'the reward model {name} has no label "{label}"; it has {", ".join(labels)}')
        if label is None and len(labels) > 1:
            raise ValueError(f"the reward model {name} has several labels: name one of {', '.join(labels)} as label")
        self.label = None if label is None else int(labels[label])

    @cached_property
    def model(self) -> Any:
        """Loaded when first used, on a GPU if there is one."""
        from transformers import AutoModelForSequenceClassification

        model = load_model(self.name, AutoModelForSequenceClassification)
        if self.tokenizer.pad_token_id is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        model.config.pad_token_id = self.tokenizer.pad_token_id
        return model.to("cuda" if torch.cuda.is_available() else "cpu").eval().requires_grad_(False)

    @torch.no_grad()
    def __call__(self, prompts: list[str], responses: list[str], rows: list[Mapping[str, Any]]) -> list[float]:
        model, scores = self.model, []
        for start in range(0, len(prompts), self.batch_size):
            part = slice(start, start + self.batch_size)
            texts: Any = [p + r for p, r in zip(prompts[part], responses[part], strict=True)]
            texts = (texts,) if self.reads == "text" else (prompts[part], responses[part])
            inputs = self.tokenizer(*texts, padding=True, truncation=True, return_tensors="pt").to(model.device)
            logits = model(**inputs).logits.float()
            scores += (logits[:, 0] if self.label is None else logits.softmax(-1)[:, self.label]).tolist()
        return scores


def function(place: str) -> Scorer:
    """Import a reward function by `module:function`; the module may lie in the working directory.

    Raises:
        ValueError: if there is no such function.
    """
    scorer = import_object(place, "reward function", "function")
    if not callable(scorer):
        raise ValueError(f"the reward function {place} is {scorer!r:.40}, which cannot be called: name a function")
    return cast(Scorer, scorer)


def _name(function: Scorer) -> str:
    return "model" if isinstance(function, RewardModel) else getattr(function, "__name__", type(function).__name__)


def _numbers(name: str, values: Any, count: int) -> list[float]:
    try:
        numbers = [float(value) for value in values]
    except (TypeError, ValueError):
        raise ValueError(f"the reward function {name} should return a list of numbers, not {values!r:.80}") from None
    if len(numbers) != count:
        raise ValueError(f"the reward function {name} returned {len(numbers)} numbers for {count} responses")
    if not all(map(math.isfinite, numbers)):
        bad = next(i for i, x in enumerate(numbers) if not math.isfinite(x))
        raise ValueError(f"the reward function {name} returned {numbers[bad]} for response {bad}; it must be finite")
    return numbers

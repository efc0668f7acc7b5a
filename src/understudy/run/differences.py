"""What differs between a run in a folder and one that would resume it, and which differences it may have.

Where something is printed, logged or saved does not touch the mathematics, and neither does a later end of a run whose
schedules do not depend on it. Every other difference makes another student, and is accepted only explicitly.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..recipe import Recipe

_FREE = {
    *("training.output_dir", "training.report_to", "training.run_name", "training.project", "training.disable_tqdm"),
    *("training.log_level", "training.log_level_replica", "training.log_on_each_node", "training.skip_memory_metrics"),
    *("training.logging_steps", "training.logging_strategy", "training.logging_first_step"),
    *("training.trackio_space_id", "training.trackio_bucket_id", "training.trackio_static_space_id"),
    *("training.save_total_limit", "training.save_on_each_node", "training.torch_empty_cache_steps"),
    *("training.dataloader_num_workers", "training.dataloader_persistent_workers", "training.ddp_timeout"),
    *("training.dataloader_prefetch_factor", "training.dataloader_pin_memory", "training.dataloader_in_order"),
    *("training.include_num_input_tokens_seen", "evaluate.show", "evaluate.show_every"),
}
_EVALUATION = {  # free as well, unless an evaluation decides which student is saved
    *("training.save_steps", "training.save_strategy", "training.eval_steps", "training.eval_strategy"),
    *("training.eval_delay", "training.eval_on_start", "evaluate.metrics", "evaluate.exposure_bias"),
}
_LENGTH = {"training.max_steps", "training.num_train_epochs", "budget.tokens", "budget.seconds"}
_ENDLESS_SCHEDULES = {"constant", "constant_with_warmup", "inverse_sqrt"}
_ENDLESS_METHODS = {"sft", "kd", "seqkd", "gkd", "opd", "dpkd"}
_FIXED = ("student.fresh", "student.layers", "student.peft", "student.merge")
_MISSING = object()


@dataclass(frozen=True)
class Difference:
    """A dotted key whose value differs between the run in a folder and a recipe."""

    key: str
    before: Any
    now: Any

    def __str__(self) -> str:
        before, now = ("absent" if value is _MISSING else f"{value!r:.60}" for value in (self.before, self.now))
        return f"{self.key} ({before}, now {now})"


@dataclass(frozen=True)
class Input:
    """One thing that a run depends on: the recipe's key that names it, what it is, and its hash or version."""

    key: str
    name: str
    value: str
    source: str = ""  # where it was read, which may change


def differences(before: Recipe, now: Recipe) -> list[Difference]:
    """All keys whose values differ, except the folder itself, which may be moved."""
    old, new = (dict(_flat(recipe.resolved())) for recipe in (before, now))
    pairs = [(key, old.get(key, _MISSING), new.get(key, _MISSING)) for key in {**old, **new}]
    return [Difference(*pair) for pair in pairs if pair[1] != pair[2] and pair[0] != "training.output_dir"]


def touching(before: Recipe, now: Recipe) -> list[Difference]:
    """The differences that make another student."""
    return [each for each in differences(before, now) if not _is_free(each, before, now)]


def is_length(each: Difference) -> bool:
    """Is this about the end of the run?"""
    return each.key in _LENGTH


def fixed(before: Recipe, now: Recipe) -> list[Difference]:
    """The differences with which no checkpoint can be loaded: another shape of student, another method."""
    methods = {before.method[0], now.method[0]}
    return [
        each
        for each in differences(before, now)
        if each.key.startswith(_FIXED) or (len(methods) > 1 and each.key.startswith("method."))
    ]


def changed(before: Mapping[str, str], now: Sequence[Input]) -> list[tuple[Input, str]]:
    """The inputs whose value has changed, each with a description; those that were not saved are left out."""
    changes = []
    for each in now:
        old = before.get(each.name)
        if old is not None and old != each.value:
            is_hash = re.fullmatch(r"[0-9a-f]{16}", each.value)
            changes.append(
                (each, f"{each.name} {each.source}".strip() if is_hash else f"{each.name} ({old}, now {each.value})")
            )
    return changes


def listed(texts: Sequence[str]) -> str:
    """The texts as one phrase: a, b and c."""
    *first, last = texts
    return f"{', '.join(first)} and {last}" if first else last


def _is_free(each: Difference, before: Recipe, now: Recipe) -> bool:
    if each.key in _FREE:
        return True
    if each.key in _EVALUATION:
        return not any(_chooses_by_evaluation(recipe) for recipe in (before, now))
    return each.key in _LENGTH and _is_more(each) and all(_is_endless(recipe) for recipe in (before, now))


def _chooses_by_evaluation(recipe: Recipe) -> bool:
    names = ("load_best_model_at_end", "metric_for_best_model")
    return recipe.evaluate.patience is not None or any(recipe.training.get(name) for name in names)


def _is_more(each: Difference) -> bool:
    numbers = all(isinstance(value, int | float) and value > 0 for value in (each.before, each.now))
    return numbers and each.now > each.before


def _is_endless(recipe: Recipe) -> bool:
    """Do learning rate, method and rollout not depend on when the run ends?"""
    schedule = str(recipe.training.get("lr_scheduler_type", "linear"))
    warmup = recipe.training.get("warmup_steps", 0)
    has_steps = isinstance(warmup, int | float) and (warmup == 0 or warmup >= 1)  # below 1 it is a share of the run
    has_steps = has_steps and not recipe.training.get("warmup_ratio")
    of_rollout = recipe.schedule()  # nothing is generated ahead after the last step
    has_steps = has_steps and not of_rollout.ahead and of_rollout.prefix_start is None
    return schedule in _ENDLESS_SCHEDULES and has_steps and recipe.method[0] in _ENDLESS_METHODS


def _flat(content: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The values of nested mappings by their dotted keys; an empty mapping is a value."""
    for name, value in content.items():
        key = f"{prefix}{name}"
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{key}.")
        else:
            yield key, value

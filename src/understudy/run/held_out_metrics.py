"""Metrics of a student's responses to the held-out prompts while it is trained."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from .. import metrics
from ..data.examples import Examples
from ..evaluation.evaluate import evaluate
from ..recipe import Recipe
from ..rollout import Rollout
from ..sampling import Sampling
from ..teacher import Capability, Teacher

_SKIPPED = ("seconds", "tokens_per", "examples")


def check_held_out_metrics(recipe: Recipe, teacher: Teacher | None) -> None:
    """Check that the metrics a recipe asks for can be measured while the student is trained.

    Raises:
        RecipeError: for an unknown metric, and without the data or the teacher that are needed.
    """
    names, prompts = recipe.evaluate.metrics, recipe.evaluate.exposure_bias
    if not names and not prompts:
        return
    key = "evaluate.metrics" if names else "evaluate.exposure_bias"
    if recipe.evaluate.dataset is None:
        raise recipe.error(key, "metrics need held-out data: add evaluate.dataset")
    with recipe.locating("evaluate.metrics"):
        metrics.check(names)
    if prompts and (teacher is None or not teacher.can(Capability.MODEL)):
        raise recipe.error("evaluate.exposure_bias", "exposure bias needs a teacher that can generate: add a local one")


def held_out_metrics(
    recipe: Recipe,
    rollout: Rollout,
    sampling: Sampling,
    tokenizer: Any,
    held_out: Examples | None,
    teacher: Teacher | None,
) -> Callable[[Any], dict[str, float]] | None:
    """A function from the student to metrics, or None if the recipe asks for none; see `check_held_out_metrics`.

    Text metrics are of greedy responses, whose length is `greedy_response_length`, beside that of the responses on
    which the loss is measured. Exposure bias is measured at temperature 1, on the first prompts.
    """
    names, prompts = recipe.evaluate.metrics, recipe.evaluate.exposure_bias
    if held_out is None or not (names or prompts):
        return None
    greedy = replace(sampling, temperature=0.0, n=1)
    plain = replace(sampling, temperature=1.0, top_k=0, top_p=1.0, n=1)

    def measure(student: Any, examples: Examples = held_out) -> dict[str, float]:
        numbers: dict[str, float] = {}
        if names:
            values = evaluate(student, tokenizer, examples, rollout, greedy, metrics=names).metrics
            renamed = {name: f"greedy_{name}" for name in ("response_length", "truncated")}
            numbers |= {renamed.get(k, k): value for k, value in values.items() if not k.startswith(_SKIPPED)}
        if prompts and teacher is not None:
            teacher.to(student.device)
            few = replace(examples, examples=examples.examples[:prompts], rows=examples.rows[:prompts])
            values = evaluate(student, tokenizer, few, rollout, plain, teacher, exposure_bias=True).metrics
            numbers["exposure_bias"] = values["exposure_bias"]
        return numbers

    return measure

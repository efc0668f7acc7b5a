"""Which checkpoint is best, and when a run stops early: by an evaluation metric that exists."""

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from transformers import EarlyStoppingCallback

from ..registry import did_you_mean

if TYPE_CHECKING:
    from .build import Run


class Patience(EarlyStoppingCallback):
    """Stops after `patience` evaluations without improvement; a resumed run goes on with its count."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        super().on_train_begin(args, state, control, **kwargs)
        saved = state.stateful_callbacks.setdefault(type(self).__name__, self.state())
        self.early_stopping_patience_counter = saved["attributes"]["early_stopping_patience_counter"]


def check_best_metric(run: "Run") -> None:
    """Refuse a metric_for_best_model that no evaluation gives, by evaluating one example per process.

    Raises:
        RecipeError: with the metrics that there are.
    """
    trainer, name = run.trainer, (run.trainer.args.metric_for_best_model or "").removeprefix("eval_")
    if name in ("", "loss") or run.held_out is None:
        return
    examples = [run.held_out[i % len(run.held_out)] for i in range(trainer.args.world_size)]
    response_metrics, trainer.response_metrics = trainer.response_metrics, None
    callbacks, trainer.callback_handler.callbacks = trainer.callback_handler.callbacks, []
    try:
        with torch.random.fork_rng():
            names = {key.removeprefix("eval_") for key in trainer.evaluate(examples)}
    finally:
        trainer.response_metrics, trainer.callback_handler.callbacks = response_metrics, callbacks
        trainer.state.log_history.clear()
    if response_metrics is not None:
        held_out = run.held_out
        few = replace(held_out, examples=held_out.examples[:2], rows=held_out.rows[:2])
        names |= response_metrics(trainer.model, few).keys()  # pyright: ignore[reportCallIssue]
    if name not in names:
        hint = did_you_mean(name, names) or f"; there are {', '.join(sorted(names))}"
        message = f"no evaluation gives the metric {name}{hint}; metrics of responses are named in evaluate.metrics"
        raise run.recipe.error("training.metric_for_best_model", message)

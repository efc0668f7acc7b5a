"""The Trainer callback that completes checkpoints and deletes old ones."""

from pathlib import Path
from typing import Any

from accelerate import PartialState
from transformers import TrainerCallback

from .checkpoint import check_none_overwritten, checkpoints, complete, discard, is_own, step_of


class SaveCheckpoints(TrainerCallback):
    """Completes each checkpoint, and keeps the newest `limit` and the best one of those that the run has written.

    Replaces transformers' own rotation, which orders by modification time and deletes any folder named checkpoint-*.
    """

    def __init__(self, limit: int | None) -> None:
        self.limit = limit

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Refuse to overwrite somebody else's checkpoint; find the best checkpoint in a folder that was moved.

        A resumed run does not evaluate at its start once more.
        """
        if state.global_step:
            args.eval_on_start = False  # of the trainer's own copy
        if str(getattr(args.save_strategy, "value", args.save_strategy)) != "no":
            check_none_overwritten(args.output_dir, state.global_step + 1, state.max_steps)
        best = getattr(state, "best_global_step", None)
        path = Path(args.output_dir) / f"checkpoint-{best}"
        if best and state.best_model_checkpoint != str(path) and path.is_dir():
            state.best_model_checkpoint = str(path)
        if args.should_save:
            self._delete_old(args, state)  # what a killed process left to delete

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        PartialState().wait_for_everyone()
        if args.should_save:
            complete(Path(args.output_dir) / f"checkpoint-{state.global_step}")
            self._delete_old(args, state)

    def _delete_old(self, args: Any, state: Any) -> None:
        if not self.limit:
            return
        best = None if state.best_model_checkpoint is None else Path(state.best_model_checkpoint).resolve()
        own = [path for path in checkpoints(args.output_dir) if step_of(path) <= state.global_step and is_own(path)]
        newest_first = [path for path in reversed(own) if path.resolve() != best]
        for path in newest_first[max(1, self.limit - (best is not None)) :]:
            discard(path)

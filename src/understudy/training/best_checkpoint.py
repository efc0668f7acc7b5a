"""The state of method and teacher of the best checkpoint, which `load_best_model_at_end` does not load."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from ..method import Method
from ..teacher import Teacher
from .spending import Spending
from .state import load_state


class LoadBestState(TrainerCallback):
    """Restores the state of method and teacher where transformers has loaded the best checkpoint's weights at the end.

    The soft prompt that PromptKD exports, for instance, is then that of the student that is saved.
    """

    def __init__(self, parts: Mapping[str, Method | Teacher]) -> None:
        self.parts = parts

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if args.load_best_model_at_end and state.best_model_checkpoint is not None:
            load_state(Path(state.best_model_checkpoint), self.parts, Spending())  # what was spent stays

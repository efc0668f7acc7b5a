"""The method's state of the best checkpoint, which `load_best_model_at_end` does not load."""

from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from ..method import Method
from .spending import Spending
from .state import load_state


class LoadBestState(TrainerCallback):
    """Restores the method's state where transformers has loaded the best checkpoint's weights at the end of training.

    The soft prompt that PromptKD exports, for instance, is then that of the student that is saved.
    """

    def __init__(self, method: Method) -> None:
        self.method = method

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if args.load_best_model_at_end and state.best_model_checkpoint is not None:
            load_state(Path(state.best_model_checkpoint), self.method, Spending())  # what was spent stays

"""`transformers.Trainer` that loads all of a checkpoint's weights, whatever names they are saved under.

`save_pretrained` names some families' weights otherwise than the model in memory does: experts, for instance, one by
one instead of stacked. transformers' Trainer loads a checkpoint by the names in memory, and only logs which it lacks;
those weights would stay as they were at the start of the process.
"""

from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from ..models.weights import load_weights
from .sharding import ShardedTrainer


class ResumableTrainer(ShardedTrainer):
    """Base class of the trainer: resuming, and `load_best_model_at_end`, restore every weight or raise an error."""

    _differing_names: tuple[str, ...] = ()  # of the checkpoint that was loaded last, and of the model

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        self._differing_names = ()
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        self._load_by_saved_names(resume_from_checkpoint)

    def _load_best_model(self) -> None:
        self._differing_names = ()
        super()._load_best_model()
        self._load_by_saved_names(str(self.state.best_model_checkpoint))

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """Note the names, where transformers would log them; a tied weight is saved once, under either name."""
        model: Any = self.model
        missing, weights = set(load_result.missing_keys), model.state_dict()
        loaded = {weight.data_ptr() for name, weight in weights.items() if name not in missing}
        absent = [name for name in missing if weights[name].data_ptr() not in loaded]
        self._differing_names = (*sorted(absent), *load_result.unexpected_keys)

    def _load_by_saved_names(self, checkpoint: str) -> None:
        """Load a checkpoint as `from_pretrained` does, if its names are not the model's own.

        Raises:
            ValueError: if it lacks weights of the model.
        """
        if not self._differing_names:
            return
        model: Any = self.model
        if not isinstance(model, PreTrainedModel):
            raise ValueError(
                f"{Path(checkpoint)} does not hold the weights of this student: {self._differing_names[0]} is in only "
                "one of the two; resume from a checkpoint of the same student"
            )
        widest = max((parameter.dtype for parameter in model.parameters()), key=lambda dtype: dtype.itemsize)
        model.load_state_dict(load_weights(type(model), checkpoint, dtype=widest).state_dict())

"""A second module of a model that shares its weights' memory, to run it in another thread while it is trained.

Modules have state that a forward reads: training or evaluation mode, hooks, a configuration, a forward that is replaced
for the loss. The twin has its own. Its weights are views of the model's, so that it takes no memory for them and always
has their present values; they need no gradients, so that autocast does not share its casts with those of training.
"""

from typing import Any

import torch

from .saved import shared_copy


def twin_of(model: Any) -> Any:
    """A copy of the model in evaluation mode, with the memory of its parameters and with buffers of its own."""
    return shared_copy(model, own_buffers=True).eval()


@torch.no_grad()
def is_twin(twin: Any, model: Any) -> bool:
    """Does the twin still share the memory of all weights? Its buffers are set to the model's."""
    for own, other in zip(twin.buffers(), model.buffers(), strict=True):
        own.copy_(other)
    pairs = zip(twin.parameters(), model.parameters(), strict=True)
    return all(own.data_ptr() == other.data_ptr() for own, other in pairs)

"""The context window: how many tokens of prompt and response a model can read."""

from typing import Any


def context_window(*configs: Any) -> int | None:
    """How many positions models of all these configurations have; None if no configuration limits them."""
    limits = [getattr(config.get_text_config(), "max_position_embeddings", None) for config in configs]
    return min((limit for limit in limits if limit), default=None)

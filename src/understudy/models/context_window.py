"""The context window: how many tokens of prompt and response a model can read."""

from typing import Any


def context_window(*configs: Any) -> int | None:
    """The shortest context window of models with these configurations; None if none of them has a limit."""
    limits = [getattr(config.get_text_config(), "max_position_embeddings", None) for config in configs]
    return min((limit for limit in limits if limit), default=None)

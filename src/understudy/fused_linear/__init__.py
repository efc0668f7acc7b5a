"""Losses on hidden rows and a language-model head, computed in tiles: the (N, V) logits are never stored."""

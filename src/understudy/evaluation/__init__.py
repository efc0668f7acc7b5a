"""Evaluating a model: its responses, metrics, its distance from a teacher, exposure bias."""

"""Comparing recipes over seeds: running them, and the statistics of their results."""

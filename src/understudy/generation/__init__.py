"""Generating tokens: sampling, decoding with a key-value cache, stop tokens."""

"""Examine a recipe before it is run: what distill would refuse, tokens, lengths, memory and disk, without weights."""

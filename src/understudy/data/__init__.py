"""Datasets as examples: rows of files and hub datasets, their formats, chat templates, token ids."""

"""Datasets: rows of files and hub datasets, rendered by formats and chat templates, as examples of token ids."""

"""Datasets: from rows of files and hub datasets through formats and chat templates to examples of token ids."""

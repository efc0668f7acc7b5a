"""The training loop on transformers.Trainer, its callbacks and what it logs."""

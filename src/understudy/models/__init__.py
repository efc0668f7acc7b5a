"""Load, change and run models of transformers."""

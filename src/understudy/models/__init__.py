"""Everything that knows how transformers' models are loaded, changed and run."""

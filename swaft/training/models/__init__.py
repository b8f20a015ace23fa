"""The models that recipes train: loaded or newly made, with their tokens, heads and adapters."""

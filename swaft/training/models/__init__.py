"""The models that recipes train: loaded, with their tokens, heads and adapters, or made anew."""

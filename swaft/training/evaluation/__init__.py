"""Scores of the weights that are in the model, and the best of them kept."""

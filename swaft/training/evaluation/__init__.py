"""Scores the model's current weights, and keeps the best ones."""

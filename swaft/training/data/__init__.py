"""Rows in, token ids and batches out; each family of tasks with its own settings."""

"""Rows in, token ids and batches out; each family of tasks with the settings that only it has."""

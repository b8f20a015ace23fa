"""Rows to train on: found by name, checked, tokenized and padded."""

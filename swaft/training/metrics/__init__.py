"""Scores of predictions, by kind of task: no hub, no download, libraries imported when a metric is used."""

"""Training a prepared model: engine start-up, the one loop, evaluation, and the folder of a run."""

"""The folder of a run, and the checkpoints from which it resumes bit for bit."""

"""The folder of a run, and the checkpoints from which it resumes to the bit."""

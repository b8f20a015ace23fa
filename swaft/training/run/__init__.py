"""The folder of a run, and the checkpoints from which it goes on to the bit."""

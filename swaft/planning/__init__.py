"""What a run will take on every rank, told before it starts: memory, averaging, traffic."""

"""How the ranks of a run are started, set up for their engine, interrupted and ended."""

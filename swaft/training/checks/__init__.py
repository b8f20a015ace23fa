"""What a run is checked for before it starts, and what a recipe file offers for that."""

"""Everything that needs a GPU, as one call with a time limit: tests, probes, benchmarks, the flagship figure."""

"""A real model and a real task that need no network, for the quick start and the tests."""

"""A real model and a real task that need no network, for the quick start and the tests."""

from swaft.training.demo.docstrings import docstring_splits
from swaft.training.demo.model import demo_model_path

__all__ = ["demo_model_path", "docstring_splits"]

"""A real model and a real task that need no network, for the quick start and the tests."""

from swaft.demo.docstrings import docstring_splits
from swaft.demo.model import demo_model_path

__all__ = ["demo_model_path", "docstring_splits"]

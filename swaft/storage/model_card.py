"""The model card of a folder of weights, written without asking anybody."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from swaft.storage.files import write_durably

CARD = "README.md"


def write_card(
    folder: Path, *, title: str, body: Sequence[str], library: str = "transformers", base_model: Any = None
) -> None:
    """Write a model card into a folder.

    Args:
        folder: of the weights.
        title: of the card.
        body: lines of Markdown that say what the weights are.
        library: that opens them.
        base_model: what they were made from; named where it can be a name on the hub.

    Raises:
        StateError: it could not be written.
    """
    head = ["---", f"library_name: {library}", "tags:", "- swaft"]
    if is_hub_name(base_model):
        head.append(f"base_model: {json.dumps(base_model)}")
    lines = [*head, "---", "", f"# {in_one_line(title)}", "", *body, ""]
    write_durably(folder / CARD, "\n".join(lines).encode(errors="replace"))


def is_hub_name(name: Any) -> bool:
    """Whether this can be the name of a model on the hub, and is no folder of this machine."""
    if not isinstance(name, str) or not name or name[0] in "/.~":
        return False
    return name.count("/") <= 1 and not os.path.exists(name)


def in_one_line(text: str) -> str:
    """A text without line breaks, which would end its line of Markdown."""
    return " ".join(text.split())

"""The model card of a folder of weights, written without network access."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from swaft.errors import one_line
from swaft.storage.files import write_durably

CARD = "README.md"


def write_card(
    folder: Path, *, title: str, body: Sequence[str], library: str = "transformers", base_model: Any = None
) -> None:
    """Write a model card into a folder.

    Args:
        folder: folder of the weights.
        title: title of the card.
        body: lines of Markdown that describe the weights.
        library: the library that opens them.
        base_model: what they were made from; mentioned if it can be a name on the hub.

    Raises:
        StateError: the card could not be written.
    """
    head = ["---", f"library_name: {library}", "tags:", "- swaft"]
    if is_hub_name(base_model):
        head.append(f"base_model: {json.dumps(base_model)}")
    lines = [*head, "---", "", f"# {one_line(title)}", "", *body, ""]
    write_durably(folder / CARD, "\n".join(lines).encode(errors="replace"))


def is_hub_name(name: Any) -> bool:
    """Whether this can be the name of a model on the hub, and is not a local folder."""
    if not isinstance(name, str) or not name or name[0] in "/.~":
        return False
    return name.count("/") <= 1 and not os.path.exists(name)

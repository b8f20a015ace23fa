"""What the library says of its Python arguments, in the words of the settings."""

from __future__ import annotations

import re

_ARGUMENT = re.compile(
    r"(?<![\w.])(weight|preset|noise|sigma|masks|reduction|detach|passes|fused|layers)=(?:'(\w+)'|(True|False)|)"
)
_OBJECTIVE = re.compile(r"\bswaft\.(TaskLoss|R3F|R4F|RDrop)\b")
_KINDS = {"TaskLoss": "none", "R3F": "r3f", "R4F": "r4f", "RDrop": "rdrop"}


def in_settings(message: str) -> str:
    """Name the settings of section ``noise`` for the arguments and classes of `swaft.noise` in a message."""
    message = _OBJECTIVE.sub(lambda found: f"noise.kind={_KINDS[found[1]]}", message)
    return _ARGUMENT.sub(lambda found: f"noise.{found[1]}={found[2] or (found[3] or '').lower()}", message)

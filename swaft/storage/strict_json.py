"""JSON that is accepted only if it is unambiguous: no duplicate keys, no NaN, no unlimited nesting."""

from __future__ import annotations

import json
from typing import Any, NoReturn

from swaft.errors import StateError


def parse_object(raw: bytes, where: str) -> dict[str, Any]:
    """Parse one JSON object.

    Args:
        raw: UTF-8.
        where: what it is, for messages.

    Raises:
        StateError: it is not valid UTF-8 or JSON, not an object, has duplicate keys, or is nested too deep.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        content = dict(pairs)
        if len(content) < len(pairs):
            seen: set[str] = set()
            twice = next(key for key, _ in pairs if key in seen or seen.add(key))
            raise StateError(f"{where}: the key {twice[:80]!r} is there twice")
        return content

    def refuse(constant: str) -> NoReturn:
        raise StateError(f"{where}: found {constant}, which is not a JSON number")

    try:
        content = json.loads(raw.decode("utf-8"), object_pairs_hook=unique, parse_constant=refuse)
    except RecursionError:
        raise StateError(f"{where}: nested too deep") from None
    except ValueError as error:  # not UTF-8, not JSON, or a number with thousands of digits
        raise StateError(f"{where}: not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise StateError(f"{where}: found a {type(content).__name__}, expected an object")
    return content


def shown(value: Any) -> str:
    """A value for a message, shortened if it is long."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."

"""Turns one value, as YAML or the command line gave it, into the type its setting has, or says why not."""

from __future__ import annotations

import math
from difflib import get_close_matches
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from swaft.training.config.leaves import Leaf

NULL_TEXTS = ("null", "None")
DELIMITERS = {"tab": "\t", "\\t": "\t"}
"""What `data.delimiter` may say for a character that is hard to type."""


def parse_scalar(text: str) -> Any:
    """Read a text as a YAML file would (`1e-5` is a number); return the text itself if it is not YAML."""
    try:
        value = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={text}"]), resolve=False)
    except (yaml.YAMLError, OmegaConfBaseException):
        return text
    return value["value"]  # type: ignore[index, call-overload]


def coerce(value: Any, leaf: Leaf) -> Any:
    """Bring a value into the type of its setting.

    Text is kept for a text setting and parsed as YAML for any other, so that the command line (all text)
    and files agree, and a whole number stays apart from a fraction (`1` from `1.0`).

    Args:
        value: what YAML gave, or the text after `=` on the command line.
        leaf: the setting.

    Raises:
        ValueError: with a message that goes on after the setting's name: "expected float, got the text 'x'".
    """
    if leaf.optional and (value is None or (value in NULL_TEXTS and str(value).lower() not in leaf.choices)):
        return None
    if leaf.types == (str,):
        return _text(value, leaf)
    if isinstance(value, str):
        value = parse_scalar(value)
    for kind in leaf.types:
        if type(value) is kind:
            return value
    return _number(value, leaf)


def split_names(text: str) -> list[str]:
    """Split the text of a setting that holds several names: `de, fr` into `de` and `fr`."""
    return [name.strip() for name in text.split(",")]


def suggestion(word: str, known: list[str] | tuple[str, ...]) -> str:
    """` Did you mean 'x'?` for the known word nearest to this one, or nothing."""
    near = get_close_matches(word, known, n=1, cutoff=0.6)
    return f" Did you mean '{near[0]}'?" if near else ""


def not_allowed(value: str, choices: tuple[str, ...]) -> str:
    """Say that a value is none of the choices, and which was probably meant."""
    return f"'{value}' is not one of {', '.join(choices)}.{suggestion(value, choices)}"


def _text(value: Any, leaf: Leaf) -> str:
    # YAML 1.1 reads an unquoted no or off as false: where "no" or "none" is a choice, that is what was meant.
    if value is False:
        for meant in ("no", "none"):
            if meant in leaf.choices or leaf.default == meant:
                return meant
    if isinstance(value, bool):
        raise ValueError(
            f"expected {leaf.type_name}, got {str(value).lower()} (unquoted yes, no, on and off are true and "
            "false in YAML; put text in quotes)"
        )
    if not isinstance(value, str):
        advice = "" if value is None else "; put text in quotes"
        raise ValueError(f"expected {leaf.type_name}, got {_named(value)}{advice}")
    if leaf.choices and value not in leaf.choices:
        raise ValueError(not_allowed(value, leaf.choices))
    return value


def _number(value: Any, leaf: Leaf) -> int | float:
    if isinstance(value, int | float) and not isinstance(value, bool):
        if float in leaf.types:
            return float(value)
        # 1e3 is a whole number written short; 2.5 rows are not.
        if int in leaf.types and math.isfinite(value) and value == int(value):
            return int(value)
    raise ValueError(f"expected {leaf.type_name}, got {_named(value)}")


def _named(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    kinds = {int: "the number", float: "the number", str: "the text", list: "the list", dict: "the mapping"}
    return f"{kinds.get(type(value), 'the value')} {value!r}"

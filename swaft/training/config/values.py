"""Turns one value, as YAML or the command line gave it, into the type its setting has, or says why not.

OmegaConf's structured configurations would take 1 and 1.0 for the same start, and an unquoted no for False.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import fields
from typing import Any, get_type_hints

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from swaft.options import Option, options_of, suggestion

NULL_TEXTS = ("null", "None")
DELIMITERS = {"tab": "\t", "\\t": "\t"}
"""What `data.delimiter` may say for a character that is hard to type."""
TYPE_NAMES = {bool: "true|false", int: "int", float: "float", str: "text", dict: "mapping"}
"""The types of settings, as help and messages write them."""


def sections(config_class: type) -> dict[str, type]:
    """List the sections of a configuration class: field name to the section's dataclass."""
    hints = get_type_hints(config_class)
    return {field.name: hints[field.name] for field in fields(config_class)}


def settings(config_class: type) -> dict[str, Option]:
    """All settings of a configuration class, in order, by full name: section and name."""
    return {
        f"{section}.{name}": option
        for section, kind in sections(config_class).items()
        for name, option in options_of(kind).items()
    }


def type_name(option: Option) -> str:
    """The type of a setting as help and messages write it: `float`, `int or float`, `a|b|c`."""
    names = [name for kind, name in TYPE_NAMES.items() if kind in option.kinds and not option.choices]
    return " or ".join(["|".join(option.choices)] * bool(option.choices) + names + ["null"] * option.optional)


def written(value: Any) -> str:
    """A value as YAML would write it."""
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)


def parse_scalar(text: str) -> Any:
    """Read a text as a YAML file would (`1e-5` is a number); return the text itself if it is not YAML."""
    try:
        value = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={text}"]), resolve=False)
    except (yaml.YAMLError, OmegaConfBaseException):
        return text
    return value["value"]  # type: ignore[index, call-overload]


def coerce(value: Any, option: Option) -> Any:
    """Bring a value into the type of its setting.

    Text is kept for a text setting and parsed as YAML for any other, so that the command line (all text)
    and files agree, and a whole number stays apart from a fraction (`1` from `1.0`).

    Args:
        value: what YAML gave, or the text after `=` on the command line.
        option: the setting.

    Raises:
        ValueError: with a message that follows the setting's name: "expected float, got the text 'x'".
    """
    if option.optional and (
        value is None or (value in NULL_TEXTS and str(value).lower() not in option.choices)
    ):
        return None
    typed = _text(value, option) if {*option.kinds} == {str} else _plain(value, option)
    if fault := option.fault(typed):
        raise ValueError(fault)
    return typed


def split_names(text: str) -> list[str]:
    """Split the text of a setting that holds several names: `de, fr` into `de` and `fr`."""
    return [name.strip() for name in text.split(",")]


def not_allowed(value: str, choices: Sequence[str]) -> str:
    """Say that a value is none of the choices, and which was probably meant."""
    return f"'{value}' is not one of {', '.join(choices)}.{suggestion(value, choices)}"


def _text(value: Any, option: Option) -> str:
    # YAML 1.1 reads an unquoted no or off as false: where "no" or "none" is a choice, that is what was meant.
    if value is False:
        for meant in ("no", "none"):
            if meant in option.choices or option.default == meant:
                return meant
    if isinstance(value, str):
        return value
    advice = "" if value is None else "; put text in quotes"
    if isinstance(value, bool):
        advice = " (unquoted yes, no, on and off are true and false in YAML; put text in quotes)"
    raise ValueError(f"expected {type_name(option)}, got {_named(value)}{advice}")


def _plain(value: Any, option: Option) -> Any:
    if isinstance(value, str):
        value = parse_scalar(value)
    if type(value) in option.kinds:
        return value
    if isinstance(value, int | float) and not isinstance(value, bool):
        if float in option.kinds:
            return float(value)
        # 1e3 is a whole number written short; 2.5 rows are not.
        if int in option.kinds and math.isfinite(value) and value == int(value):
            return int(value)
    raise ValueError(f"expected {type_name(option)}, got {_named(value)}")


def _named(value: Any) -> str:
    kinds = {int: "the number", float: "the number", str: "the text", list: "the list", dict: "the mapping"}
    if value is None or isinstance(value, bool):
        return written(value)
    return f"{kinds.get(type(value), 'the value')} {value!r}"

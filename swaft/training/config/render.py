"""Writes a configuration as text: YAML with origins, flat for trackers, and the help page."""

from __future__ import annotations

import dataclasses
import json
import re
import textwrap
from typing import Any

from omegaconf import OmegaConf

from swaft.options import docs_of, options_of
from swaft.training.config.values import sections, type_name, written

HELP_WIDTH = 100

USAGE = """\
usage: accelerate launch [--config_file FILE] RECIPE --config FILE ... [section.name=value ...]

  --config FILE        YAML settings; repeatable, later files win over earlier ones
  section.name=value   one setting; wins over every file (--section.name value is understood too)
  --print_config       print the resolved settings with their origins, and exit
  --help               print this page, and exit
"""


def to_yaml(config: Any, origins: dict[str, str] | None = None) -> str:
    """Write the configuration as YAML that `load_config` reads back to the same configuration.

    Args:
        config: a configuration dataclass.
        origins: full name to where the value comes from; each becomes a comment after its line.
    """
    lines = []
    for section, values in dataclasses.asdict(config).items():
        lines.append(f"{section}:")
        for name, value in values.items():
            origin = (origins or {}).get(f"{section}.{name}")
            text = textwrap.indent(_yaml_line(name, value), "  ")
            lines.append(f"{text}  # {origin}" if origin else text)
    return "\n".join(lines) + "\n"


def flatten(config: Any) -> dict[str, str | int | float | bool]:
    """Flatten the configuration for trackers: full name to value; null and mappings become JSON text."""
    nested = dataclasses.asdict(config)
    return {
        f"{section}.{name}": json.dumps(value) if value is None or isinstance(value, dict) else value
        for section, values in nested.items()
        for name, value in values.items()
    }


def help_text(config_class: type) -> str:
    """Write the help page: every setting with type, default and doc, section by section."""
    blocks = [USAGE]
    for section, kind in sections(config_class).items():
        blocks.append(f"\n{section}: {(kind.__doc__ or '').splitlines()[0]}\n")
        docs, indent = docs_of(kind), " " * 6
        for name, option in options_of(kind).items():
            default = "required" if option.required else f"default {written(option.default)}"
            body = textwrap.fill(docs[name], HELP_WIDTH, initial_indent=indent, subsequent_indent=indent)
            blocks.append(f"  {section}.{name}  <{type_name(option)}>  [{default}]\n{body}\n")
    return "".join(blocks)


def _yaml_line(name: str, value: Any) -> str:
    # `${` is escaped, and so are backslashes before it, because reading it back would fill it in.
    escaped = re.sub(r"(\\*)\$\{", r"\1\1\\${", value) if isinstance(value, str) else value
    return OmegaConf.to_yaml(OmegaConf.create({name: escaped})).rstrip("\n")

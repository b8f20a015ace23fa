"""Writes docs/api.md, the reference of the public names, from their docstrings: `python docs/make_api.py`."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

import swaft
from swaft import errors, functional, soup
from swaft.averaging import lora

SECTIONS = {
    "Averaging": (swaft, ("WeightAverager", "Readout", "search_windows")),
    "Rules": (swaft, ("SWA", "EMA", "LAWA", "Merge", "BEMA", "PowerEMA", "Windows")),
    "Noise objectives": (swaft, ("TaskLoss", "R3F", "R4F", "RDrop")),
    "Losses as functions": (functional, functional.__all__),
    "Trainer and accelerate": (
        swaft,
        ("WeightAveragingCallback", "NoiseCallback", "averaged_weights", "register_averager"),
    ),
    "LoRA": (lora, ("product_mean", "save_merged")),
    "Finished checkpoints": (soup, soup.__all__),
    "Errors": (errors, [name for name, kind in vars(errors).items() if inspect.isclass(kind)]),
}
"""Title to the module and its names."""


def reference() -> str:
    """Return the page."""
    parts = ["# Reference\n\nWritten by `python docs/make_api.py` from the docstrings.\n"]
    for title, (module, names) in SECTIONS.items():
        parts.append(f"## {title}\n")
        parts += [entry(name, getattr(module, name)) for name in names]
    return "\n".join(parts)


def entry(name: str, found: Any) -> str:
    """Return what the page says of a class or function: signature, docstring, and the public methods of a class."""
    lines = [f"### `{name}`\n", code(f"{name}{signature(found)}\n\n{inspect.getdoc(found) or ''}")]
    if inspect.isclass(found) and not issubclass(found, Exception):
        for short, member in vars(found).items():
            member = getattr(member, "fget", None) or getattr(member, "__func__", member)
            if not short.startswith("_") and inspect.isfunction(member) and inspect.getdoc(member):
                lines.append(code(f"{name}.{short}{signature(member)}\n\n{inspect.getdoc(member)}"))
    return "\n".join(lines)


def signature(found: Any) -> str:
    """Return a signature as it is written, a parameter a line where it is long; "" for an error or a constant."""
    if (inspect.isclass(found) and issubclass(found, Exception)) or not callable(found):
        return ""
    given = inspect.signature(found)
    kept = [unquoted(str(each)) for each in given.parameters.values() if each.name != "self"]
    line = ", ".join(kept)
    body = line if len(line) <= 80 else "".join(f"\n    {each}," for each in kept) + "\n"
    returns = given.return_annotation
    says = "" if inspect.isclass(found) or returns is given.empty else f" -> {returns}"
    return f"({body}){says}"


def unquoted(parameter: str) -> str:
    """Return a parameter without the quotes around its annotation."""
    return re.sub(r": (['\"])(.*?)\1(?= = |$)", r": \2", parameter).replace("<factory>", "...")


def code(text: str) -> str:
    """Return text as a block that nobody takes for an example."""
    return f"```text\n{text.rstrip()}\n```\n"


if __name__ == "__main__":
    Path(__file__).with_name("api.md").write_text(reference(), encoding="utf-8")

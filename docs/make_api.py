"""Writes docs/api.md, the reference of the public names, from their docstrings: `python docs/make_api.py`."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

import swaft
from swaft import averaging, errors, functional, noise, soup
from swaft.averaging import lora
from swaft.averaging.rules import RULES
from swaft.integrations import accelerate, transformers

SECTIONS = {
    "Averaging": (averaging, ("WeightAverager", "Readout", "search_windows", "ReadoutSearch", "Tried")),
    "Rules": (swaft, [kind.__name__ for kind in RULES.values()]),
    "Noise objectives": (noise, ("TaskLoss", "R3F", "R4F", "RDrop", "ObjectiveOutput")),
    "Losses as functions": (functional, functional.__all__),
    "Trainer": (
        transformers,
        ("WeightAveragingCallback", "NoiseCallback", "averaged_weights", "write_surface"),
    ),
    "accelerate": (accelerate, ("register_averager",)),
    "LoRA": (lora, ("product_mean", "ProductMean", "save_merged")),
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
            is_property = isinstance(member, property)
            member = getattr(member, "fget", None) or getattr(member, "__func__", member)
            if not short.startswith("_") and inspect.isfunction(member) and inspect.getdoc(member):
                said = signature(member)
                said = said.removeprefix("()").replace(" ->", ":", 1) if is_property else said
                lines.append(code(f"{name}.{short}{said}\n\n{inspect.getdoc(member)}"))
    return "\n".join(lines)


def signature(found: Any) -> str:
    """Return a signature as it is written, a parameter a line where it is long; "" for an error or a constant."""
    if (inspect.isclass(found) and issubclass(found, Exception)) or not callable(found):
        return ""
    given = inspect.signature(found)
    shown = [each for each in given.parameters.values() if each.name != "self"]
    kept, kinds = [unquoted(str(each)) for each in shown], [each.kind for each in shown]
    if inspect.Parameter.KEYWORD_ONLY in kinds and inspect.Parameter.VAR_POSITIONAL not in kinds:
        kept.insert(kinds.index(inspect.Parameter.KEYWORD_ONLY), "*")
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

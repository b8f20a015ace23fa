"""A model card for exported weights, written without asking anybody."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

CARD = "README.md"


def write_card(folder: Path, module: nn.Module, *, told: str, dtype: torch.dtype) -> None:
    """Write a model card into a folder, unless there is one.

    Args:
        folder: of the weights; its name is the card's title.
        module: whose configuration may name what it was made from.
        told: what the weights are.
        dtype: that they are stored in.
    """
    path = folder / CARD
    if path.exists():
        return
    source = getattr(getattr(module, "config", None), "_name_or_path", "") or ""
    lines = ["---", "library_name: transformers", "tags:", "- swaft"]
    if (
        source and not Path(source).exists() and source.count("/") <= 1
    ):  # a name on the hub, no folder of this machine
        lines.append(f"base_model: {source}")
    lines += [
        "---",
        "",
        f"# {folder.name}",
        "",
        f"This folder holds {told}, in {str(dtype).removeprefix('torch.')}, written by swaft.",
        "",
    ]
    path.write_text("\n".join(lines), encoding="utf-8")

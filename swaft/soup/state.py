"""A saved state of running averages (`WeightAverager.save_state`) as a checkpoint."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from swaft.averaging.state import KIND, AverageState, lane_name, read_elements
from swaft.errors import StateError
from swaft.soup.checkpoint import Checkpoint, Spec
from swaft.storage import read_manifest, verify


class AverageFolder(Checkpoint):
    """The average of one rule of a run: the parameters that were trained, and none but those.

    Args:
        path: the sealed folder.
        rule: which rule; None: the only one.

    Raises:
        StateError: the folder is incomplete or damaged, or the rule keeps several vectors, of which the folder
            alone does not tell the average.
    """

    files = None

    def __init__(self, path: Path, *, rule: str | None = None):
        self.path = path
        manifest = read_manifest(path, kind=KIND)
        verify(path, manifest)
        state = AverageState.from_json(manifest.content, where=path)
        names = [each.name for each in state.rules]
        if (rule is None and len(names) > 1) or (rule is not None and rule not in names):
            raise StateError(f"{path} holds the averages {', '.join(names)}; choose one with --rule")
        number = 0 if rule is None else names.index(rule)
        chosen = state.rules[number]
        if list(chosen.lanes) != ["0"]:
            raise StateError(
                f"{path}: the average of {chosen.rule} is put together from {len(chosen.lanes)} vectors; expected "
                "a rule with one running mean. Save it from the run: averager.save_pretrained"
            )
        self.aliases = state.aliases
        self.specs = {name: Spec(torch.float32, tuple(shape)) for name, shape in state.parameters.items()}
        self._vector = f"{lane_name(number, 0)}.mean"
        self._names = sorted(manifest.files)

    def read(self, name: str, start: int, end: int) -> Tensor:
        """As of :class:`Checkpoint`."""
        values = torch.empty(end - start, dtype=torch.float32, device="cpu")
        read_elements(self.path, self._names, [(name, start, end)], {self._vector: values})
        return values

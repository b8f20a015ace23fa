"""A saved state of running averages (`WeightAverager.save_state`) as a checkpoint."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from swaft.averaging.layout import Range
from swaft.averaging.state import KIND, AverageState, lane_name, read_elements
from swaft.errors import StateError
from swaft.soup.checkpoint import SavedWeights, Spec
from swaft.storage import read_manifest, verify


class AverageFolder(SavedWeights):
    """The average of one rule of a run: the parameters that were trained, and none but those.

    Args:
        path: the sealed folder.
        rule: which rule; None: the only one.

    Raises:
        StateError: the folder is incomplete or damaged, or nothing is averaged in it yet.
    """

    def __init__(self, path: Path, *, rule: str | None = None):
        self.path = path
        manifest = read_manifest(path, kind=KIND)
        verify(path, manifest)
        state = AverageState.from_json(manifest.content, where=path)
        names = [each.name for each in state.rules]
        if (rule is None and len(names) > 1) or (rule is not None and rule not in names):
            unknown = "" if rule is None else f" and none called {rule}"
            raise StateError(f"{path} holds the averages {', '.join(names)}{unknown}; choose one with --rule")
        number = 0 if rule is None else names.index(rule)
        chosen = state.rules[number]
        if not chosen.readout:
            raise StateError(
                f"{path}: nothing is averaged yet by {chosen.rule}, after {state.applied_steps} steps"
            )
        self.aliases = state.aliases
        self.specs = {name: Spec(torch.float32, tuple(shape)) for name, shape in state.parameters.items()}
        self._lanes = [
            (lane_name(number, lane), share, chosen.lanes[lane]) for lane, share in chosen.readout.items()
        ]
        self._names = sorted(manifest.files)
        self._label = f"{path}: {chosen.name}, {chosen.rule}, {chosen.count} weights"

    @property
    def label(self) -> str:
        """As of :class:`SavedWeights`."""
        return self._label

    def read(self, name: str, start: int, end: int) -> Tensor:
        """As of :class:`SavedWeights`."""
        if [share for _, share, _ in self._lanes] == [1.0]:
            return self._vector(f"{self._lanes[0][0]}.mean", torch.float32, (name, start, end))
        total = torch.zeros(end - start, dtype=torch.float64, device="cpu")
        for lane, share, compensated in self._lanes:  # as `Lanes.shard`: in float64, rounded once
            value = self._vector(f"{lane}.mean", torch.float32, (name, start, end)).double()
            if compensated:
                value += self._vector(f"{lane}.compensation", torch.bfloat16, (name, start, end)).double()
            total += value * share
        return total.float()

    def _vector(self, vector: str, dtype: torch.dtype, wanted: Range) -> Tensor:
        values = torch.empty(wanted[2] - wanted[1], dtype=dtype, device="cpu")
        read_elements(self.path, self._names, [wanted], {vector: values})
        return values

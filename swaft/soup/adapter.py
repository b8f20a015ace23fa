"""The mean of LoRA adapters: of the updates B A, not of B and A.

See `swaft/averaging/lora.py` for the mathematics. Everything else in an adapter folder (`modules_to_save`, biases)
is averaged like any weight.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from swaft.averaging.lora import Norms, refactor
from swaft.averaging.lora_layers import changes_base
from swaft.errors import StateError
from swaft.soup.checkpoint import SavedWeights
from swaft.soup.huggingface import ADAPTER_CONFIG, read_json
from swaft.soup.mean import SLICE, Mean, Weighted
from swaft.storage import Spec
from swaft.storage.strict_json import shown

FACTORS = (("lora_A.weight", "lora_B.weight"), ("lora_embedding_A", "lora_embedding_B"))
"""The suffixes of the names of A and B."""
VARIANTS = (
    "use_dora",
    "use_qalora",
    "use_bdlora",
    "alora_invocation_tokens",
    "target_parameters",
    "megatron_config",
    "arrow_config",
)
"""Settings with which an update is not scaling * B @ A, or is untested."""


class AdapterMean(Mean):
    """The weighted mean of LoRA adapters with the same configuration.

    Args:
        members: as for :class:`Mean`, all adapters.
        dtype: of the result.
        base: adapter folder that provides the tensors that the members lack.
        rank: of the new factors; None: that of the adapters. At rank times members, nothing is lost.

    Raises:
        StateError: they are not plain LoRA, have different base models or configurations, or `rank` cannot be set
            for them.
    """

    def __init__(
        self,
        members: Sequence[Weighted],
        dtype: torch.dtype,
        base: SavedWeights | None = None,
        *,
        rank: int | None = None,
    ):
        super().__init__(members, dtype, base)
        self.config = _plain_config(members[0][1], self._specs)
        self._resize(rank)
        self._down = dict(_pairs(self._specs))
        self._up = {down: up for up, down in self._down.items()}
        self._kept: tuple[str, Tensor, Tensor] | None = None
        self._norms: dict[str, Norms] = {}

    def slices(self, name: str) -> Iterator[Tensor]:
        """See :class:`Mean`."""
        up = self._up.get(name, name)
        if up not in self._down:
            yield from super().slices(name)
            return
        if self._kept is None or self._kept[0] != up:
            self._kept = (up, *self._factors(up, self._down[up]))
        factor = self._kept[1] if name == up else self._kept[2]
        for part in factor.double().reshape(-1).split(SLICE):
            yield self.round(name, part)

    @property
    def truncation(self) -> float:
        """The error of the new factors due to their limited rank, relative to the mean update, over all layers."""
        lost = math.hypot(*(norms.lost for norms in self._norms.values()))
        whole = math.hypot(*(norms.whole for norms in self._norms.values()))
        return lost / whole if whole else 0.0

    def _factors(self, up: str, down: str) -> tuple[Tensor, Tensor]:
        members = []
        total = math.fsum(weight for weight, _ in self._members)
        for weight, checkpoint in self._members:
            b, a = (self._factor(checkpoint, name) for name in (up, down))
            if not (b.isfinite().all() and a.isfinite().all()):
                raise StateError(
                    f"{checkpoint.path}: {up!r} or {down!r} is not finite. Leave that checkpoint out"
                )
            members.append((weight / total, b, a))
        b, a, norms = refactor(members, self._specs[up].shape[1])
        # One of the two is equal in all adapters: the means are exact.
        if norms.gap == 0.0 and a.shape == members[0][2].shape:
            b, a = (torch.stack([m[0] * m[i].double() for m in members]).sum(0) for i in (1, 2))
            norms = norms._replace(lost=0.0)
        if not (b.isfinite().all() and a.isfinite().all()):
            raise StateError(
                f"{up!r}: the mean update is more than float32 holds; leave out what has diverged"
            )
        self._norms[up] = norms
        return b, a

    def _factor(self, checkpoint: SavedWeights, name: str) -> Tensor:
        """A factor of one adapter, in fp32; one that was frozen in training may be in the base alone."""
        holder = checkpoint if self._base is None or name in checkpoint.specs else self._base
        return holder.read(name, 0, holder.specs[name].numel).float().reshape(holder.specs[name].shape)

    def _resize(self, rank: int | None) -> None:
        """Set another rank in the configuration and in the shapes, keeping every scaling."""
        config = self.config
        if rank is None or rank == config["r"]:
            return
        if config.get("rank_pattern") or config.get("alpha_pattern"):
            raise StateError("--lora-rank: these adapters have ranks or alphas of their own for some layers")
        beginning = config.get("init_lora_weights", True)
        if changes_base(beginning):
            raise StateError(
                f"--lora-rank: these adapters have init_lora_weights={beginning!r}, which changes the base model by"
                " the rank whenever one is loaded; leave --lora-rank out"
            )
        ratio = rank / config["r"]
        config["lora_alpha"] *= math.sqrt(ratio) if config.get("use_rslora") else ratio
        config["r"] = rank
        config["init_lora_weights"] = bool(beginning)
        for up, down in _pairs(self._specs):
            (rows, _, *more), (_, *columns) = self._specs[up].shape, self._specs[down].shape
            self._specs[up] = Spec(self._specs[up].dtype, (rows, rank, *more))
            self._specs[down] = Spec(self._specs[down].dtype, (rank, *columns))


def _pairs(specs: Mapping[str, Spec]) -> Iterator[tuple[str, str]]:
    """Names of B and A of every update."""
    for name in specs:
        for a, b in FACTORS:
            if name.endswith(b):
                down = name.removesuffix(b) + a
                rank = specs[down].shape[:1] if down in specs else None
                if specs[name].shape[1:2] != rank:
                    raise StateError(
                        f"{name!r} of shape {list(specs[name].shape)} does not fit {down!r}: {rank}"
                    )
                yield name, down


def _plain_config(checkpoint: SavedWeights, names: Collection[str]) -> dict[str, Any]:
    """The configuration of an adapter, after checking that it is plain LoRA."""
    where = checkpoint.files or checkpoint.path
    config = read_json(where / ADAPTER_CONFIG)
    if config.get("peft_type") != "LORA":
        raise StateError(f"{where}: peft_type is {shown(config.get('peft_type'))}; expected LORA")
    if type(config.get("r")) is not int or not isinstance(config.get("lora_alpha"), int | float):
        raise StateError(f"{where / ADAPTER_CONFIG}: r and lora_alpha: expected numbers")
    for key in VARIANTS:
        if config.get(key):
            raise StateError(f"{where}: {key} is set, so its updates are not plain B A; expected plain LoRA")
    ends = tuple(end for pair in FACTORS for end in pair)
    for name in names:
        if "lora_" in name and not name.endswith((*ends, "lora_B.bias")):
            raise StateError(f"{where}: {name!r} is of a variant of LoRA; expected plain LoRA")
    return config

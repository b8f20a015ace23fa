"""Averages of LoRA models (peft): the exact mean of the updates, next to the mean of the factors.

A layer with LoRA computes ``W + s B A``, with ``s`` its scaling. Averaging the factors, which is what an average of
a LoRA model's weights does, gives ``s mean(B) mean(A)``. The mean of the updates is ``s mean(B A)`` (the difference
was raised in huggingface/peft#1155), and with coefficients ``c_i`` that sum to 1

    mean(B A) = mean(B) mean(A) + sum_i c_i (B_i - mean(B)) (A_i - mean(A)),

so what the mean of the factors misses is the covariance of the two factors over the members. It is zero if only one
of them moves. None of this needs a matrix as large as a weight: two QR decompositions and the singular values of a
core of (members + 1) * r rows and columns are enough, in float64.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from swaft.averaging import export, lora_layers, swap
from swaft.averaging.adapters import folder_of
from swaft.averaging.buffers import fold_parametrizations
from swaft.averaging.engines import Engine
from swaft.averaging.lora_layers import PREFIX, LoraLayer, Members
from swaft.averaging.rules import Plan, Readout
from swaft.averaging.shards import gather_trained, scatter_trained
from swaft.errors import AveragingError

if TYPE_CHECKING:
    from swaft.averaging.averager import WeightAverager


class Norms(NamedTuple):
    """Frobenius norms of a layer."""

    whole: float
    """Of mean(B A)."""
    gap: float
    """Of mean(B A) - mean(B) mean(A)."""
    lost: float
    """Of mean(B A) - B' A', before rounding."""


@dataclass(frozen=True)
class Distance:
    """Relative distances from the exact mean of the updates, in the Frobenius norm."""

    overall: float
    """Over all layers together, each update with its scaling."""
    by_layer: dict[str, float]
    """By ``layer:adapter``."""

    @classmethod
    def between(cls, norms: Mapping[str, Norms], layers: Iterable[LoraLayer], which: str) -> Distance:
        """The distance made of the norms named ``gap`` or ``lost``, over the layers that have norms."""
        scalings = {layer.name: layer.scaling for layer in layers}
        difference = math.hypot(*(scalings[name] * getattr(each, which) for name, each in norms.items()))
        whole = math.hypot(*(scalings[name] * each.whole for name, each in norms.items()))
        by_layer = {name: _ratio(getattr(each, which), each.whole) for name, each in norms.items()}
        return cls(_ratio(difference, whole), by_layer)

    def __str__(self) -> str:
        worst = max(self.by_layer, key=lambda name: self.by_layer[name])
        return f"{self.overall:.2e} overall, at most {self.by_layer[worst]:.2e} ({worst})"


@dataclass(frozen=True, repr=False, eq=False)
class ProductMean:
    """The exact mean of LoRA updates; see :func:`product_mean`. All methods are collective, rank 0 writes."""

    num_members: int
    """Members in the mean."""
    rank: int | None
    """Rank of the new factors; None: each layer's own."""
    gap: Distance
    """``||mean(B) mean(A) - mean(B A)|| / ||mean(B A)||``: the error of the mean of the factors."""
    truncation: Distance
    """``||B' A' - mean(B A)|| / ||mean(B A)||``: the error of the new factors, due to their limited rank."""
    factors: dict[str, tuple[Tensor, Tensor]]
    """``layer:adapter`` to the new (B', A'): fp32, as peft shapes them, on rank 0's host; {} elsewhere."""
    _engine: Engine
    _layers: list[LoraLayer]
    _weights: dict[str, Tensor]
    _members: dict[str, Members]

    def __str__(self) -> str:
        rank = "each layer's own rank" if self.rank is None else f"rank {self.rank}"
        return (
            f"mean of {self.num_members} LoRA updates in {len(self.gap.by_layer)} layers, new factors of {rank}\n"
            f"  the mean of the factors is off by {self.gap}\n"
            f"  the new factors are off by        {self.truncation}"
        )

    def save_adapter(self, path: str | PathLike[str]) -> None:
        """Write the new factors as a peft adapter folder, fp32.

        Everything else that was trained (`modules_to_save`, biases) is its plain mean. If the rank is not the
        configured one, `adapter_config.json` gets the new rank, with an alpha that keeps every scaling.

        Raises:
            AveragingError: the folder already holds files, or the rank differs and the adapter changes the base
                model when it is loaded (PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA).
        """
        resized, configs = self._resized(), self._configs
        for adapter in resized:
            lora_layers.refuse_changed_base(adapter, configs[adapter].init_lora_weights)
        export.refuse_occupied(self._engine, path)
        adapter_folder, names = export.adapter_folder(self._engine)
        state_dict = export.add_frozen(self._engine, self._weights, names=names)

        def write(folder: Path) -> None:
            assert adapter_folder is not None  # only rank 0 writes
            adapter_folder.write(folder, fold_parametrizations(self._engine.module, state_dict, derive=True))
            export.describe(self._engine, folder, "weights averaged along a training run")
            for adapter, config in resized.items():
                export.edit_json(folder_of(adapter, folder) / "adapter_config.json", **config)

        export.write_folder(self._engine, path, write)

    def save_merged(self, path: str | PathLike[str]) -> None:
        """Write the base model with the exact mean update in its weights, fp32.

        ``W + s mean(B A)`` is summed in float64 without truncation and rounded once. It includes the active
        adapters. The result is a folder of the base model, which `AutoModel.from_pretrained` opens without peft.

        Raises:
            AveragingError: the folder already holds files, or the base model is quantised.
        """
        _save_merged(self._engine, path, self._layers, self._weights, self._members)

    @contextmanager
    def swapped_in(self) -> Iterator[None]:
        """Put the new factors into the model, for evaluation, as `averager.swapped_in` does (every rank enters and
        leaves).

        Raises:
            AveragingError: the rank of the factors differs from the model's, or a swap is active.
        """
        if resized := self._resized():
            raise AveragingError(
                f"the new factors have rank {self.rank}, which is not that of every layer of adapter "
                f"{' and '.join(map(repr, resized))}, so they do not fit into the model; expected "
                "product_mean(averager) without `rank`"
            )
        with swap.swapped_in(self._engine, scatter_trained(self._engine, self._weights)):
            yield

    @property
    def _configs(self) -> Any:
        return self._engine.module.peft_config

    def _resized(self) -> dict[str, dict[str, Any]]:
        """Adapters with a layer whose rank differs from the new one, and the configuration values they need."""
        if self.rank is None:
            return {}
        resized = {}
        for adapter in {layer.adapter for layer in self._layers if layer.trained and layer.rank != self.rank}:
            config = self._configs[adapter]
            divisor = math.sqrt(self.rank) if config.use_rslora else self.rank
            layers = [layer for layer in self._layers if layer.adapter == adapter]
            alphas = {f"^{re.escape(layer.path)}": layer.scaling * divisor for layer in layers}
            alpha = next(iter(alphas.values()))
            resized[adapter] = {
                "r": self.rank,
                "rank_pattern": {},
                "lora_alpha": alpha,
                "alpha_pattern": {} if set(alphas.values()) == {alpha} else alphas,
                # The factors are loaded, so their initialisation does not matter, and some initialisations demand a
                # rank.
                "init_lora_weights": bool(config.init_lora_weights),
            }
        return dict(sorted(resized.items()))


def product_mean(
    averager: WeightAverager, readout: str | Readout | None = None, *, rank: int | None = None
) -> ProductMean:
    """The exact mean of the LoRA updates of the members that a rule keeps (collective).

    Members are gathered to rank 0 one at a time, and only their factors are kept. The mean of k updates of rank r
    has rank k * r at most; the new factors are the best of their rank (Eckart and Young 1936), balanced: with
    ``mean(B A) = U S V^T``, ``B' = U sqrt(S)`` and ``A' = sqrt(S) V^T``. At its own rank, a layer that trains only
    one of its factors keeps both averaged factors, and a layer whose members are all equal keeps theirs: both are
    exact.

    Args:
        averager: of a `PeftModel` with LoRA; every trained adapter is averaged.
        readout: which average, as for `averager.swapped_in`. Its rule must keep members whole, as `LAWA` does.
            A blend is exact, too: the last update is one more member, with coefficient ``1 - blend``.
        rank: of the new factors, at least 1; None: each layer's own. At k * r nothing is lost.

    Raises:
        AveragingError: the rule keeps no members; the model has no LoRA; an update is not ``scaling * B @ A`` (DoRA
            and other variants, grouped convolutions, expert stacks), or is untested (quantised layers).
    """
    if rank is not None and (isinstance(rank, bool) or not isinstance(rank, int) or rank < 1):
        raise AveragingError(f"rank is {rank!r}, expected a whole number of at least 1, or None")
    engine = averager.engine
    layers = lora_layers.find_layers(engine)
    chosen = averager.chosen(readout)
    average = averager.shard_together(chosen)
    shards = averager.lane_shards(chosen)
    _refuse_mixtures(averager.plan(chosen.rule), averager.count(chosen.rule), chosen)
    members = _gather_members(engine, layers, ((c, gather_trained(engine, s)) for c, s in shards))
    trained = gather_trained(engine, average)
    averaged: dict[str, tuple[tuple[Tensor, Tensor], Norms]] = {}
    with engine.ranks.together("the mean of the LoRA updates cannot be computed", patiently=True):
        if engine.ranks.is_main:
            averaged = {
                layer.name: _average(layer, members[layer.name], trained, rank)
                for layer in layers
                if layer.trained
            }
    norms: dict[str, Norms] = engine.ranks.gather({each: norms for each, (_, norms) in averaged.items()})[0]
    factors = {each: of_layer for each, (of_layer, _) in averaged.items()}
    weights = dict(trained)
    for layer in layers:
        if layer.name in factors:
            weights[layer.up], weights[layer.down] = factors[layer.name]
    return ProductMean(
        num_members=len(shards) if chosen.blend == 1 else len(shards) - 1,  # without the last update
        rank=rank,
        gap=Distance.between(norms, layers, "gap"),
        truncation=Distance.between(norms, layers, "lost"),
        factors=factors,
        _engine=engine,
        _layers=layers,
        _weights=weights,
        _members=members,
    )


def save_merged(
    averager: WeightAverager, path: str | PathLike[str], readout: str | Readout | None = None
) -> None:
    """Write the base model with the mean of the factors in its weights, ``W + s mean(B) mean(A)`` (collective).

    The cheap mean, available for every rule; otherwise as :meth:`ProductMean.save_merged`. Arguments as for
    `averager.save_pretrained`.

    Raises:
        AveragingError: for the same models as :func:`product_mean`, or the folder already holds files.
    """
    engine = averager.engine
    layers = lora_layers.find_layers(engine)
    export.refuse_occupied(engine, path)
    trained = gather_trained(engine, averager.shard_together(averager.chosen(readout)))
    _save_merged(engine, path, layers, trained, _gather_members(engine, layers, [(1.0, trained)]))


def _refuse_mixtures(plan: Plan, num_members: int, chosen: Readout) -> None:
    """Refuse an average made of lanes in which members are already mixed."""
    whole: set[int] = set()
    for n in range(num_members):
        for update in plan.updates(n):
            copies = update.weight == 1.0 and (update.source is None or update.source in whole)
            (whole.add if copies else whole.discard)(update.lane)
    if not whole.issuperset(plan.readout(num_members, chosen)):
        raise AveragingError(
            f"the average {chosen.rule!r} is made of running means, in which the members' products are "
            "lost; expected a rule that keeps members whole, such as LAWA(last=4). The mean of the factors is "
            "available: averager.save_pretrained, swaft.averaging.lora.save_merged"
        )


def _gather_members(
    engine: Engine, layers: list[LoraLayer], wholes: Iterable[tuple[float, dict[str, Tensor]]]
) -> dict[str, Members]:
    """The factors of every member by ``layer:adapter`` on rank 0 (collective; {} elsewhere).

    ``wholes`` are one pair (coefficient, trained tensors whole on rank 0) per member, gathered one at a time.
    """
    factors = {name for layer in layers for name in (layer.up, layer.down)}
    frozen = export.add_frozen(engine, {}, names=factors - engine.trainable.keys())
    members: dict[str, Members] = {}
    for coefficient, trained in wholes:
        if engine.ranks.is_main:
            weights = frozen | trained
            for layer in layers:
                member = (coefficient, weights[layer.up], weights[layer.down])
                members.setdefault(layer.name, []).append(member)
    return members


def _average(
    layer: LoraLayer, members: Members, trained: dict[str, Tensor], rank: int | None
) -> tuple[tuple[Tensor, Tensor], Norms]:
    """The new factors of a layer, and its norms."""
    new_rank = rank or layer.rank
    up, down, norms = refactor(members, new_rank)
    _, first_up, first_down = members[0]
    if new_rank == layer.rank:
        exact = norms._replace(lost=0.0)
        if all(torch.equal(b, first_up) and torch.equal(a, first_down) for _, b, a in members):
            return (first_up, first_down), exact
        if not {layer.up, layer.down} <= trained.keys():  # the frozen one is the same in every member
            return (trained.get(layer.up, first_up), trained.get(layer.down, first_down)), exact
    return (up, down), norms


@torch.no_grad()
def refactor(members: Members, rank: int) -> tuple[Tensor, Tensor, Norms]:
    """The best factors of a given rank for ``sum_i c_i B_i A_i``, and the loss, without forming the product.

    Args:
        members: (c_i, B_i, A_i), the coefficients summing to 1: (out, r, 1, ...) and (r, in, ...), fp32.
        rank: of the new factors; if the product has a lower rank, they are padded with zeros.

    Returns:
        B' (out, rank, 1, ...) and A' (rank, in, ...), fp32, and the norms.
    """
    coefficients = [coefficient for coefficient, _, _ in members]
    left = _mean_and_deviations(coefficients, [b.double().flatten(1) for _, b, _ in members])
    right = _mean_and_deviations(coefficients, [a.double().flatten(1).T for _, _, a in members])
    left_basis, left_core = torch.linalg.qr(left)
    right_basis, right_core = torch.linalg.qr(right)
    _, b, a = members[0]
    r = b.shape[1]
    weights = torch.tensor(coefficients, dtype=torch.float64, device="cpu").repeat_interleave(r)
    covariance = (left_core[:, r:] * weights) @ right_core[:, r:].T
    core = left_core[:, :r] @ right_core[:, :r].T + covariance
    u, s, vh = torch.linalg.svd(core, full_matrices=False)
    up = torch.zeros(b.shape[0], rank, *b.shape[2:], dtype=torch.float32, device="cpu")
    down = torch.zeros(rank, *a.shape[1:], dtype=torch.float32, device="cpu")
    kept = min(rank, len(s))
    root = s[:kept].sqrt()
    up[:, :kept] = (left_basis @ u[:, :kept] * root).reshape(up[:, :kept].shape)
    down[:kept] = (root[:, None] * (vh[:kept] @ right_basis.T)).reshape(down[:kept].shape)
    return up, down, Norms(float(s.norm()), float(covariance.norm()), float(s[kept:].norm()))


def _mean_and_deviations(coefficients: list[float], factors: list[Tensor]) -> Tensor:
    """(n, r) matrices as one (n, (k + 1) r): their mean, then each minus the mean; exactly 0 if all are equal."""
    first = factors[0]
    mean = first + sum(c * (each - first) for c, each in zip(coefficients, factors, strict=True))
    return torch.cat([mean, *(each - mean for each in factors)], dim=1)


def _ratio(difference: float, whole: float) -> float:
    if difference == 0.0:
        return 0.0
    return difference / whole if whole else math.inf


def _save_merged(
    engine: Engine,
    path: str | PathLike[str],
    layers: list[LoraLayer],
    trained: dict[str, Tensor],
    members: dict[str, Members],
) -> None:
    base: Any = engine.module.get_base_model()  # type: ignore[operator]
    if getattr(base, "hf_quantizer", None) is not None:
        raise AveragingError(
            "the base model is quantised, and an update added to its weights would be rounded away; "
            "expected an adapter folder"
        )
    for layer in layers:
        bias = f"{PREFIX}{layer.path}.lora_B.{layer.adapter}.bias"
        base_bias = f"{PREFIX}{layer.path}.base_layer.bias"
        if layer.active and bias in engine.state_names and base_bias not in engine.state_names:
            raise AveragingError(
                f"adapter {layer.adapter!r} trains a bias of {layer.path!r} (lora_bias=True), which has none to "
                "merge it into; expected an adapter folder"
            )
    export.refuse_occupied(engine, path)
    state_dict = export.add_frozen(engine, trained)

    def write(folder: Path) -> None:
        folded = fold_parametrizations(engine.module, state_dict, derive=True)
        merged = lora_layers.base_state_dict(
            engine.module, folded | lora_layers.merged_weights(layers, members, folded)
        )
        tied = getattr(base, "all_tied_weights_keys", None) or {}
        pairs = [(merged[one], merged[other]) for one, other in tied.items() if {one, other} <= merged.keys()]
        untied = not all(torch.equal(one, other) for one, other in pairs)
        export.write_model(base, folder, merged)
        if untied:  # only one of two tied weights was adapted, so they now differ
            export.edit_json(folder / "config.json", tie_word_embeddings=False)

    export.write_folder(engine, path, write)

"""What a model holds besides its trained weights: tensors derived from them, and statistics of its inputs.

An average of weights has neither. What a parametrization derives from its weight (a spectral norm's singular
vectors) is recomputed from the averaged weight. Running statistics (BatchNorm) need a pass over training rows with
the averaged weights in place, as in `torch.optim.swa_utils.update_bn`.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import count as numbers_from
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.modules.instancenorm import _InstanceNorm

from swaft.averaging.layout import clean_name
from swaft.averaging.rules import Readout
from swaft.errors import AveragingError

if TYPE_CHECKING:
    from swaft.averaging.engines import Engine

logger = logging.getLogger(__name__)

MOST_PASSES = 1000
"""Maximum passes of a parametrization over one weight."""
SETTLED = 1e-10
"""A parametrization has settled once its output changes by less than this, relatively, from pass to pass."""

Steps = list[tuple[str, nn.Module]]
"""The parametrizations of one tensor, in order, each with the prefix of its names."""


def persistent_buffers(module: nn.Module, *, aliases: bool = False) -> Iterator[tuple[str, Tensor]]:
    """The buffers in a module's state dict, by name; with ``aliases``, those of shared parts under each name."""
    for prefix, part in module.named_modules(remove_duplicate=not aliases):
        for name, buffer in part.named_buffers(recurse=False):
            if name not in part._non_persistent_buffers_set:
                yield f"{prefix}.{name}" if prefix else name, buffer


def changing_buffers(module: nn.Module) -> dict[str, Tensor]:
    """The buffers that training may change, by clean name: those in the state dict that are floating-point or hold
    a single number. This excludes masks and quantised weights.
    """
    return {
        clean_name(name): buffer
        for name, buffer in persistent_buffers(module)
        if buffer.is_floating_point() or buffer.numel() == 1
    }


def parametrized(module: nn.Module) -> Iterator[tuple[str, str, Steps]]:
    """Every parametrized tensor: its clean name, the prefix of its originals' names, its parametrizations."""
    for raw_prefix, part in module.named_modules():
        # Read directly: peft's wrappers forward attributes to what they wrap.
        held: Any = part._modules.get("parametrizations")
        if isinstance(held, nn.ModuleDict):
            prefix = f"{clean_name(raw_prefix)}." if raw_prefix else ""
            for name, steps in held.items():
                inside = f"{prefix}parametrizations.{name}."
                yield f"{prefix}{name}", inside, [(f"{inside}{i}.", step) for i, step in enumerate(steps)]  # type: ignore[arg-type]


@torch.no_grad()
def fold_parametrizations(
    module: nn.Module, state_dict: Mapping[str, Tensor], *, derive: bool
) -> dict[str, Tensor]:
    """A state dict in which every parametrized tensor is the plain tensor that evaluation mode computes.

    `X.parametrizations.weight.original` and the parametrization's own tensors become `X.weight`. Exceptions are
    parametrizations that transformers creates in every model of the class and expects in its folder.

    Args:
        module: the model with its parametrizations.
        state_dict: whole tensors in host memory, by clean name; of a parametrization, all or none.
        derive: whether to recompute what parametrizations derive from weights, from those in the state dict.
    """
    folded, own = dict(state_dict), _own_parametrizations(module)
    for name, inside, steps in parametrized(module):
        if inside not in own and any(key.startswith(f"{inside}original") for key in folded):
            *_, (_, value) = _evaluated(inside, steps, folded, derive=derive)
            folded = {key: tensor for key, tensor in folded.items() if not key.startswith(inside)}
            folded[name] = value
    return folded


def _own_parametrizations(module: nn.Module) -> set[str]:
    """Name prefixes of tensors that are parametrized in any new transformers model of this class (Wav2Vec2)."""
    model: Any = module.get_base_model() if hasattr(module, "get_base_model") else module  # type: ignore[operator]
    if not hasattr(type(model), "config_class") or next(parametrized(model), None) is None:
        return set()
    prefix = "" if model is module else "base_model.model."
    with suppress(TypeError), torch.device("meta"):  # a user's class may need more than a configuration
        return {f"{prefix}{inside}" for _, inside, _ in parametrized(type(model)(model.config))}
    return set()


@torch.no_grad()
def derive_buffers(engine: Engine) -> None:
    """Recompute the buffers of parametrizations from the weights that forwards see now (collective)."""
    parameters = dict(engine.named_parameters(aliases=True))
    for _, inside, steps in parametrized(engine.module):
        live = {f"{prefix}{key}": b for prefix, step in steps for key, b in step.named_buffers()}
        if live:
            names = sorted(key for key in parameters if key.startswith(inside))
            whole = {key: engine.gather_working(parameters[key]).cpu() for key in names}
            evaluated = _evaluated(inside, steps, whole | live, derive=True)
            for (prefix, _), (copied, _) in zip(steps, evaluated, strict=True):
                for key, derived in copied.named_buffers():
                    live[f"{prefix}{key}"].copy_(derived)


def _evaluated(
    inside: str, steps: Steps, tensors: Mapping[str, Tensor], *, derive: bool
) -> Iterator[tuple[nn.Module, Tensor]]:
    """Each parametrization of a tensor, as a host copy that holds the given tensors, and its output."""
    values = [tensors[key] for key in sorted(tensors) if key.startswith(f"{inside}original")]
    for prefix, step in steps:
        copied = copy_with(step, prefix, tensors)
        if derive:
            _settle(copied, values)
        values = [copied(*values)]
        yield copied, values[0]


def copy_with(module: nn.Module, prefix: str, tensors: Mapping[str, Tensor]) -> nn.Module:
    """A host copy of a submodule, in evaluation mode, with the given tensors in place of its own."""
    # The copy's tensors are put into deepcopy's memo: under some engines the model's own tensors are empty.
    memo: dict[int, Any] = {}
    for key, held in (*module.named_parameters(), *module.named_buffers()):
        mine = tensors.get(prefix + key, held).detach().cpu().clone()
        memo[id(held)] = nn.Parameter(mine) if isinstance(held, nn.Parameter) else mine
    copied = copy.deepcopy(module, memo)
    for part in copied.modules():  # ZeRO-3's hooks count passes on all ranks, but here one rank runs alone
        part._forward_pre_hooks.clear()
        part._forward_hooks.clear()
    return copied.eval()


def _settle(step: nn.Module, tensors: Sequence[Tensor]) -> None:
    """Run weights through a parametrization in training mode, where it updates its buffers, until its output has
    settled; in float64. A parametrization without buffers is left alone.
    """
    if next(step.buffers(), None) is None:
        return
    held = [(tensor, tensor.dtype) for tensor in (*step.parameters(), *step.buffers())]
    for tensor, dtype in held:
        tensor.data = tensor.data.to(torch.float64 if dtype.is_floating_point else dtype)
    step.train()
    wide = [tensor.double() for tensor in tensors]
    with torch.random.fork_rng(devices=[]):
        last = step(*wide)
        for _ in range(MOST_PASSES):
            given = step(*wide)
            if float((given - last).norm()) <= SETTLED * float(given.norm()):
                break
            last = given
    step.eval()
    for tensor, dtype in held:
        tensor.data = tensor.data.to(dtype)


def running_statistics(module: nn.Module) -> dict[str, Any]:
    """The layers that keep running statistics of their inputs (BatchNorm and its relatives), by clean name."""
    return {
        clean_name(name): part
        for name, part in module.named_modules()
        if getattr(part, "running_mean", None) is not None
        and hasattr(part, "reset_running_stats")
        and hasattr(part, "momentum")
    }


class Statistics:
    """The buffers that belong to averages, and the warnings about buffers that belong to none.

    Args:
        engine: provides the model; running statistics in it cause a warning at once.
    """

    def __init__(self, engine: Engine):
        self._engine = engine
        self._kept: dict[Readout, tuple[range, dict[str, Tensor]]] = {}
        layers = running_statistics(engine.module)
        if layers:
            self._warn(
                "%d layers keep running statistics (%s, ...), which belong to the last weights and not to an "
                "average: give averager.update_bn(loader) training rows before an average is evaluated or exported",
                *(len(layers), next(iter(layers))),
            )
        self._known = tuple(f"{name}." if name else name for name in layers)
        self._sums = self._sum()

    def keep(self, average: Readout, members: range, buffers: dict[str, Tensor]) -> None:
        """Use these buffers with an average, as given by `Plan.resolved`, while it has these members."""
        self._kept[average] = (members, buffers)

    def of(self, average: Readout, members: range) -> dict[str, Tensor]:
        """The buffers that go with an average; {} if the model's own must serve, which is logged."""
        now = self._sum() if self._sums else {}
        changed = [name for name, value in now.items() if self._sums.get(name, value) != value]
        if changed:
            self._sums = {}  # warn only once
            self._warn(
                "training has changed buffers, which are not averaged (%s): averaged weights are evaluated and "
                "exported together with the last ones",
                ", ".join(changed[:3]) + (", ..." if len(changed) > 3 else ""),
            )
        others = [each for each in self._kept if each.rule == average.rule]
        if average in self._kept:
            had, buffers = self._kept[average]
            if had == members:
                return buffers
            self._warn(
                "this average has taken in members since its running statistics were computed, so the last ones "
                "are taken; call averager.update_bn(loader) again",
            )
        elif others and average.blend != 0:
            self._warn(
                "the running statistics are those of %s, and not of %s, so the last ones are taken; call "
                "averager.update_bn(loader, readout) for this one too",
                *(others[-1], average),
            )
        return {}

    def _warn(self, message: str, *values: object) -> None:
        if self._engine.ranks.is_main:
            logger.warning(message, *values)

    def _sum(self) -> dict[str, str]:
        """Sums of all other buffers, as text, so that NaN equals itself."""
        return {
            name: str(float(buffer.sum(dtype=torch.float64)))
            for name, buffer in changing_buffers(self._engine.module).items()
            if buffer.is_floating_point()
            and "parametrizations." not in name
            and not name.startswith(self._known)
        }


@torch.no_grad()
def recompute_statistics(
    engine: Engine, batches: Iterable[Any], forward: Callable[[Any], Any] | None
) -> dict[str, Tensor]:
    """The running statistics of the weights that forwards see now, over batches of all ranks (collective).

    As in `torch.optim.swa_utils.update_bn`, the model is in training mode, and a layer's statistics are the plain
    means of those of all batches; each rank has its own batches. Modes and random state are restored; the
    statistics stay in the model.

    Args:
        engine: provides the model.
        batches: this rank's batches, as many as on every other rank.
        forward: called with each batch. None: a mapping is passed as keyword arguments, and of a list or tuple the
            first element.

    Returns:
        clean name to buffer, host: the new values.

    Raises:
        AveragingError: there is no batch, or not the same number on every rank; raised on every rank.
    """
    layers = running_statistics(engine.module)
    if not layers:
        return {}
    modes = [(part, part.training) for part in engine.module.modules()]
    momenta = [(layer, layer.momentum) for layer in layers.values()]
    devices = [engine.device] if engine.device.type != "cpu" else []
    with torch.random.fork_rng(devices, device_type=devices[0].type if devices else "cuda"):
        try:
            engine.module.train()
            for layer in layers.values():
                layer.reset_running_stats()
                layer.momentum = None  # a plain mean
            for number, batch in enumerate(_together(engine, batches), start=1):
                for layer in layers.values():
                    if isinstance(layer, _InstanceNorm):  # treats None as 0
                        layer.momentum = 1 / number
                if forward is not None:
                    forward(batch)
                elif isinstance(batch, Mapping):
                    engine.outer(**batch)
                else:
                    engine.outer(batch[0] if isinstance(batch, list | tuple) else batch)
        finally:
            for layer, momentum in momenta:
                layer.momentum = momentum
            for part, was_training in modes:
                part.training = was_training
    found, world_size = {}, engine.ranks.world_size
    for name, layer in layers.items():
        for key in ("running_mean", "running_var"):
            buffer = getattr(layer, key)
            sums = engine.ranks.sum(buffer.double().flatten().tolist())
            mean = torch.tensor(sums, dtype=torch.float32, device="cpu") / world_size
            buffer.copy_(mean.view(buffer.shape))
            found[f"{name}.{key}" if name else key] = buffer.cpu().clone()
    return found


def _together(engine: Engine, batches: Iterable[Any]) -> Iterator[Any]:
    """This rank's batches, as long as every rank has one (collective): one alone would hang in a forward."""
    remaining = iter(batches)
    for number in numbers_from(1):
        held = list(islice(remaining, 1))
        having = int(engine.ranks.sum([len(held)])[0])
        if having == 0 and number > 1:
            return
        if having < engine.ranks.world_size:
            raise AveragingError(
                f"{having} of {engine.ranks.world_size} ranks have a batch number {number} for the running "
                "statistics; expected the same number of batches on every rank, at least 1: a loader as "
                "`accelerator.prepare` returned it"
            )
        yield from held

"""A Hugging Face folder from weights that live in shards: gathered to rank 0 in bounded pieces, written once."""

from __future__ import annotations

import copy
import json
import os
import shutil
from os import PathLike
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.utils import parametrize

from swaft.averaging.engines import Engine
from swaft.errors import AveragingError

PIECE = 1 << 24
"""Elements sent to rank 0 in one message: 64 MiB in fp32."""


def save_pretrained(engine: Engine, path: str | PathLike[str], *, shard: Tensor | None = None) -> None:
    """Write a model folder that `AutoModel.from_pretrained` opens, in fp32 (collective; rank 0 writes).

    A module that is no Hugging Face model leaves a folder with `model.safetensors` alone.

    Trained weights come from the shard, frozen ones and buffers from the model; tied names are written as the
    model ties them, and a parametrized weight (a spectral norm, say) as the plain weight it evaluates to.

    Args:
        engine: whose model.
        path: folder to write. It must not exist, or be empty.
        shard: (engine.numel,), fp32, host: this rank's elements. Default: the masters, that is the last
            weights as the optimizer holds them.

    Raises:
        AveragingError: the folder holds files already, or could not be written; on every rank.
    """
    destination = Path(path)
    engine.ranks.raise_together(_occupied(destination) if engine.ranks.is_main else None)
    state_dict = gather_state_dict(engine, engine.live_shard() if shard is None else shard)
    error = None
    if engine.ranks.is_main:
        try:
            _write(engine, destination, fold_parametrizations(engine.module, state_dict))
        except Exception as cause:  # whatever it is, the other ranks wait to hear of it
            error = AveragingError(f"{destination} could not be written: {type(cause).__name__}: {cause}")
    engine.ranks.raise_together(error)


def _occupied(destination: Path) -> AveragingError | None:
    if destination.exists() and not (destination.is_dir() and not any(destination.iterdir())):
        return AveragingError(f"{destination} holds files already; expected a new folder: name another path")
    return None


def gather_state_dict(engine: Engine, shard: Tensor) -> dict[str, Tensor]:
    """The whole model on rank 0's host, trained parameters from shards, in fp32 (collective; {} elsewhere)."""
    trained = _gather_trained(engine, shard)
    frozen = {
        name: engine.gather_frozen(parameter)
        for name, parameter in engine.module.named_parameters()
        if name not in engine.trainable
    }
    if not engine.ranks.is_main:
        return {}
    weights = trained | {name: _host(tensor) for name, tensor in frozen.items()}
    canonical = {id(p): name for name, p in engine.module.named_parameters()}
    aliases = {name: canonical[id(p)] for name, p in engine.module.named_parameters(remove_duplicate=False)}
    buffers = dict(engine.module.named_buffers(remove_duplicate=False))
    return {
        name: weights[aliases[name]] if name in aliases else _host(buffers[name])
        for name in engine.state_names
        if name in aliases or name in buffers
    }


@torch.no_grad()
def fold_parametrizations(module: nn.Module, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state dict in which every parametrized tensor is the plain tensor that evaluation mode computes.

    `X.parametrizations.weight.original` and the parametrization's own buffers become `X.weight`.

    Args:
        module: the model with its parametrizations.
        state_dict: whole tensors in host memory, keyed as `module.state_dict()`.
    """
    folded = dict(state_dict)
    for prefix, submodule in module.named_modules():
        if not parametrize.is_parametrized(submodule):
            continue
        for name, steps in submodule.parametrizations.items():  # type: ignore[union-attr, operator]
            inside = f"{prefix}.parametrizations.{name}." if prefix else f"parametrizations.{name}."
            tensors = [folded[key] for key in sorted(folded) if key.startswith(inside + "original")]
            for step in steps:
                tensors = [copy.deepcopy(step).cpu().eval()(*tensors)]
            folded = {key: value for key, value in folded.items() if not key.startswith(inside)}
            folded[f"{prefix}.{name}" if prefix else name] = tensors[0]
    return folded


def _gather_trained(engine: Engine, shard: Tensor) -> dict[str, Tensor]:
    ranks = engine.ranks
    everyone = engine.fragments_by_rank()
    if not ranks.is_main:
        for piece in shard.split(PIECE):
            ranks.send(piece, to=0)
        return {}
    weights = {
        name: torch.empty(engine.full_shape(parameter), dtype=torch.float32)
        for name, parameter in engine.trainable.items()
    }
    flat = {name: weight.view(-1) for name, weight in weights.items()}
    for rank, fragments in enumerate(everyone):
        received = shard if rank == 0 else torch.empty(sum(f.numel for f in fragments))
        for piece in received.split(PIECE) if rank else ():
            ranks.receive(piece, source=rank)
        parts = received.split([f.numel for f in fragments])
        for fragment, values in zip(fragments, parts, strict=True):
            flat[fragment.name][fragment.start : fragment.end] = values
    return weights


def _host(tensor: Tensor) -> Tensor:
    tensor = tensor.detach().cpu()
    return tensor.float() if tensor.is_floating_point() else tensor


def _write(engine: Engine, destination: Path, state_dict: dict[str, Tensor]) -> None:
    # Written beside the destination and renamed, so that a folder of this name is always a whole one.
    unfinished = destination.with_name(destination.name + ".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    if hasattr(engine.module, "save_pretrained"):
        engine.module.save_pretrained(unfinished, state_dict=state_dict)  # type: ignore[operator]
    else:
        unfinished.mkdir(parents=True)
        whole = {name: tensor.clone() for name, tensor in state_dict.items()}  # safetensors holds no aliases
        save_file(whole, unfinished / "model.safetensors")
    config_file = unfinished / "config.json"
    if config_file.exists():
        # transformers writes the dtype the model trains in, and would load these fp32 weights rounded to it.
        config = json.loads(config_file.read_text())
        config["dtype"] = "float32"
        config_file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    if destination.exists():
        destination.rmdir()
    os.replace(unfinished, destination)

"""A Hugging Face folder from weights that live in shards: gathered to rank 0 in bounded pieces, written once.

A model wrapped by peft leaves a peft adapter folder, and of its frozen base nothing is gathered but what peft
itself would save.
"""

from __future__ import annotations

import copy
import json
import os
import shutil
from collections.abc import Callable, Collection
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.utils import parametrize

from swaft.averaging.adapters import AdapterFolder, is_peft
from swaft.averaging.engines import Engine
from swaft.averaging.engines.base import clean_name
from swaft.errors import AveragingError

PIECE = 1 << 24
"""Elements sent from rank to rank in one message: 64 MiB in fp32."""


def save_pretrained(engine: Engine, path: str | PathLike[str], *, shard: Tensor | None = None) -> None:
    """Write a model folder that `AutoModel.from_pretrained` opens, in fp32 (collective; rank 0 writes).

    A `PeftModel` leaves an adapter folder for `PeftModel.from_pretrained` instead, `modules_to_save` included. A
    module that is no Hugging Face model leaves a folder with `model.safetensors` alone.

    Trained weights come from the shard, frozen ones and buffers from the model; tied names are written as the
    model ties them, and a parametrized weight (a spectral norm, say) as the plain weight it evaluates to.

    Args:
        engine: whose model.
        path: folder to write. It must not exist, or be empty.
        shard: (engine.numel,), fp32, host: this rank's elements. Default: the masters, that is the last
            weights as the optimizer holds them.

    Raises:
        AveragingError: the folder holds files already or could not be written, or the model is of a peft method
            whose weights peft reads from the live model; on every rank.
    """
    refuse_occupied(engine, path)
    save_trained(engine, path, gather_trained(engine, engine.live_shard() if shard is None else shard))


def save_trained(
    engine: Engine,
    path: str | PathLike[str],
    trained: dict[str, Tensor],
    *,
    finish: Callable[[Path], None] | None = None,
) -> None:
    """As :func:`save_pretrained`, from trained tensors that are whole on rank 0 already (collective).

    Args:
        engine: whose model.
        path: folder to write; :func:`refuse_occupied` has been asked.
        trained: as :func:`gather_trained` gives them.
        finish: called on rank 0 with the written folder, before it gets its name.
    """
    adapters, names = _adapter_folder(engine) if is_peft(engine.module) else (None, None)
    state_dict = add_frozen(engine, trained, names=names)

    def write(folder: Path) -> None:
        folded = fold_parametrizations(engine.module, state_dict)
        if adapters is None:
            write_model(engine.module, folder, folded)
        else:
            adapters.write(folder, folded)
        if finish is not None:
            finish(folder)

    write_folder(engine, path, write)


def refuse_occupied(engine: Engine, path: str | PathLike[str]) -> None:
    """Refuse a path where something is, before anything is gathered for it (collective).

    Raises:
        AveragingError: it is a file, or a folder that is not empty; on every rank.
    """
    destination, error = Path(path), None
    if engine.ranks.is_main and destination.exists() and not _is_empty_folder(destination):
        error = AveragingError(f"{destination} holds files already; expected a new folder: name another path")
    engine.ranks.raise_together(error)


def write_folder(engine: Engine, path: str | PathLike[str], write: Callable[[Path], None]) -> None:
    """Let rank 0 write a folder, so that a folder of this name is always a whole one (collective).

    Args:
        engine: whose ranks.
        path: folder to write; :func:`refuse_occupied` has been asked.
        write: called on rank 0 with a path beside `path`, which is renamed once all is written.

    Raises:
        AveragingError: it could not be written; on every rank.
    """
    destination, error = Path(path), None
    if engine.ranks.is_main:
        try:
            unfinished = destination.with_name(destination.name + ".unfinished")
            shutil.rmtree(unfinished, ignore_errors=True)
            write(unfinished)
            if destination.exists():
                destination.rmdir()
            os.replace(unfinished, destination)
        except Exception as cause:  # whatever it is, the other ranks wait to hear of it
            error = AveragingError(f"{destination} could not be written: {type(cause).__name__}: {cause}")
    engine.ranks.raise_together(error)


def write_model(module: nn.Module, folder: Path, state_dict: dict[str, Tensor]) -> None:
    """Write a Hugging Face folder of fp32 weights, or `model.safetensors` alone for any other module."""
    if hasattr(module, "save_pretrained"):
        module.save_pretrained(folder, state_dict=state_dict)  # type: ignore[operator]
    else:
        folder.mkdir(parents=True)
        whole = {name: tensor.clone() for name, tensor in state_dict.items()}  # safetensors holds no aliases
        save_file(whole, folder / "model.safetensors")
    if (folder / "config.json").exists():
        # transformers writes the dtype the model trains in, and would load these fp32 weights rounded to it.
        edit_json(folder / "config.json", dtype="float32")


def edit_json(file: Path, **values: Any) -> None:
    """Set keys of a JSON object in a file."""
    content = json.loads(file.read_text()) | values
    file.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")


def gather_state_dict(engine: Engine, shard: Tensor) -> dict[str, Tensor]:
    """The whole model on rank 0's host, trained parameters from shards, in fp32 (collective; {} elsewhere)."""
    return add_frozen(engine, gather_trained(engine, shard))


def add_frozen(
    engine: Engine, trained: dict[str, Tensor], *, names: Collection[str] | None = None
) -> dict[str, Tensor]:
    """A state dict on rank 0's host from whole trained tensors and the model's own (collective; {} elsewhere).

    Args:
        engine: whose model.
        trained: whole tensors by parameter name, on rank 0; what is frozen in the model but named here is taken
            from here.
        names: of the tensors wanted, as in `engine.state_names`; the same on every rank. Default: all.

    Returns:
        clean name to tensor; floating-point ones in fp32.
    """
    canonical = {id(parameter): name for name, parameter in engine.named_parameters()}
    aliases = {name: canonical[id(parameter)] for name, parameter in engine.named_parameters(aliases=True)}
    buffers = {clean_name(n): b for n, b in engine.module.named_buffers(remove_duplicate=False)}
    wanted = [name for name in engine.state_names if names is None or name in names]
    sources = {aliases[name] for name in wanted if name in aliases}
    weights: dict[str, Tensor] = {}
    for name, parameter in engine.named_parameters():
        if name in sources and name not in engine.trainable:
            whole = engine.gather_frozen(parameter)
            if engine.ranks.is_main:
                weights[name] = _host(whole)
    if not engine.ranks.is_main:
        return {}
    weights |= trained
    return {
        name: weights[aliases[name]] if name in aliases else _host(buffers[name])
        for name in wanted
        if name in aliases or name in buffers
    }


@torch.no_grad()
def fold_parametrizations(module: nn.Module, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state dict in which every parametrized tensor is the plain tensor that evaluation mode computes.

    `X.parametrizations.weight.original` and the parametrization's own buffers become `X.weight`.

    Args:
        module: the model with its parametrizations.
        state_dict: whole tensors in host memory, by clean name; of a parametrization all or nothing.
    """
    folded = dict(state_dict)
    for raw_prefix, submodule in module.named_modules():
        prefix = clean_name(raw_prefix)
        if not parametrize.is_parametrized(submodule):
            continue
        for name, steps in submodule.parametrizations.items():  # type: ignore[union-attr, operator]
            inside = f"{prefix}.parametrizations.{name}." if prefix else f"parametrizations.{name}."
            tensors = [folded[key] for key in sorted(folded) if key.startswith(inside + "original")]
            if not tensors:
                continue
            for step in steps:
                tensors = [_without_hooks(copy.deepcopy(step)).cpu().eval()(*tensors)]
            folded = {key: value for key, value in folded.items() if not key.startswith(inside)}
            folded[f"{prefix}.{name}" if prefix else name] = tensors[0]
    return folded


def _without_hooks(module: nn.Module) -> nn.Module:
    """Take the hooks off a copy: those of ZeRO-3 count the passes of all ranks, and here rank 0 makes one alone."""
    for part in module.modules():
        part._forward_pre_hooks.clear()
        part._forward_hooks.clear()
    return module


def gather_trained(engine: Engine, shard: Tensor) -> dict[str, Tensor]:
    """Every trained parameter whole on rank 0's host, from shards (collective; {} elsewhere).

    Args:
        engine: whose layout.
        shard: (engine.numel,), fp32, host: this rank's elements.

    Returns:
        name to (parameter shape), fp32.
    """
    ranks = engine.ranks
    everyone = engine.fragments_by_rank()
    if not ranks.is_main:
        for piece in shard.split(PIECE):
            ranks.send(piece, to=0)
        return {}
    weights = {
        name: torch.empty(engine.full_shape(parameter), dtype=torch.float32, device="cpu")
        for name, parameter in engine.trainable.items()
    }
    flat = {name: weight.view(-1) for name, weight in weights.items()}
    for rank, fragments in enumerate(everyone):
        received = shard if rank == 0 else _fp32(sum(f.numel for f in fragments))
        for piece in received.split(PIECE) if rank else ():
            ranks.receive(piece, source=rank)
        parts = received.split([f.numel for f in fragments])
        for fragment, values in zip(fragments, parts, strict=True):
            flat[fragment.name][fragment.start : fragment.end] = values
    return weights


def scatter_trained(engine: Engine, weights: dict[str, Tensor]) -> Tensor:
    """This rank's shard of tensors that are whole on rank 0: :func:`gather_trained` backwards (collective).

    Args:
        engine: whose layout.
        weights: name to (parameter shape), fp32, host, on rank 0; not looked at elsewhere.

    Returns:
        (engine.numel,), fp32, host.
    """
    ranks = engine.ranks
    everyone = engine.fragments_by_rank()
    mine = _fp32(engine.numel)
    if not ranks.is_main:
        for piece in mine.split(PIECE):
            ranks.receive(piece, source=0)
        return mine
    for rank, fragments in enumerate(everyone):
        parts = [weights[f.name].reshape(-1)[f.start : f.end] for f in fragments]
        shard = torch.cat([mine[:0], *parts])
        if rank == 0:
            mine = shard
        else:
            for piece in shard.split(PIECE):
                ranks.send(piece, to=rank)
    return mine


def _is_empty_folder(path: Path) -> bool:
    return path.is_dir() and not any(path.iterdir())


def _host(tensor: Tensor) -> Tensor:
    tensor = tensor.detach().cpu()
    return tensor.float() if tensor.is_floating_point() else tensor


def _adapter_folder(engine: Engine) -> tuple[AdapterFolder | None, set[str]]:
    """The folder that peft would write, on rank 0, and on every rank the tensors that go into it (collective)."""
    folder, error = None, None
    if engine.ranks.is_main:  # it alone asks: peft may look on the hub whether the vocabulary was resized
        try:
            folder = AdapterFolder(engine.module)
        except AveragingError as refusal:
            error = refusal
        except Exception as cause:  # whatever it is, the other ranks wait to hear of it
            error = AveragingError(f"peft cannot tell what it would save: {type(cause).__name__}: {cause}")
    engine.ranks.raise_together(error)
    return folder, engine.ranks.gather(folder and folder.names)[0]


def _fp32(numel: int) -> Tensor:
    """Host memory for elements of a shard, whatever torch's defaults are."""
    return torch.empty(numel, dtype=torch.float32, device="cpu")

"""A Hugging Face folder from sharded weights: gathered to rank 0 in bounded pieces, written once.

A model wrapped by peft is written as a peft adapter folder; of its frozen base, only what peft itself would save is
gathered.
"""

from __future__ import annotations

import inspect
import json
import logging
import math
import os
from collections.abc import Callable, Collection, Mapping
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from swaft.averaging.adapters import AdapterFolder, how_to_open, is_peft
from swaft.averaging.buffers import fold_parametrizations
from swaft.averaging.engines import Engine
from swaft.averaging.engines.base import PIECE
from swaft.averaging.layout import clean_name
from swaft.averaging.shards import MEMORY, Scratch, beside_live, gather_trained, room_for
from swaft.errors import AveragingError
from swaft.storage import TensorFile
from swaft.storage.files import is_free, new_folder
from swaft.storage.model_card import write_card
from swaft.storage.tensor_file import dtype_of_weights, name_of

logger = logging.getLogger(__name__)

SHARD_SIZE = "5GB"
"""Default maximum size of one file of weights."""


def save_pretrained(
    engine: Engine,
    path: str | PathLike[str],
    *,
    shard: Tensor | None = None,
    statistics: Mapping[str, Tensor] | None = None,
    dtype: str | torch.dtype = torch.float32,
    max_shard_size: str | int = SHARD_SIZE,
    description: str = "the last weights of a training run",
) -> None:
    """Write a model folder that `AutoModel.from_pretrained` opens (collective; rank 0 writes).

    A `PeftModel` is written as an adapter folder for `PeftModel.from_pretrained` instead, including
    `modules_to_save`. A module that is not a Hugging Face model gives a folder with only `model.safetensors`. If it
    has a format of its own (SentenceTransformer), a warning says so: call `copy.deepcopy(model).save_pretrained`,
    and for an average do that inside `swapped_in()`.

    Trained weights come from the shard; frozen weights and buffers come from the model as training has it, also
    inside a swap. Tied names are written as the model ties them. A parametrized weight (spectral norm, say) is
    written as the plain weight it evaluates to; given a shard, whatever it derives from the weight is recomputed.
    The files are read back and compared before the folder gets its name. Rank 0 keeps whole weights in memory up to
    1 GiB; beyond that, in a file next to the folder.

    Args:
        engine: whose model.
        path: folder to write. It must not exist or must be empty.
        shard: (engine.numel,), fp32, host: this rank's elements. Default: the masters, i.e. the last weights as the
            optimizer holds them.
        statistics: buffers to use with the shard instead of the model's, by clean name.
        dtype: of the floating-point tensors in the folder: ``float32``, ``bfloat16`` or ``float16``, as a string or
            a torch dtype. The rounding loss of a 16-bit dtype is logged.
        max_shard_size: maximum size of one file, such as ``"5GB"``; for several files, transformers writes its own
            index.
        description: what the weights are, for the model card.

    Raises:
        AveragingError: the folder already holds files or could not be written, or the model uses a peft method
            whose weights peft reads from the live model; on every rank.
        ConfigError: any other dtype.
    """
    dtype = dtype_of_weights(dtype)
    refuse_occupied(engine, path)
    derive = shard is not None
    shard = engine.live_shard() if shard is None else shard
    if dtype != torch.float32:
        logger.info("%s: %s", path, rounded_away(engine, shard, dtype))
    adapters, names = adapter_folder(engine) if is_peft(engine.module) else (None, None)
    wanted = {**engine.trainable, **_frozen_sources(engine, names)}.values()
    elements = sum(engine.full_shape(each).numel() for each in wanted if each.is_floating_point())
    num_bytes = elements * (4 if dtype == torch.float32 else 4 + dtype.itemsize)
    make_room = partial(Scratch, Path(path).absolute().parent, num_bytes)
    room = _on_main(engine, make_room, f"{path} could not be written") or MEMORY
    trained = gather_trained(engine, shard, scratch=room)
    state_dict = add_frozen(engine, trained, names=names, scratch=room, statistics=statistics)

    def write(folder: Path) -> None:
        folded = _cast(fold_parametrizations(engine.module, state_dict, derive=derive), dtype, room)
        if adapters is not None:
            adapters.write(folder, folded)
        else:
            write_model(engine.module, folder, folded, dtype=dtype, max_shard_size=max_shard_size)
            if not getattr(engine.module, "_hf_peft_config_loaded", False):  # which saves its adapters alone
                left_out = getattr(engine.module, "_keys_to_ignore_on_save", None) or ()
                check_written(folder, {name: each for name, each in folded.items() if name not in left_out})
        describe(engine, folder, description, dtype)

    write_folder(engine, path, write)


def describe(engine: Engine, folder: Path, description: str, dtype: torch.dtype = torch.float32) -> None:
    """Write a folder's model card, also over peft's, which is only an unfilled template."""
    body = [f"This folder holds {description}, in {name_of(dtype)}, written by swaft."]
    if adapts := is_peft(engine.module):
        body += how_to_open(engine.module, folder)
    write_card(
        folder,
        title=folder.name,
        body=body,
        library="peft" if adapts else "transformers",
        base_model=getattr(getattr(engine.module, "config", None), "_name_or_path", None),
    )


def rounded_away(engine: Engine, shard: Tensor, dtype: torch.dtype) -> str:
    """What is lost by rounding this rank's elements (engine.numel,) to a narrower dtype, in words (collective)."""
    lost = distance = size = 0.0
    for last, piece in beside_live(engine, shard):
        lost += _squares(piece - piece.to(dtype).float())
        size += _squares(piece)
        distance += float((piece.double() - last.double()).square().sum())
    lost, distance, size = engine.ranks.sum([lost, distance, size])
    share = math.sqrt(lost / size) if size else 0.0
    words = f"rounding to {name_of(dtype)} takes away {share:.2g} of the weights"
    if distance:
        words += f", {math.sqrt(lost / distance):.2g} of their distance from the last weights"
    return words


def refuse_occupied(engine: Engine, path: str | PathLike[str]) -> None:
    """Refuse an occupied path before anything is gathered for it (collective).

    Raises:
        AveragingError: it is a file, a folder that is not empty, or a mount point; on every rank.
    """
    with engine.ranks.together():
        if engine.ranks.is_main and not is_free(Path(path)):
            raise AveragingError(f"{path} holds files already; expected a new folder: name another path")
        if engine.ranks.is_main and os.path.ismount(path):
            raise AveragingError(
                f"{path} is where a disk is mounted; expected a new folder: name one inside it"
            )


def write_folder(engine: Engine, path: str | PathLike[str], write: Callable[[Path], None]) -> None:
    """Let rank 0 write a folder, so that a folder of this name is always complete (collective).

    Args:
        engine: whose ranks.
        path: folder to write; :func:`refuse_occupied` has been called for it.
        write: called on rank 0 with an empty folder to write into.

    Raises:
        AveragingError: the folder could not be written; on every rank.
    """

    def write_new() -> None:
        with new_folder(Path(path)) as folder:
            write(folder)

    _on_main(engine, write_new, f"{path} could not be written")


def _on_main(engine: Engine, action: Callable[[], Any], fault: str) -> Any:
    """The result of an action on rank 0, None elsewhere; every rank raises its error, prefixed by `fault`."""
    result = error = None
    if engine.ranks.is_main:
        try:
            with engine.swap.lifted():  # transformers and peft ask the model for names
                result = action()
        except Exception as cause:  # whatever it is, the other ranks are waiting
            error = AveragingError(f"{fault}: {type(cause).__name__}: {cause}")
    engine.ranks.raise_together(error, patiently=True)
    return result


def write_model(
    module: nn.Module,
    folder: Path,
    state_dict: dict[str, Tensor],
    *,
    dtype: torch.dtype = torch.float32,
    max_shard_size: str | int = SHARD_SIZE,
) -> None:
    """Write a Hugging Face folder, or `model.safetensors` alone for any other module.

    Args:
        module: the model, which gives configuration and names.
        folder: to write.
        state_dict: whole tensors by name; floating-point ones in ``dtype``.
        dtype: written into the configuration.
        max_shard_size: maximum size of one file.
    """
    save = _saves_a_state_dict(module)
    if save is not None:
        # It removes what it has written from the dictionary.
        save(folder, state_dict=dict(state_dict), max_shard_size=max_shard_size)
    else:
        if hasattr(module, "save_pretrained"):
            logger.warning(
                "the save_pretrained of %s takes no state_dict, so the folder holds only model.safetensors, which "
                "may not open as one of its own; for that, call copy.deepcopy(model).save_pretrained(path), and "
                "for an average do that inside `with averager.swapped_in():`",
                type(module).__name__,
            )
        whole = {name: tensor.clone() for name, tensor in state_dict.items()}  # safetensors refuses aliases
        save_file(whole, folder / "model.safetensors")
    if (folder / "config.json").exists():
        # transformers writes the dtype the model trains in, and would load these weights rounded to it.
        edit_json(folder / "config.json", dtype=name_of(dtype))
        # It leaves out the two default labels of most model types, but BART's default is three.
        config: Any = module.config
        if getattr(type(config).from_pretrained(folder), "id2label", None) != config.id2label:
            edit_json(folder / "config.json", id2label=config.id2label, label2id=config.label2id)


def _saves_a_state_dict(module: nn.Module) -> Callable[..., Any] | None:
    """The method that writes a given state dict as a folder of a module; None if there is none."""
    save = getattr(module, "save_pretrained", None)
    taken = inspect.signature(save).parameters if callable(save) else {}
    if "state_dict" in taken:  # only transformers' takes it
        return save
    transformers = next((cls for cls in type(module).__mro__ if cls.__name__ == "PreTrainedModel"), None)
    if transformers is None:
        return None
    # A model's own method, around that of transformers. If it does not pass the state dict on, what is read back
    # differs, and is refused.
    passes_on = any(each.kind is each.VAR_KEYWORD for each in taken.values())
    return save if passes_on else partial(transformers.save_pretrained, module)  # type: ignore[attr-defined]


def check_written(folder: Path, state_dict: Mapping[str, Tensor]) -> None:
    """Read a folder's tensors back and compare them with what was to be written.

    If transformers writes tensors in another form than the model holds them (experts one by one, say), only their
    total number of elements and total sum of squares are compared.

    Args:
        folder: contains safetensors files.
        state_dict: every tensor that should have been written; of tied tensors, one name is enough.

    Raises:
        AveragingError: a tensor is missing, or its shape, dtype, bits or norm differ.
    """
    unseen = {tensor.data_ptr(): tensor for tensor in state_dict.values() if tensor.numel()}
    other_numel, other_squares = 0, 0.0
    for path in sorted(folder.glob("*.safetensors")):
        with TensorFile(path) as file:
            for name, spec in file.specs.items():
                numel = spec.numel
                cuts = [(first, min(first + PIECE, numel)) for first in range(0, numel, PIECE)]
                pieces = (file.read(name, first, last) for first, last in cuts)
                wanted = state_dict.get(name)
                if wanted is None:
                    other_numel += numel
                    other_squares += sum(map(_squares, pieces))
                    continue
                form, right = (spec.dtype, list(spec.shape)), (wanted.dtype, list(wanted.shape))
                if form != right:
                    raise AveragingError(f"{path}: {name!r} was read back as {form}, expected {right}")
                flat = wanted.reshape(-1)
                for (first, last), piece in zip(cuts, pieces, strict=True):
                    if not torch.equal(piece.view(torch.uint8), flat[first:last].view(torch.uint8)):
                        raise AveragingError(f"{path}: {name!r} was not read back as it was written")
                unseen.pop(wanted.data_ptr(), None)
    numel, squares = sum(each.numel() for each in unseen.values()), sum(map(_squares, unseen.values()))
    if numel != other_numel or not math.isclose(squares, other_squares, rel_tol=1e-9):
        names = [name for name, tensor in state_dict.items() if tensor.data_ptr() in unseen]
        raise AveragingError(
            f"{folder} lacks {', '.join(names[:3]) or 'nothing'}{', ...' if len(names) > 3 else ''}, and holds "
            f"{other_numel:,} elements under other names with a sum of squares of {other_squares:.9g}; expected "
            f"{numel:,} with {squares:.9g}"
        )


def _squares(tensor: Tensor) -> float:
    return sum(float(piece.double().square().sum()) for piece in tensor.reshape(-1).split(PIECE))


def _cast(state_dict: dict[str, Tensor], dtype: torch.dtype, room: Scratch) -> dict[str, Tensor]:
    """The state dict with its floating-point tensors cast; those that shared storage still do."""
    cast: dict[tuple[int, torch.Size], Tensor] = {}
    for tensor in state_dict.values():
        place = (tensor.data_ptr(), tensor.shape)
        if tensor.is_floating_point() and tensor.dtype != dtype and place not in cast:
            cast[place] = room.empty(tensor.shape, dtype).copy_(tensor)
    return {name: cast.get((tensor.data_ptr(), tensor.shape), tensor) for name, tensor in state_dict.items()}


def edit_json(file: Path, **values: Any) -> None:
    """Set keys of a JSON object in a file."""
    content = json.loads(file.read_text()) | values
    file.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")


def add_frozen(
    engine: Engine,
    trained: dict[str, Tensor],
    *,
    names: Collection[str] | None = None,
    scratch: Scratch = MEMORY,
    statistics: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """A state dict on rank 0's host, from whole trained tensors and the model's own (collective; {} elsewhere).

    Args:
        engine: whose model.
        trained: whole tensors by parameter name, on rank 0; these take precedence over the model's, even if frozen
            there.
        names: the tensors wanted, named as in `engine.state_names`; the same on every rank. Default: all.
        scratch: where the copies are kept.
        statistics: buffers to use instead of the model's, by clean name.

    Returns:
        clean name to tensor; floating-point ones in fp32.
    """
    aliases = engine.canonical_names()
    buffers = {clean_name(name): each for name, each in engine.module.named_buffers(remove_duplicate=False)}
    buffers |= {**engine.swap.buffers, **(statistics or {})}  # as training has them, also inside a swap
    wanted = [name for name in engine.state_names if names is None or name in names]
    frozen = _frozen_sources(engine, names)
    floating = {name: parameter for name, parameter in frozen.items() if parameter.is_floating_point()}
    weights = room_for(engine, floating, scratch)
    for name, parameter in frozen.items():
        whole = engine.gather_working(parameter)
        if engine.ranks.is_main:
            weights[name] = weights[name].copy_(whole) if name in weights else whole.cpu()
    if not engine.ranks.is_main:
        return {}
    weights |= trained
    return {
        name: weights[aliases[name]] if name in aliases else _host(buffers[name])
        for name in wanted
        if name in aliases or name in buffers
    }


def _frozen_sources(engine: Engine, names: Collection[str] | None) -> dict[str, nn.Parameter]:
    """The untrained parameters behind the tensors wanted (arguments as for :func:`add_frozen`), by first name."""
    aliases = engine.canonical_names()
    wanted = [name for name in engine.state_names if name in aliases and (names is None or name in names)]
    sources = {aliases[name] for name in wanted} - engine.trainable.keys()
    return {name: parameter for name, parameter in engine.named_parameters() if name in sources}


def _host(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    return MEMORY.empty(tensor.shape).copy_(tensor) if tensor.is_floating_point() else tensor.cpu()


def adapter_folder(engine: Engine) -> tuple[AdapterFolder | None, set[str]]:
    """The folder that peft would write (rank 0), and the names of its tensors (every rank; collective)."""
    # Only rank 0 asks: peft may query the hub to find out whether the vocabulary was resized.
    folder = _on_main(engine, lambda: AdapterFolder(engine.module), "no adapter folder can be written")
    return folder, engine.ranks.gather(folder and folder.names)[0]

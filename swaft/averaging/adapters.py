"""What peft makes of a model: LoRA layers, the names of the base model, and what an adapter folder holds."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from swaft.averaging.buffers import copy_with
from swaft.averaging.layout import clean_name
from swaft.errors import AveragingError

if TYPE_CHECKING:
    from swaft.averaging.engines import Engine

PROMPT = "prompt_embeddings"
"""What stands for a prompt among the names of tensors."""
PREFIX = "base_model.model."
"""What a name in a `PeftModel` has before the name in its base model."""


Members = list[tuple[float, Tensor, Tensor]]
"""(coefficient c, B, A) of every member of a mean: fp32, host, as peft shapes them."""


@dataclass(frozen=True)
class LoraLayer:
    """One adapter's update of one layer: ``scaling * B @ A``."""

    path: str
    """Name of the adapted module in the base model."""
    adapter: str
    """Name of the adapter."""
    up: str
    """Name of the parameter that holds B, in the `PeftModel`."""
    down: str
    """Name of the parameter that holds A, in the `PeftModel`."""
    rank: int
    """Columns of B and rows of A."""
    scaling: float
    """``alpha / r``, or ``alpha / sqrt(r)`` with rslora."""
    transposed: bool
    """Whether the base weight is stored as the transpose of B @ A: embeddings, and the Conv1D of GPT-2."""
    trained: bool
    """Whether the adapter is trained, so that there is something to average."""
    active: bool
    """Whether forwards use the adapter, so that a merged model holds it."""

    @property
    def name(self) -> str:
        """``layer:adapter``."""
        return f"{self.path}:{self.adapter}"


def is_peft(module: nn.Module) -> bool:
    """Whether peft wraps the model."""
    # Looked for by name, so that a run without peft never imports it.
    return any(cls.__name__ == "PeftModel" for cls in type(module).__mro__)


def folder_of(adapter: str, folder: Path) -> Path:
    """Where peft keeps an adapter inside a saved folder."""
    return folder if adapter == "default" else folder / adapter


def merged_layers(module: nn.Module) -> list[Any]:
    """The layers into whose weight adapters are merged."""
    return [part for part in module.modules() if getattr(part, "merged_adapters", None)]


def find_layers(engine: Engine) -> list[LoraLayer]:
    """Every LoRA update that is trained or active, in the order of the model.

    Raises:
        AveragingError: none is trained, or one is no plain product.
    """
    engine.check_trainable()
    if not is_peft(engine.module):
        raise AveragingError(
            f"the model is a {type(engine.module).__name__}, expected a PeftModel with LoRA: wrap it with "
            "peft.get_peft_model before the optimizer is built"
        )
    from peft.tuners.lora import Embedding
    from peft.tuners.trainable_tokens import TrainableTokensLayer
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = []
    for name, module in engine.module.named_modules():
        if not isinstance(module, BaseTunerLayer) or isinstance(module, TrainableTokensLayer):
            continue
        tuner: Any = module
        inside = clean_name(name)
        path = inside.removeprefix(PREFIX)
        _refuse_other_layer(path, tuner)
        embedding = isinstance(tuner, Embedding)
        stem, tail = ("lora_embedding_", "") if embedding else ("lora_", ".weight")
        for adapter in getattr(tuner, f"{stem}A"):
            up, down = (f"{inside}.{stem}{factor}.{adapter}{tail}" for factor in "BA")
            layer = LoraLayer(
                path=path,
                adapter=adapter,
                up=up,
                down=down,
                rank=tuner.r[adapter],
                scaling=tuner.scaling[adapter],
                transposed=embedding or getattr(tuner, "fan_in_fan_out", False),
                trained=bool({up, down} & engine.trainable.keys()),
                active=adapter in tuner.active_adapters,
            )
            variant = type(tuner.lora_variant.get(adapter)).__name__
            # MiCA freezes B and is plain LoRA otherwise.
            plain = variant in ("NoneType", "MiCALinearVariant", "MiCAEmbeddingVariant")
            if not plain and (layer.trained or layer.active):
                raise _not_plain(path, f"is of the variant {variant}")
            layers.append(layer)
    trained = {layer.adapter for layer in layers if layer.trained}
    if not trained:
        raise AveragingError("no LoRA factor is trained; expected a PeftModel with a trainable LoRA adapter")
    layers = [replace(layer, trained=layer.adapter in trained) for layer in layers]
    return [layer for layer in layers if layer.active or layer.trained]


def _refuse_other_layer(path: str, tuner: Any) -> None:
    """Refuse a layer whose updates are something else than ``scaling * B @ A``, or untried."""
    from peft.tuners.lora.layer import Conv1d, Conv2d, Conv3d, Embedding, Linear

    if type(tuner) not in (Linear, Embedding, Conv1d, Conv2d, Conv3d):
        raise _not_plain(path, f"is peft's {type(tuner).__module__}.{type(tuner).__name__}")
    if (groups := getattr(tuner.get_base_layer(), "groups", 1)) > 1:
        raise _not_plain(path, f"is a convolution in {groups} groups")
    if tuner.merged:
        merged = ", ".join(tuner.merged_adapters)
        raise _not_plain(path, f"has adapters merged into its weight ({merged}): unmerge them first")


def _not_plain(path: str, reason: str) -> AveragingError:
    return AveragingError(
        f"the layer {path!r} {reason}; expected plain LoRA, whose update is scaling * B @ A, on linear, embedding "
        "and convolution layers. The mean of the weights is available: averager.save_pretrained"
    )


def refuse_changed_base(adapter: str, beginning: bool | str) -> None:
    """Refuse an `init_lora_weights` that changes the base model, by its rank, whenever the adapter is loaded."""
    if isinstance(beginning, str) and beginning not in ("gaussian", "eva", "orthogonal", "mica"):
        raise AveragingError(
            f"adapter {adapter!r} has init_lora_weights={beginning!r}, which changes the base model by its rank "
            "whenever the adapter is loaded; expected product_mean(averager) without `rank`, or `save_merged`"
        )


def base_state_dict(module: nn.Module, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state dict of the base model, with its own names, from one of the `PeftModel` around it.

    `modules_to_save` and trained tokens of the active adapters are in it, LoRA factors are not.

    Args:
        module: the `PeftModel`.
        state_dict: whole tensors by clean name; a LoRA layer's `base_layer` is taken as it is.
    """
    from peft.tuners.lora import LoraLayer as Tuner
    from peft.utils.other import ModulesToSaveWrapper, TrainableTokensWrapper

    plain = dict(state_dict)
    for name, wrapper in reversed(list(module.named_modules())):  # from the inside out
        inside = f"{clean_name(name)}."
        if isinstance(wrapper, Tuner):
            kept = f"{inside}base_layer."
        elif isinstance(wrapper, ModulesToSaveWrapper):
            active = [adapter for adapter in wrapper.active_adapters if adapter in wrapper.modules_to_save]
            kept = f"{inside}modules_to_save.{active[0]}." if active else f"{inside}original_module."
        elif isinstance(wrapper, TrainableTokensWrapper):
            kept = f"{inside}token_adapter.base_layer."
            for adapter in wrapper.active_adapters:
                rows = torch.tensor(wrapper.token_adapter.token_indices[adapter])
                trained = plain[f"{inside}token_adapter.trainable_tokens_delta.{adapter}"]
                plain[f"{kept}weight"] = plain[f"{kept}weight"].index_copy(0, rows, trained)
        else:
            continue
        plain = {
            inside + key.removeprefix(kept) if key.startswith(kept) else key: tensor
            for key, tensor in plain.items()
            if key.startswith(kept) or not key.startswith(inside)
        }
    return {key.removeprefix(PREFIX): tensor for key, tensor in plain.items()}


@torch.no_grad()
def merged_weights(
    layers: list[LoraLayer], members: dict[str, Members], state_dict: dict[str, Tensor]
) -> dict[str, Tensor]:
    """The base model's adapted weights and biases with the active adapters' updates in them.

    Args:
        layers: of the `PeftModel`.
        members: by ``layer:adapter``; an update is the scaling times the sum of c B A.
        state_dict: whole tensors by clean name, parametrizations folded.

    Returns:
        name in the `PeftModel` to tensor, fp32: summed in float64, rounded once.
    """
    merged = {}
    for path, group in groupby((layer for layer in layers if layer.active), key=lambda layer: layer.path):
        inside = f"{PREFIX}{path}."
        weight = state_dict[f"{inside}base_layer.weight"].double()
        bias = state_dict.get(f"{inside}base_layer.bias")
        for layer in group:
            up = torch.cat([c * b.double().flatten(1) for c, b, _ in members[layer.name]], dim=1)
            down = torch.cat([a.double().flatten(1) for _, _, a in members[layer.name]])
            update = layer.scaling * (up @ down)
            weight += (update.T if layer.transposed else update).reshape(weight.shape)
            lora_bias = state_dict.get(f"{inside}lora_B.{layer.adapter}.bias")
            if lora_bias is not None and bias is not None:
                bias = bias.double() + layer.scaling * lora_bias.double()
        merged[f"{inside}base_layer.weight"] = weight.float()
        if bias is not None:
            merged[f"{inside}base_layer.bias"] = bias.float()
    return merged


class AdapterFolder:
    """The adapter folder that peft would write, with tensors from elsewhere.

    Peft picks what it saves from a state dict, by name, so it is shown one of empty marks. What it picks is known
    by identity, and what is no mark it would have taken from the live model. What it computes of a prompt encoder
    (prompt tuning, prefix tuning and their relatives) is computed by a copy of that encoder instead.

    Args:
        module: the `PeftModel`.

    Raises:
        AveragingError: peft takes some of the tensors from the live model.
    """

    def __init__(self, module: nn.Module):
        from peft import get_peft_model_state_dict

        self._module: Any = module
        tensors = dict(module.named_parameters(remove_duplicate=False))
        tensors |= {
            f"{prefix}.{name}" if prefix else name: buffer
            for prefix, part in module.named_modules(remove_duplicate=False)
            for name, buffer in part.named_buffers(recurse=False)
            if name not in part._non_persistent_buffers_set  # OFT has some among what peft picks by name
        }
        self._marks, self._prompt = {name: torch.empty(0) for name in tensors}, torch.empty(0)
        names = {id(mark): clean_name(name) for name, mark in self._marks.items()}
        names[id(self._prompt)] = PROMPT
        self._picked: dict[str, dict[str, str]] = {}
        for adapter, config in self._module.peft_config.items():
            with self._marked_prompts():
                picked = get_peft_model_state_dict(module, state_dict=self._marks, adapter_name=adapter)
            for key, value in picked.items():
                if id(value) not in names:
                    raise AveragingError(
                        f"peft takes {key!r} of adapter {adapter!r} ({type(config).__name__}) from the live model, "
                        "so the folder would not hold the weights it is meant to; expected a method whose weights "
                        "peft finds by name, such as LoRA"
                    )
            self._picked[adapter] = {clean_name(key): names[id(value)] for key, value in picked.items()}

    @property
    def names(self) -> set[str]:
        """Clean names of the tensors that go into the folder, or that what goes into it is computed from."""
        picked = {name for names in self._picked.values() for name in names.values()}
        encoders = tuple(f"prompt_encoder.{adapter}." for adapter in self._picked)
        return picked - {PROMPT} | {clean_name(name) for name in self._marks if name.startswith(encoders)}

    def write(self, folder: Path, state_dict: dict[str, Tensor]) -> None:
        """Write configuration, a model card of peft's and tensors of every adapter.

        Args:
            folder: folder to write; every adapter but `default` gets a folder inside it.
            state_dict: whole tensors by clean name, parametrizations folded; at least :attr:`names`.
        """
        with self._marked_prompts():
            self._module.save_pretrained(folder, state_dict=self._marks)
        for adapter, picked in self._picked.items():
            tensors = {
                _plain(key): self._prompt_of(adapter, state_dict)
                if name == PROMPT
                else state_dict[_plain(name)].clone()
                for key, name in picked.items()
            }
            save_file(
                tensors, folder_of(adapter, folder) / "adapter_model.safetensors", metadata={"format": "pt"}
            )

    @contextmanager
    def _marked_prompts(self) -> Iterator[None]:
        """Inside, peft gets a mark for a prompt, and no encoder runs: one in shards would wait for other ranks."""
        self._module.get_prompt_embedding_to_save = lambda adapter: self._prompt
        try:
            yield
        finally:
            del self._module.get_prompt_embedding_to_save

    @torch.no_grad()
    def _prompt_of(self, adapter: str, state_dict: dict[str, Tensor]) -> Tensor:
        """What peft would save of a prompt encoder that holds the tensors."""
        encoder = self._module.prompt_encoder[adapter]
        holder = SimpleNamespace(
            prompt_encoder={adapter: copy_with(encoder, f"prompt_encoder.{adapter}.", state_dict)},
            prompt_tokens=self._module.prompt_tokens,
            peft_config=self._module.peft_config,
        )
        return type(self._module).get_prompt_embedding_to_save(holder, adapter).clone()


def _plain(name: str) -> str:
    """Name of the tensor that a part of a parametrization is for; other names as they are."""
    return re.sub(r"\bparametrizations\.([^.]+)\..*", r"\1", name)

"""The LoRA layers that peft creates in a model, and the base model with their updates merged."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

from swaft.averaging.adapters import is_peft
from swaft.averaging.engines import Engine
from swaft.averaging.layout import clean_name
from swaft.errors import AveragingError

PREFIX = "base_model.model."
"""The prefix that `PeftModel` puts before the names of its base model."""
Members = list[tuple[float, Tensor, Tensor]]
"""(coefficient c, B, A) of every member of a mean: fp32, host, in peft's shapes."""


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
    """Whether the adapter is trained, so there is something to average."""
    active: bool
    """Whether forwards use the adapter, so a merged model includes it."""

    @property
    def name(self) -> str:
        """``layer:adapter``."""
        return f"{self.path}:{self.adapter}"


def find_layers(engine: Engine) -> list[LoraLayer]:
    """Every LoRA update that is trained or active, in the order of the model.

    Raises:
        AveragingError: none is trained, or one is not a plain product.
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
    """Refuse a layer whose updates are not ``scaling * B @ A``, or are untested."""
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


def changes_base(beginning: bool | str) -> bool:
    """Whether an `init_lora_weights` changes the base model, by rank, each time the adapter is loaded."""
    return isinstance(beginning, str) and beginning not in ("gaussian", "eva", "orthogonal", "mica")


def refuse_changed_base(adapter: str, beginning: bool | str) -> None:
    """Refuse an `init_lora_weights` that changes the base model."""
    if changes_base(beginning):
        raise AveragingError(
            f"adapter {adapter!r} has init_lora_weights={beginning!r}, which changes the base model by its rank "
            "whenever the adapter is loaded; expected product_mean(averager) without `rank`, or `save_merged`"
        )


def base_state_dict(module: nn.Module, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state dict of the base model, with its own names, from a state dict of the `PeftModel` around it.

    It includes `modules_to_save` and trained tokens of the active adapters, but no LoRA factors.

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
                rows = torch.tensor(wrapper.token_adapter.token_indices[adapter], device="cpu")
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

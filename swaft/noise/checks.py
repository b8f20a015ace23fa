"""What a model is inside its wrappers, and what a noise-stability objective requires of it."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from swaft.errors import NoiseError

_UNSHIFTED = frozenset({"xlnet", "xlm", "flaubert"})
"""Types of models without an encoder whose own loss does not shift labels."""


def unwrap(model: nn.Module) -> nn.Module:
    """Find the Hugging Face model inside DDP, a DeepSpeed engine, torch.compile and a peft adapter."""
    *_, innermost = layers(model)
    get_base_model = getattr(innermost, "get_base_model", None)
    return get_base_model() if callable(get_base_model) else innermost  # type: ignore[return-value]


def is_compiled(module: nn.Module) -> bool:
    """Whether the forward is compiled, by torch.compile or the module's own ``compile``."""
    return hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None


def layers(model: nn.Module) -> Iterator[nn.Module]:
    """Walk from the model to the modules it wraps, from the outside in."""
    current: nn.Module | None = model
    while current is not None:
        yield current
        inner = [getattr(current, name, None) for name in ("_orig_mod", "module")]
        current = next((module for module in inner if isinstance(module, nn.Module)), None)


def generates(model: nn.Module) -> bool:
    """Whether a model generates text: an encoder-decoder, or a causal language model."""
    can_generate = getattr(unwrap(model), "can_generate", None)
    return bool(can_generate()) if callable(can_generate) else False


def predicts_tokens(model: nn.Module) -> bool:
    """Whether a model's classes are the tokens of its vocabulary: it generates text, or fills in masked tokens."""
    get_head = getattr(unwrap(model), "get_output_embeddings", None)
    return generates(model) or (callable(get_head) and get_head() is not None)


def _classifies(model: nn.Module) -> bool:
    """Whether the number of a model's classes is the ``num_labels`` of its configuration, by its class's name."""
    return any(kind.__name__.endswith("Classification") for kind in type(unwrap(model)).__mro__)


def is_causal(model: nn.Module) -> bool:
    """Whether a model generates text without an encoder."""
    return generates(model) and not _config(model, "is_encoder_decoder", False)


def shifts_labels(model: nn.Module) -> bool:
    """Whether a model's logits at one position are compared with the label of the next."""
    return is_causal(model) and _config(model, "model_type", "") not in _UNSHIFTED


def check_model(model: nn.Module, objective: str) -> None:
    """Refuse models for which two passes and a divergence make no sense or fail.

    Args:
        model: the model, wrapped or not.
        objective: the objective's name, for the message.

    Raises:
        NoiseError: regression, router losses, or reentrant gradient checkpointing.
    """
    # Other models with one class are found by their logits: check_rows.
    if _classifies(model) and _config(model, "num_labels", 2) == 1:
        raise _one_class(objective)
    if generates(model) and _config(model, "output_router_logits", False):
        raise router_terms("losses", objective)
    if any(_is_reentrant(module) for module in unwrap(model).modules()):
        raise NoiseError(
            f"{type(unwrap(model)).__name__} checkpoints its activations reentrantly, which fails under DDP and "
            f"ZeRO when a step has two forward passes, as with {objective}. Expected the non-reentrant kind: set "
            'gradient_checkpointing_kwargs={"use_reentrant": False}; where TRL sets it back (LoRA under ZeRO-3), '
            "set gradient_checkpointing=False."
        )


def check_uncompiled(model: nn.Module, objective: str) -> None:
    """Refuse noise in a model that is compiled whole: torch would compile it anew for every pass, since each hooks
    the embedding, and after a few give up and train it uncompiled.

    Raises:
        NoiseError: as described.
    """
    # accelerate's regional compilation keeps the original model in its attributes, and compiles each layer.
    if any(is_compiled(each) and "_orig_mod" not in vars(each) for each in (*layers(model), unwrap(model))):
        raise NoiseError(
            f"{type(unwrap(model)).__name__} is compiled whole, including its token embedding, which {objective} "
            "must hook; expected an uncompiled one. Leave out torch_compile, and compile its layers one by one "
            "(`layer.compile()`); swaft.RDrop and swaft.TaskLoss (noise.kind=rdrop or none) do not need the "
            "embedding."
        )


def check_not_recomputed(model: nn.Module, part: nn.Module, objective: str) -> None:
    """Refuse a part that a pass changes, if torch's checkpoint wrapper around it recomputes its activations in the
    backward pass, where nothing is changed any more.

    Raises:
        NoiseError: names both.
    """
    for name, module in unwrap(model).named_modules():
        wrapped = module._modules.get("_checkpoint_wrapped_module")
        if wrapped is not None and any(part is inner for inner in wrapped.modules()) and part is not wrapped:
            raise NoiseError(
                f"{name or 'the model'} ({type(wrapped).__name__}) is recomputed in the backward pass (activation "
                f"checkpointing), without what {objective} changes in its {type(part).__name__}; expected only "
                "layers between embedding and head to be: leave it out of what is wrapped (accelerate's FSDP: "
                "transformer_layer_cls_to_wrap), or use model.gradient_checkpointing_enable()"
            )


def check_one_mask(model: nn.Module) -> None:
    """Refuse dropout in a doubled pass with shared masks: each half would draw its own masks.

    Raises:
        NoiseError: names a module with dropout.
    """
    found = next(_dropout_rates(model), None)
    if found is not None:
        name, rate = found
        raise NoiseError(
            f"passes='doubled' with masks='shared': {name} is {rate:g}, and one pass over the batch twice "
            "draws different masks for each half. Expected no dropout: set the model's dropout to 0, "
            "masks='independent', or passes='two'."
        )


def check_two_masks(model: nn.Module, objective: str) -> None:
    """Refuse a model without dropout if two passes differ only in dropout (Llama, Qwen, Gemma by default).

    A rate in the configuration is accepted, too, since a model may read it from there.

    Raises:
        NoiseError: names the configuration's dropout settings.
    """
    config = getattr(unwrap(model), "config", None)
    text = getattr(config, "get_text_config", lambda: config)()
    values = [each if isinstance(each, Mapping) else getattr(each, "__dict__", {}) for each in (config, text)]
    settings = {key: value for each in values for key, value in each.items() if "drop" in str(key)}
    if next(_dropout_rates(model), None) or any(map(_is_rate, settings.values())):
        return
    off = ", ".join(f"{key}={value}" for key, value in settings.items() if value is not None)
    raise NoiseError(
        f"{objective} without noise compares two passes that differ only in their dropout masks, and "
        f"{type(unwrap(model)).__name__} has no dropout ({off or 'none in its configuration'}): both would be the "
        "same, the divergence 0, at twice the cost. Set a dropout in its configuration, add noise "
        "(swaft.R3F, noise.kind=r3f, with preset='relative' and sigma=0.5), or use swaft.TaskLoss "
        "(noise.kind=none)."
    )


def _dropout_rates(model: nn.Module) -> Iterator[tuple[str, float]]:
    """Find every dropout in a training pass: its name and its rate."""
    for name, module in unwrap(model).named_modules():
        rates = {key: value for key, value in vars(module).items() if "drop" in key}
        if isinstance(module, nn.modules.dropout._DropoutNd):
            rates["p"] = module.p
        yield from ((f"{name}.{key}".lstrip("."), rate) for key, rate in rates.items() if _is_rate(rate))


def _is_rate(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value > 0


def check_seeds(model: nn.Module, *, reseeded: bool = False) -> None:
    """Refuse shared dropout masks in a model that seeds torch's random state in its forward pass.

    Args:
        model: the model, wrapped or not.
        reseeded: whether it was seen to do so; otherwise only a type known to do so is refused.

    Raises:
        NoiseError: as described.
    """
    if reseeded or _config(model, "model_type", "") == "reformer":
        raise NoiseError(
            "The model reseeds torch's random state in its forward pass (as Reformer does), so two passes cannot "
            "share their dropout masks. Set masks='independent'."
        )


def check_rows(rows: Tensor, targets: Tensor, objective: str) -> None:
    """Refuse logits of one class, and labels that are not one per row.

    Args:
        rows: logits (..., V), or the hidden states that they are computed from (..., d).
        targets: the classes.
        objective: the objective's name, for the message.

    Raises:
        NoiseError: names what was found.
    """
    if rows.shape[-1] == 1:
        raise _one_class(objective)
    if targets.shape != rows.shape[:-1]:
        raise NoiseError(
            f"Labels of shape {tuple(targets.shape)} do not fit the model's rows, {tuple(rows.shape[:-1])}; "
            f"{objective} expects one class index per row. For several labels per row, and for rows without a "
            "label (the virtual tokens of prompt tuning), use swaft.TaskLoss without label smoothing "
            "(noise.kind=none)."
        )


def _one_class(objective: str) -> NoiseError:
    return NoiseError(
        f"{objective} needs at least two classes, and the model has one output (regression), over which "
        "every softmax is 1 and the divergence 0. Use swaft.TaskLoss (noise.kind=none)."
    )


def router_terms(terms: str, objective: str) -> NoiseError:
    """The error for a loss that has mixture-of-experts terms in addition to the cross entropy."""
    return NoiseError(
        f"The model adds {terms} of its routers to its loss, and {objective} computes only the mean cross "
        "entropy. Expected a loss without them. Set the model's output_router_logits=False (with TRL: "
        "SFTConfig(router_aux_loss_coef=0.0)), or use swaft.TaskLoss (noise.kind=none)."
    )


def _config(model: nn.Module, field: str, default: Any) -> Any:
    return getattr(getattr(unwrap(model), "config", None), field, default)


def _is_reentrant(module: nn.Module) -> bool:
    checkpoint = getattr(module, "_gradient_checkpointing_func", None)
    if not getattr(module, "gradient_checkpointing", False) or not isinstance(checkpoint, functools.partial):
        return False
    return bool(checkpoint.keywords.get("use_reentrant", True))  # torch's default

"""The fused loss as a torch operator that autograd, torch.compile and autocast understand."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual

from swaft.errors import NoiseError
from swaft.noise.loss.linear import LinearInputs, Needs, linear_loss, stored_dtype, times
from swaft.noise.loss.options import LossOptions
from swaft.noise.loss.rows import RowStatistics

_Outputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]
"""``LinearLoss``, as the operator declares it."""
_OPTIONS = ("label_smoothing", "z_loss", "detach", "ce_on_noised", "logit_scale", "softcap", "form")
"""Options that the operator takes; the others are already in the row weights."""


def fused_linear_loss(
    inputs: LinearInputs,
    options: LossOptions,
    *,
    num_counted: int | None = None,
    chunk_bytes: int | None = None,
) -> tuple[Tensor, RowStatistics]:
    """Loss of a head, see ``linear_loss``; differentiable in hidden states, weight and bias.

    The gradients needed are read from the tensors here, because an operator cannot ask autograd.

    Returns:
        The loss (0-dim, differentiable) and the row statistics (N,), detached.
    """
    differentiated = (inputs.hidden, inputs.noised_hidden, inputs.weight, inputs.bias)
    _refuse_transforms(differentiated)
    recording = torch.is_grad_enabled()
    needs = [recording and tensor is not None and tensor.requires_grad for tensor in differentiated]
    loss, statistics, *_ = _fused(
        *inputs,
        **{name: getattr(options, name) for name in _OPTIONS},
        num_counted=num_counted,
        chunk_bytes=chunk_bytes,
        needs=needs,
        operand_dtype=_operand_dtype(inputs),
    )
    return loss, RowStatistics(*statistics.detach())


def _refuse_transforms(tensors: tuple[Tensor | None, ...]) -> None:
    """Refuse transforms for which the operator would return missing or zero gradients."""
    if torch.compiler.is_compiling():
        return
    transformed = torch._C._are_functorch_transforms_active()
    if transformed or any(t is not None and unpack_dual(t).tangent is not None for t in tensors):
        raise NoiseError(
            "linear_cross_entropy_symmetric_kl was called in forward mode or under a transform of torch.func "
            "(grad, vmap, jvp); expected backward mode, for which it computes the gradients itself. Use "
            "torch.autograd, or write the loss with logits in plain operations."
        )


def _operand_dtype(inputs: LinearInputs) -> torch.dtype:
    """The dtype of the operands of matrix products: autocast's, or the widest of the operands."""
    dtype = torch.promote_types(inputs.hidden.dtype, inputs.noised_hidden.dtype)
    dtype = torch.promote_types(dtype, inputs.weight.dtype)
    device = inputs.hidden.device.type
    if dtype != torch.float64 and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return dtype


@torch.library.custom_op("swaft::linear_cross_entropy_symmetric_kl", mutates_args=())
def _fused(
    hidden: Tensor,
    noised_hidden: Tensor,
    hidden_difference: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    ce_weight: Tensor,
    kl_weight: Tensor,
    factor: Tensor,
    *,
    label_smoothing: float,
    z_loss: float,
    detach: str,
    ce_on_noised: bool,
    logit_scale: float,
    softcap: float | None,
    form: str,
    num_counted: int | None,
    chunk_bytes: int | None,
    needs: Sequence[bool],
    operand_dtype: torch.dtype,
) -> _Outputs:
    inputs = LinearInputs(
        hidden, noised_hidden, hidden_difference, weight, bias, labels, ce_weight, kl_weight, factor
    )
    options = LossOptions(
        label_smoothing=label_smoothing,
        z_loss=z_loss,
        detach=detach,  # type: ignore[arg-type]
        ce_on_noised=ce_on_noised,
        logit_scale=logit_scale,
        softcap=softcap,
        form=form,  # type: ignore[arg-type]
    )
    with torch.autocast(hidden.device.type, enabled=False):
        return linear_loss(
            inputs,
            options,
            Needs(*needs),
            operand_dtype=operand_dtype,
            num_counted=num_counted,
            chunk_bytes=chunk_bytes,
        )


@_fused.register_fake
def _(
    hidden: Tensor,
    noised_hidden: Tensor,
    _difference: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    *_rows: Tensor,
    operand_dtype: torch.dtype,
    **options: Any,
) -> _Outputs:
    needs = Needs(*options["needs"])
    wide = torch.promote_types(operand_dtype, torch.float32)

    def gradient(like: Tensor | None, needed: bool) -> Tensor:
        if like is None:
            return hidden.new_empty(0, dtype=wide)
        return like.new_empty(like.shape if needed else (0,), dtype=stored_dtype(like.dtype))

    return (
        hidden.new_empty((), dtype=wide),
        hidden.new_empty(4, hidden.shape[0], dtype=wide),
        gradient(hidden, needs.hidden),
        gradient(noised_hidden, needs.noised_hidden),
        gradient(weight, needs.weight),
        gradient(bias, needs.bias),
    )


def _keep_gradients(
    ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: dict[str, Any], output: _Outputs
) -> None:
    ctx.needs = Needs(*keyword_only_inputs["needs"])
    hidden, noised_hidden, _, weight, bias, *_ = inputs
    differentiated = (hidden, noised_hidden, weight, bias)
    ctx.dtypes = [None if tensor is None else tensor.dtype for tensor in differentiated]
    ctx.save_for_backward(*(gradient for gradient, n in zip(output[2:], ctx.needs, strict=True) if n))


def _backward(ctx: Any, grad_loss: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    scaled = iter(_times(list(ctx.saved_tensors), grad_loss))
    hidden, noised_hidden, weight, bias = (
        next(scaled).to(dtype) if needed else None
        for needed, dtype in zip(ctx.needs, ctx.dtypes, strict=True)
    )
    return hidden, noised_hidden, None, weight, bias, None, None, None, None


_fused.register_autograd(_backward, setup_context=_keep_gradients)


@torch.library.custom_op("swaft::scale_saved_gradients", mutates_args=())
def _times(gradients: Sequence[Tensor], factor: Tensor) -> list[Tensor]:
    """Each gradient * factor, out of place: retain_graph uses the saved gradients again."""
    return [times(gradient, factor, gradient.dtype) for gradient in gradients]


@_times.register_fake
def _(gradients: Sequence[Tensor], factor: Tensor) -> list[Tensor]:
    return [torch.empty_like(gradient) for gradient in gradients]


def _no_second_derivative(ctx: Any, *_: Any) -> Any:
    raise NoiseError(
        "linear_cross_entropy_symmetric_kl was differentiated twice; expected once, since its gradients are "
        "computed in the forward pass. A gradient penalty needs a loss of its own: write it in plain operations."
    )


_times.register_autograd(_no_second_derivative)

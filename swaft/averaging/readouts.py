"""Which weights are read out of a run: a blend of an average with the last weights, of all of them or some.

A blend is ``last + blend * (average - last)``. The last weight and the average of an element lie on the same rank,
so nothing is sent, and the bits are the same under every engine and any number of ranks.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from swaft.averaging.adapters import is_peft
from swaft.averaging.engines import Engine
from swaft.averaging.rules import Readout
from swaft.errors import AveragingError


@torch.no_grad()
def blended(engine: Engine, average: Tensor, chosen: Readout) -> Tensor:
    """This rank's elements of a blend, elementwise in fp32: exactly the last weights at 0, and the average at 1.

    Args:
        engine: whose last weights.
        average: (engine.numel,), fp32, host; returned itself where it is what is chosen, and never changed.
        chosen: says how far to go, and for which weights.

    Returns:
        (engine.numel,), fp32, host.
    """
    if chosen.blend == 1 and chosen.scope == "all":
        return average
    last = engine.live_shard()
    if chosen.blend == 0:
        return last
    result = average.clone() if chosen.blend == 1 else (average - last).mul_(chosen.blend).add_(last)
    kept, position = outside(engine, chosen.scope), 0
    for fragment in engine.fragments:
        end = position + fragment.numel
        if fragment.name in kept:
            result[position:end] = last[position:end]
        position = end
    return result


def outside(engine: Engine, scope: str) -> set[str]:
    """Names of the trained parameters that a scope leaves as they are.

    Embeddings are those of every `torch.nn.Embedding`, with what is tied to them. The head is what a Hugging Face
    model has beside its body.

    Raises:
        AveragingError: the model does not say what its head is, or the scope would leave none, or all, as they are.
    """
    if scope == "all":
        return set()
    if scope == "no_embeddings":
        parts = [part for part in engine.module.modules() if isinstance(part, nn.Embedding)]
        kept = {id(parameter) for part in parts for parameter in part.parameters()}
    else:
        model: Any = engine.module.get_base_model() if is_peft(engine.module) else engine.module  # type: ignore[operator]
        body = getattr(model, getattr(model, "base_model_prefix", None) or "\0", None)
        if not isinstance(body, nn.Module):
            raise AveragingError(
                f"scope='no_head' was asked of a {type(model).__name__}, which does not say what its head is; "
                "expected a Hugging Face model with a head on its body (base_model_prefix)"
            )
        kept = {id(each) for each in model.parameters()} - {id(each) for each in body.parameters()}
    names = {name for name, parameter in engine.trainable.items() if id(parameter) in kept}
    if not names or len(names) == len(engine.trainable):
        raise AveragingError(
            f"scope={scope!r} would leave {len(names)} of the {len(engine.trainable)} trained parameters as they "
            "are; expected some of them, and not all: choose scope='all'"
        )
    return names

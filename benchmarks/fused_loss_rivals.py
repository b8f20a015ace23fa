"""The ways to compute a noise-stability loss from a linear head, each as one call of forward and backward.

loss = CE(h W^T, labels) + KL(p || q) + KL(q || p),  p = softmax(h W^T),  q = softmax(h' W^T), mean over rows.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from swaft.functional import linear_cross_entropy_symmetric_kl

SWAFT, PLAIN, COMPILED, FLOOR = "swaft", "plain", "plain, torch.compile", "six GEMMs"
LIGER_CE, LIGER_CE_16, LIGER_JSD = (
    "Liger, two cross entropies",
    "Liger, two cross entropies, 16 x chunk",
    "Liger, linear JSD",
)
LIGER = (LIGER_CE, LIGER_CE_16, LIGER_JSD)
FOREIGN = (COMPILED, *LIGER)
"""Arms whose failure is a result, not a bug in the benchmark."""
ABOUT = {
    SWAFT: "swaft.functional.linear_cross_entropy_symmetric_kl, as it comes",
    PLAIN: "two F.linear, F.cross_entropy, two F.kl_div on fp32 (log-)softmax, gradients to both sides",
    COMPILED: "the same under torch.compile(dynamic=False)",
    FLOOR: "two GEMMs each for logits, hidden gradients and weight gradient, into buffers that are there: no loss",
    LIGER_CE: "two fused linear cross entropies with Liger's defaults: as many GEMMs, no divergence",
    LIGER_CE_16: "the same with chunk_mem_const=16",
    LIGER_JSD: "fused linear JSD: two projections, gradient to one side only, no cross entropy",
}
LOGIT_STD = 2.5
"""Standard deviation of the clean logits: hidden is standard normal, the weight scaled to give it."""


class Shape(NamedTuple):
    """Sizes of one loss."""

    rows: int
    width: int
    vocabulary: int

    @property
    def name(self) -> str:
        """As in the results: N x d x V."""
        return f"{self.rows} x {self.width} x {self.vocabulary}"

    @property
    def gemm_operations(self) -> float:
        """Floating-point operations of the six GEMMs."""
        return 6 * 2.0 * self.rows * self.width * self.vocabulary


@dataclass(frozen=True)
class Operands:
    """What the loss is computed from."""

    hidden: Tensor
    """(N, d), with gradient."""
    noised_hidden: Tensor
    """(N, d), with gradient."""
    weight: Tensor
    """(V, d), with gradient."""
    labels: Tensor
    """(N,), every row counts."""
    difference: Tensor | None
    """hidden - noised_hidden in fp32 where the operands are 16-bit, so that their rounding does not hide it."""

    @property
    def leaves(self) -> tuple[Tensor, Tensor, Tensor]:
        """The tensors that get a gradient."""
        return self.hidden, self.noised_hidden, self.weight


class Step(NamedTuple):
    """The result of one forward and backward."""

    loss: Tensor | None
    """0-dim, detached; None from an arm that computes none."""
    gradients: tuple[Tensor | None, ...]
    """Gradients of hidden, noised_hidden and weight; None if an arm gives none."""


Loss = Callable[[Operands], Tensor]
Arm = Callable[[], Step]


def make_operands(shape: Shape, *, dtype: torch.dtype, device: str, noise: float = 1e-2) -> Operands:
    """Random operands, the same at every call.

    Args:
        shape: sizes.
        dtype: of hidden, noised_hidden and weight.
        device: where to put them.
        noise: standard deviation of the noise on hidden, whose own is 1.
    """
    generator = torch.Generator(device).manual_seed(0)

    def normal(*size: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(size, dtype=dtype, device=device, generator=generator)

    weight = normal(shape.vocabulary, shape.width).mul_(LOGIT_STD / shape.width**0.5)
    hidden = normal(shape.rows, shape.width)
    wide = torch.promote_types(dtype, torch.float32)
    difference = normal(shape.rows, shape.width, dtype=wide).mul_(noise)
    noised = hidden.to(wide).sub(difference).to(dtype)
    labels = torch.randint(shape.vocabulary, (shape.rows,), device=device, generator=generator)
    return Operands(
        hidden.requires_grad_(),
        noised.requires_grad_(),
        weight.requires_grad_(),
        labels,
        None if dtype == wide else difference,
    )


def forward_backward(loss_of: Loss, operands: Operands) -> Step:
    """Run the loss and take its gradients."""
    loss = loss_of(operands)
    return Step(loss.detach(), torch.autograd.grad(loss, operands.leaves, allow_unused=True))


def swaft_loss(operands: Operands, **options: Any) -> Tensor:
    """The fused loss of swaft, all rows, with options of `linear_cross_entropy_symmetric_kl`."""
    return linear_cross_entropy_symmetric_kl(
        operands.hidden,
        operands.noised_hidden,
        operands.weight,
        operands.labels,
        hidden_difference=operands.difference,
        **options,
    ).loss


def plain_loss(operands: Operands) -> Tensor:
    """The loss as it is commonly written, on whole logits in the operands' dtype."""
    return loss_of_logits(
        F.linear(operands.hidden, operands.weight),
        F.linear(operands.noised_hidden, operands.weight),
        operands.labels,
    )


def loss_of_logits(logits: Tensor, noised_logits: Tensor, labels: Tensor) -> Tensor:
    """Cross entropy of the clean logits plus both KL divergences, mean over rows."""
    wide = torch.promote_types(logits.dtype, torch.float32)
    return F.cross_entropy(logits.to(wide), labels) + plain_divergence(logits, noised_logits)


def plain_divergence(logits: Tensor, noised_logits: Tensor) -> Tensor:
    """Both KL divergences by F.kl_div on fp32 (log-)softmax, mean over rows; what fairseq's R3F computes."""
    wide = torch.promote_types(logits.dtype, torch.float32)

    def divergence(of: Tensor, to: Tensor) -> Tensor:
        log_q = F.log_softmax(to, dim=-1, dtype=wide)
        return F.kl_div(log_q, F.softmax(of, dim=-1, dtype=wide), reduction="batchmean")

    return divergence(logits, noised_logits) + divergence(noised_logits, logits)


def arms(operands: Operands, names: tuple[str, ...]) -> dict[str, Arm | str]:
    """The named arms on these operands: a call, or the reason why there is none."""
    found: dict[str, Arm | str] = {}
    for name in names:
        if name == FLOOR:
            found[name] = six_gemms(operands)
        elif name in LIGER and importlib.util.find_spec("liger_kernel") is None:
            found[name] = "liger-kernel is not installed"
        elif name in LIGER and operands.hidden.device.type != "cuda":
            found[name] = "liger-kernel runs on a GPU only"
        else:
            loss_of = _loss_of(name)
            found[name] = lambda loss_of=loss_of: forward_backward(loss_of, operands)
    return found


def six_gemms(operands: Operands) -> Arm:
    """The six GEMMs that even a method without whole logits needs, as one call."""
    hidden, noised, weight = (leaf.detach() for leaf in operands.leaves)
    logits = torch.empty(len(hidden), len(weight), dtype=weight.dtype, device=weight.device)
    gradients = torch.empty_like(hidden), torch.empty_like(noised), torch.empty_like(weight)

    def call() -> Step:
        for side, gradient in ((hidden, gradients[0]), (noised, gradients[1])):
            torch.mm(side, weight.T, out=logits)
            torch.mm(logits, weight, out=gradient)
        torch.mm(logits.T, hidden, out=gradients[2])
        torch.addmm(gradients[2], logits.T, noised, out=gradients[2])
        return Step(None, gradients)

    return call


def _loss_of(name: str) -> Loss:
    if name == SWAFT:
        return swaft_loss
    if name == PLAIN:
        return plain_loss
    if name == COMPILED:
        return _compiled_loss()
    return _liger_loss(name)


def _compiled_loss() -> Loss:
    torch.compiler.reset()  # otherwise earlier shapes count towards the limit on recompilations
    compiled = torch.compile(_plain_loss_of_tensors, dynamic=False)
    return lambda o: compiled(o.hidden, o.noised_hidden, o.weight, o.labels)


def _plain_loss_of_tensors(hidden: Tensor, noised_hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return plain_loss(Operands(hidden, noised_hidden, weight, labels, None))


def _liger_loss(name: str) -> Loss:
    from liger_kernel.transformers import functional as liger

    if name == LIGER_JSD:
        return lambda o: liger.liger_fused_linear_jsd(
            o.hidden, o.weight, o.noised_hidden.detach(), o.weight.detach(), o.labels
        )
    chunk = 16 if name == LIGER_CE_16 else 1

    def two_cross_entropies(o: Operands) -> Tensor:
        return sum(
            liger.liger_fused_linear_cross_entropy(side, o.weight, o.labels, chunk_mem_const=chunk)
            for side in (o.hidden, o.noised_hidden)
        )

    return two_cross_entropies

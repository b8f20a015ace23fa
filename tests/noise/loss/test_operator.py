from __future__ import annotations

import pytest
import torch
from loss_oracle import head, relative_error
from torch._dynamo.testing import CompileCounterWithBackend
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from swaft.errors import NoiseError
from swaft.functional import linear_cross_entropy_symmetric_kl
from swaft.noise.loss import linear, operator
from swaft.noise.loss.linear import Needs
from swaft.noise.loss.options import LossOptions

pytestmark = pytest.mark.unit

CLASSES = 41
NAMES = ("hidden", "noised_hidden", "weight", "bias")


def operands(
    *, dtype=torch.float32, noise=0.1, rows=10, classes=CLASSES, width=8
) -> tuple[list[torch.Tensor], torch.Tensor]:
    inputs = head(noise=noise, classes=classes, rows=rows, width=width, dtype=dtype)
    bias = torch.linspace(-1, 1, classes, dtype=dtype)
    return [tensor.requires_grad_() for tensor in (*inputs[:3], bias)], inputs.labels


def loss(hidden, noised_hidden, weight, bias, labels, **options) -> torch.Tensor:
    return linear_cross_entropy_symmetric_kl(hidden, noised_hidden, weight, labels, bias, **options).loss


@pytest.mark.parametrize("form", ["difference", "direct"])
@pytest.mark.parametrize(
    "options",
    [
        {"label_smoothing": 0.1, "z_loss": 0.01},
        {"softcap": 3.0, "logit_scale": 0.5},
        {"ce_on_noised": True, "detach": "noised"},
        {"num_counted": 3, "token_weight": torch.linspace(0.1, 2, 4)},
    ],
    ids=lambda options: " ".join(options),
)
def test_gradients_pass_gradcheck_in_float64(options, form):
    if options.get("detach"):
        options = options | {"divergence_weight": 0.0}
    states, labels = operands(dtype=torch.float64, noise=0.5, rows=4, classes=7, width=3)
    labels[3] = -100
    assert torch.autograd.gradcheck(lambda *tensors: loss(*tensors, labels, form=form, **options), states)


@pytest.mark.parametrize("detach", ["none", "noised"])
@pytest.mark.parametrize("needed", [*NAMES, "hidden weight", "noised_hidden bias", "hidden noised_hidden"])
def test_a_gradient_that_is_needed_does_not_depend_on_which_others_are(needed, detach):
    states, labels = operands()
    wanted = [states[NAMES.index(name)] for name in needed.split()]
    expected = torch.autograd.grad(loss(*states, labels, detach=detach), wanted)

    for tensor in states:
        tensor.requires_grad_(any(tensor is other for other in wanted))
    computed = torch.autograd.grad(loss(*states, labels, detach=detach), wanted)
    for ours, theirs in zip(computed, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-9)


class Products:
    """The shapes that matrix products had."""

    def __init__(self, monkeypatch):
        self.shapes = []
        plain, adding = linear._Arithmetic.product, linear._Arithmetic.add_product_
        monkeypatch.setattr(
            linear._Arithmetic, "product", lambda this, a, b, *, out: plain(this, self.seen(a, b), b, out=out)
        )
        monkeypatch.setattr(
            linear._Arithmetic,
            "add_product_",
            lambda this, total, a, b, **how: adding(this, total, self.seen(a, b), b, **how),
        )

    def seen(self, a, b):
        self.shapes.append((a.shape[0], a.shape[1], b.shape[1]))
        return a


FORWARD = (20, 8, CLASSES)
BOTH_STATES, ONE_STATE = (20, CLASSES, 8), (10, CLASSES, 8)
WEIGHT, WEIGHT_OF_CLEAN = (CLASSES, 20, 8), (CLASSES, 10, 8)


@pytest.mark.parametrize(
    ("needed", "detach", "products"),
    [
        ("hidden noised_hidden weight", "none", [FORWARD, BOTH_STATES, WEIGHT]),
        ("hidden noised_hidden", "none", [FORWARD, BOTH_STATES]),
        ("hidden weight", "none", [FORWARD, ONE_STATE, WEIGHT]),
        ("hidden noised_hidden weight", "noised", [FORWARD, ONE_STATE, WEIGHT_OF_CLEAN]),
        ("bias", "none", [FORWARD]),
        ("", "none", [FORWARD]),
    ],
)
def test_products_that_nobody_needs_are_not_made(monkeypatch, needed, detach, products):
    states, labels = operands()
    for name, tensor in zip(NAMES, states, strict=True):
        tensor.requires_grad_(name in needed.split())
    counted = Products(monkeypatch)
    loss(*states, labels, detach=detach)
    assert counted.shapes == products


def test_without_gradients_only_statistics_are_computed(monkeypatch):
    states, labels = operands()
    seen = []
    monkeypatch.setattr(
        operator,
        "linear_loss",
        lambda inputs, options, needs, **others: (
            seen.append(needs) or linear.linear_loss(inputs, options, needs, **others)
        ),
    )
    with torch.no_grad():
        silent = loss(*states, labels)
    assert seen == [Needs(False, False, False, False)]
    assert not silent.requires_grad
    torch.testing.assert_close(silent, loss(*states, labels).detach())


def test_only_the_loss_is_differentiable():
    states, labels = operands()
    result = linear_cross_entropy_symmetric_kl(*states[:3], labels, states[3])
    assert [tensor.requires_grad for tensor in result] == [True, False, False, False, False, False]


def test_backward_twice_gives_the_same_and_follows_the_upstream_gradient():
    states, labels = operands()
    value = loss(*states, labels)
    first = torch.autograd.grad(value, states, retain_graph=True)
    again = torch.autograd.grad(value, states, retain_graph=True)
    tripled = torch.autograd.grad(3 * value, states)
    for a, b, c in zip(first, again, tripled, strict=True):
        assert torch.equal(a, b)
        torch.testing.assert_close(3 * a, c)


def test_a_second_derivative_is_refused():
    states, labels = operands()
    gradients = torch.autograd.grad(loss(*states, labels), states, create_graph=True)
    with pytest.raises(NoiseError, match="differentiated twice"):
        gradients[0].square().sum().backward()


def test_autocast_multiplies_in_bf16_after_taking_the_difference_and_keeps_the_weight_in_fp32():
    states, labels = operands(noise=1e-4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = linear_cross_entropy_symmetric_kl(*states[:3], labels, states[3])
    gradients = torch.autograd.grad(result.loss, states)
    assert {tensor.dtype for tensor in (*result, *gradients)} == {torch.float32}

    hidden, noised_hidden, weight, bias = (tensor.detach() for tensor in states)
    rounded = linear_cross_entropy_symmetric_kl(
        hidden.bfloat16(),
        noised_hidden.bfloat16(),
        weight.bfloat16(),
        labels,
        bias,
        hidden_difference=hidden - noised_hidden,
    )
    for ours, theirs in zip(result, rounded, strict=True):
        torch.testing.assert_close(ours.detach(), theirs)
    exact = linear_cross_entropy_symmetric_kl(
        *(tensor.double() for tensor in states[:3]), labels, bias.double()
    )
    assert 1e-7 < relative_error(result.task_loss, exact.task_loss) < 2e-2
    assert relative_error(result.divergence, exact.divergence) < 5e-2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_gradients_come_in_the_type_of_their_tensor_and_the_loss_in_fp32_at_least(dtype):
    states, labels = operands(dtype=dtype)
    result = linear_cross_entropy_symmetric_kl(*states[:3], labels, states[3])
    assert {tensor.dtype for tensor in result} == {torch.promote_types(dtype, torch.float32)}
    assert {gradient.dtype for gradient in torch.autograd.grad(result.loss, states)} == {dtype}


@pytest.mark.parametrize("form", ["difference", "direct"])
def test_compiled_without_a_graph_break_it_gives_the_same(form):
    states, labels = operands()
    labels[2] = -100

    def step(hidden, noised_hidden, weight, bias):
        return 2 * loss(hidden, noised_hidden, weight, bias, labels, form=form, label_smoothing=0.1)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    value, expected = compiled(*states), step(*states)
    torch.testing.assert_close(value, expected)
    for ours, theirs in zip(
        torch.autograd.grad(value, states), torch.autograd.grad(expected, states), strict=True
    ):
        torch.testing.assert_close(ours, theirs)


def test_neither_the_number_of_rows_nor_the_divergence_weight_is_compiled_in():
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(loss, fullgraph=True, backend=counter)
    for rows, weight in [(10, 1.0), (11, 0.5), (14, 0.25), (17, 0.125), (9, 0.0)]:
        states, labels = operands(rows=rows)
        value = compiled(*states, labels, divergence_weight=weight)
        torch.testing.assert_close(value, loss(*states, labels, divergence_weight=weight))
    assert counter.frame_count == 2


def in_forward_mode(function, tensor):
    with forward_ad.dual_level():
        return function(forward_ad.make_dual(tensor, tensor))


@pytest.mark.parametrize(
    "transformed",
    [
        lambda function, tensor: torch.func.grad(function)(tensor),
        lambda function, tensor: torch.func.vmap(function)(tensor.expand(2, -1, -1)),
        lambda function, tensor: torch.func.jvp(function, (tensor,), (tensor,)),
        in_forward_mode,
    ],
    ids=["grad", "vmap", "jvp", "forward mode"],
)
def test_a_transform_that_would_lose_gradients_is_refused(transformed):
    (hidden, *others), labels = operands()
    with pytest.raises(NoiseError, match=r"forward mode or under a transform of torch\.func"):
        transformed(lambda states: loss(states, *others, labels), hidden.detach())


def test_checkpointing_gives_the_same():
    states, labels = operands()
    value = checkpoint(loss, *states, labels, use_reentrant=False)
    for ours, theirs in zip(
        torch.autograd.grad(value, states), torch.autograd.grad(loss(*states, labels), states), strict=True
    ):
        assert torch.equal(ours, theirs)


def test_one_tensor_may_be_both_passes():
    (hidden, _, weight, bias), labels = operands()
    (gradient,) = torch.autograd.grad(loss(hidden, hidden, weight, bias, labels), hidden)
    plain = torch.nn.functional.cross_entropy(hidden @ weight.mT + bias, labels)
    assert relative_error(gradient, torch.autograd.grad(plain, hidden)[0]) < 1e-6


def test_the_operator_keeps_what_torch_asks_of_one():
    states, labels = operands()
    ones, factor = torch.ones(10), torch.tensor(0.1)
    head_arguments = (*states[:2], None, *states[2:], labels, ones, ones, factor)
    options = vars(LossOptions(label_smoothing=0.1, z_loss=0.01))
    options = {name: options[name] for name in operator._OPTIONS}
    options |= {"num_counted": None, "chunk_bytes": None, "needs": [True] * 4, "operand_dtype": torch.float32}
    torch.library.opcheck(torch.ops.swaft.linear_cross_entropy_symmetric_kl.default, head_arguments, options)


class Factors(TorchDispatchMode):
    """The types that products were taken in, and how many elements each had."""

    def __init__(self):
        super().__init__()
        self.types, self.elements = set(), set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function in (torch.ops.aten.mul.Tensor, torch.ops.aten.mul.out):
            self.types.add(torch.result_type(*args))
            self.elements.add(args[0].numel())
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_of_16_bits_are_scaled_in_fp32_in_pieces_and_rounded_once(dtype, monkeypatch):
    monkeypatch.setattr(linear, "_PIECE", 24)  # three rows at a time
    gradient = torch.randn(10, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    with Factors() as factors:
        scaled = linear.times(gradient, torch.tensor(1 / 3), dtype)
    assert factors.types == {torch.float32}
    assert factors.elements == {24, 8}
    assert torch.equal(scaled, (gradient.float() * torch.tensor(1 / 3)).to(dtype))

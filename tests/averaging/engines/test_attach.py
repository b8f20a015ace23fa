"""Which engine a model and an optimizer make, under which names, in one process."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

import swaft
from swaft.averaging import attach_engine
from swaft.averaging.engines.base import checksum
from swaft.averaging.layout import clean_name
from swaft.errors import AveragingError, LayoutError, UnsupportedEngineError

pytestmark = pytest.mark.unit


def sgd(model: nn.Module) -> torch.optim.SGD:
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)


def two_layers() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))


@pytest.mark.parametrize(
    "wrap",
    [lambda module: torch.compile(module, backend="eager"), checkpoint_wrapper],
    ids=["compiled", "checkpointed"],
)
def test_wrapped_parts_are_known_by_the_names_they_have_unwrapped(wrap):
    model = two_layers()
    model[1] = wrap(model[1])
    engine = attach_engine(model, sgd(model))
    assert list(engine.trainable) == ["0.weight", "0.bias", "1.weight", "1.bias"]
    assert engine.state_names == ("0.weight", "0.bias", "1.weight", "1.bias")
    assert {fragment.name for fragment in engine.fragments} == set(engine.trainable)


def test_a_wrapped_part_is_named_clean_wherever_it_is():
    assert (
        clean_name("encoder._orig_mod.layer.0._checkpoint_wrapped_module.weight") == "encoder.layer.0.weight"
    )
    assert clean_name("_orig_mod") == ""
    assert clean_name("my_orig_mod.weight") == "my_orig_mod.weight"


def test_a_tied_parameter_has_one_name_and_its_alias():
    model = nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 5, bias=False))
    model[1].weight = model[0].weight
    engine = attach_engine(model, sgd(model))
    assert [name for name, _ in engine.named_parameters()] == ["0.weight"]
    assert [name for name, _ in engine.named_parameters(aliases=True)] == ["0.weight", "1.weight"]
    assert engine.numel == 15


def test_the_optimizer_that_writes_the_masters_is_told():
    model = two_layers()
    optimizer = sgd(model)
    assert attach_engine(model, optimizer).inner_optimizer is optimizer


def test_empty_groups_empty_parameters_and_one_element_are_no_obstacle():
    model = nn.ParameterDict({"one": torch.ones(1), "none": torch.ones(0), "scalar": torch.tensor(2.0)})
    optimizer = torch.optim.SGD([{"params": []}, {"params": list(model.parameters())}], lr=0.1)
    engine = attach_engine(model, optimizer)
    assert engine.numel == 2
    assert torch.equal(engine.live_shard().sort().values, torch.tensor([1.0, 2.0]))


def test_a_parameter_frozen_after_attaching_goes_on_as_it_is():
    model = two_layers()
    optimizer = sgd(model)
    averager = swaft.WeightAverager(model, optimizer, rule=swaft.SWA(start=0), total_steps=9)
    members = [averager.engine.live_shard()]
    for step in range(3):
        model[1].requires_grad_(step == 0)
        optimizer.zero_grad()
        model(torch.ones(1, 3)).sum().backward()
        optimizer.step()
        averager.step()
        members.append(averager.engine.live_shard())
    frozen = slice(model[0].weight.numel() + model[0].bias.numel(), None)
    assert torch.equal(members[1][frozen], members[3][frozen])
    assert torch.allclose(averager.shard().double(), torch.stack(members).double().mean(0), atol=1e-7)


def test_a_parameter_added_after_attaching_is_refused_by_name():
    model = two_layers()
    engine = attach_engine(model, sgd(model))
    model.append(nn.Linear(2, 2))
    with pytest.raises(LayoutError, match=r"'2\.weight' became trainable"):
        engine.check_trainable()


def test_what_is_no_torch_optimizer_is_refused():
    with pytest.raises(UnsupportedEngineError, match=r"expected a torch\.optim\.Optimizer"):
        attach_engine(two_layers(), object())


class Lookahead(torch.optim.Optimizer):
    """Wraps an optimizer without calling the parent's __init__, as many do."""

    def __init__(self, optimizer):
        self.optimizer, self.param_groups, self.state = optimizer, optimizer.param_groups, {}

    def step(self, closure=None):
        return self.optimizer.step(closure)


def test_an_optimizer_whose_steps_cannot_be_seen_is_refused_and_the_wrapped_one_is_not():
    model = two_layers()
    wrapper = Lookahead(sgd(model))
    with pytest.raises(
        UnsupportedEngineError, match=r"Lookahead does not call the __init__.*wrapper\.optimizer"
    ):
        attach_engine(model, wrapper)
    attach_engine(model, wrapper.optimizer)


@pytest.mark.parametrize(
    ("dtype", "reason"), [(torch.bfloat16, "stops moving"), (torch.float64, "averages fp32 alone")]
)
def test_weights_that_are_no_fp32_masters_are_refused_with_the_reason(dtype, reason):
    model = two_layers().to(dtype)
    with pytest.raises(
        UnsupportedEngineError,
        match=rf"'0\.weight' is trained in {dtype}.*{reason}.*in fp32.*mixed_precision",
    ):
        attach_engine(model, sgd(model))


def test_a_model_over_several_devices_is_refused():
    model = two_layers()
    model[1].to("meta")
    with pytest.raises(UnsupportedEngineError, match=r"lie on cpu, meta, expected one device.*device_map"):
        attach_engine(model, sgd(model))
    model[0].to("meta")
    with pytest.raises(
        UnsupportedEngineError, match=r"lie on meta, expected one device.*where they have values"
    ):
        attach_engine(model, sgd(model))


def test_the_module_inside_dataparallel_is_the_one_that_is_averaged():
    model = two_layers()
    assert attach_engine(nn.DataParallel(model), sgd(model)).module is model


def test_a_model_with_nothing_to_train_is_refused():
    model = two_layers()
    optimizer = sgd(model)
    model.requires_grad_(False)
    with pytest.raises(AveragingError, match="no trainable parameter"):
        attach_engine(model, optimizer)


def test_a_tensor_that_is_not_contiguous_is_refused():
    model = nn.ParameterDict({"turned": nn.Parameter(torch.ones(2, 3).t())})
    with pytest.raises(LayoutError, match=r"strides \(1, 3\).*contiguous"):
        attach_engine(model, sgd(model))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_sum_over_working_weights_sees_a_change_of_any_element(dtype):
    flat = torch.randn(41).to(dtype)
    for first, last in [(0, 41), (1, 41), (3, 6), (2, 3), (5, 5)]:
        run = flat[first:last]
        before = checksum([run])
        for i in range(len(run)):
            held = run[i].clone()
            run[i] = held * (1 + torch.finfo(dtype).eps)
            assert checksum([run]) != before
            run[i] = held
        assert checksum([run]) == before

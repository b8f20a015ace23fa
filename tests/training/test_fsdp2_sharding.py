from __future__ import annotations

import logging

import pytest
import torch
from torch import nn

from swaft.errors import ConfigError
from swaft.training.config import TrainConfig
from swaft.training.launch.fsdp2 import blocks_of, find_blocks, obey_fsdp2, resolve_fsdp2

pytestmark = pytest.mark.unit

LAUNCHED = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
    "FSDP_ACTIVATION_CHECKPOINTING": "False",
}


def test_without_fsdp_there_is_no_plugin():
    assert resolve_fsdp2({}, precision="no") is None


def test_gradients_are_summed_in_fp32_whatever_is_computed_in():
    for precision, computed_in in (("no", None), ("bf16", torch.bfloat16), ("fp16", torch.float16)):
        plugin = resolve_fsdp2(LAUNCHED, precision=precision)
        assert plugin is not None
        policy = plugin.mixed_precision_policy
        assert (policy.param_dtype, policy.reduce_dtype, policy.output_dtype) == (
            computed_in,
            torch.float32,
            None,
        )


@pytest.mark.parametrize("environ", [{"FSDP_VERSION": "1"}, {}])
def test_fsdp1_is_refused_with_the_setting_that_mends_it(environ):
    with pytest.raises(ConfigError, match=r"FSDP version 1.*set fsdp_version: 2"):
        resolve_fsdp2({"ACCELERATE_USE_FSDP": "true"} | environ, precision="no")


def test_what_the_launcher_asks_for_and_the_recipe_does_itself_is_obeyed_with_a_line_each(caplog):
    asked = {
        "FSDP_CPU_RAM_EFFICIENT_LOADING": "true",
        "FSDP_ACTIVATION_CHECKPOINTING": "true",
        "FSDP_ACTIVATION_CHECKPOINTING_OFFLOAD": "true",
    }
    train = TrainConfig(output_dir="unused")
    with caplog.at_level(logging.INFO, "swaft"):
        obey_fsdp2(LAUNCHED | asked, train)
    assert [line.split(":")[0] for line in caplog.messages] == [name.lower() for name in asked]
    assert train.gradient_checkpointing
    plugin = resolve_fsdp2(LAUNCHED | asked, precision="no")
    assert plugin is not None
    assert not plugin.cpu_ram_efficient_loading
    assert not plugin.activation_checkpointing


@pytest.mark.parametrize("environ", [LAUNCHED, {"FSDP_ACTIVATION_CHECKPOINTING": "true"}])
def test_where_the_launcher_asks_for_nothing_of_fsdp2_nothing_changes(environ, caplog):
    train = TrainConfig(output_dir="unused")
    with caplog.at_level(logging.INFO, "swaft"):
        obey_fsdp2(environ, train)
    assert caplog.messages == []
    assert not train.gradient_checkpointing


def test_modules_left_out_of_sharding_are_refused():
    with pytest.raises(ConfigError, match="fsdp_ignored_modules"):
        resolve_fsdp2(LAUNCHED | {"FSDP_IGNORED_MODULES": "head"}, precision="no")


def test_what_accelerate_cannot_read_is_refused_though_it_stands_in_no_variable_here():
    with pytest.raises(ConfigError, match=r"the launcher's fsdp_config: .*Invalid auto wrap policy"):
        resolve_fsdp2(LAUNCHED | {"FSDP_AUTO_WRAP_POLICY": "SOME_WRAP"}, precision="no")


def test_layers_that_the_model_does_not_have_are_named_beside_those_it_has():
    asked = {"FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP", "FSDP_TRANSFORMER_CLS_TO_WRAP": "BertLayr"}
    plugin = resolve_fsdp2(LAUNCHED | asked, precision="no")
    assert plugin is not None
    with pytest.raises(ConfigError, match=r"class BertLayr in the model\. Expected some of Sequential;"):
        find_blocks(nn.Sequential(nn.Linear(2, 2)), plugin)


def test_a_block_that_shares_a_weight_with_what_is_outside_of_it_is_not_sharded_by_itself():
    tied, free = (nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)) for _ in range(2))
    model = nn.ModuleList([tied, free, nn.Linear(2, 2)])
    model[2].weight = tied[0].weight
    free[1].weight = free[0].weight  # tied, but within
    assert blocks_of(model, lambda module: isinstance(module, nn.Sequential)) == [free]


def test_a_container_that_is_chosen_by_its_size_gives_its_members_as_blocks():
    asked = {"FSDP_AUTO_WRAP_POLICY": "SIZE_BASED_WRAP", "FSDP_MIN_NUM_PARAMS": "20"}
    plugin = resolve_fsdp2(LAUNCHED | asked, precision="no")
    assert plugin is not None
    layers, one, other = (nn.ModuleList(nn.Linear(3, 3) for _ in range(count)) for count in (2, 1, 1))
    model = nn.Sequential(nn.Linear(2, 2), layers, nn.ModuleDict({"one": one, "other": other}))
    assert find_blocks(model, plugin) == [*layers, *one, *other]

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import DistributedType

from swaft.errors import ConfigError, TrainingError
from swaft.training.config import TrainConfig
from swaft.training.launch.accelerator import (
    check_engine,
    refuse_fp16_on_cpu,
    resolve_deepspeed,
    resolve_precision,
)

pytestmark = pytest.mark.unit

FSDP2 = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
DEEPSPEED = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_MIXED_PRECISION": "no"}


def settings(**changes) -> TrainConfig:
    return TrainConfig(output_dir="unused", **changes)


def started(distributed_type: DistributedType, num_processes: int):
    return SimpleNamespace(distributed_type=distributed_type, num_processes=num_processes)


def resolved(environ, train=None):
    return resolve_deepspeed(train or settings(), environ, precision="no", hidden_size=32)


def test_auto_takes_the_launchers_precision():
    assert resolve_precision(settings(), {"ACCELERATE_MIXED_PRECISION": "bf16"}) == "bf16"
    assert resolve_precision(settings(), {}) == "no"


def test_a_precision_of_the_recipe_holds_where_no_launcher_speaks():
    assert resolve_precision(settings(mixed_precision="bf16"), {}) == "bf16"


def test_recipe_and_launcher_that_disagree_on_precision_are_both_named():
    with pytest.raises(
        ConfigError, match=r"train\.mixed_precision is bf16, but the launcher's mixed_precision is no"
    ):
        resolve_precision(settings(mixed_precision="bf16"), {"ACCELERATE_MIXED_PRECISION": "no"})


def test_a_deepspeed_file_that_switches_bf16_on_is_the_launchers_word(tmp_path):
    file = tmp_path / "mine.json"
    file.write_text('{"bf16": {"enabled": true}, "zero_optimization": {"stage": 2}}')
    environ = DEEPSPEED | {"ACCELERATE_DEEPSPEED_CONFIG_FILE": str(file)}
    assert resolve_precision(settings(), environ) == "bf16"
    stated = environ | {"ACCELERATE_CONFIG_DS_FIELDS": "deepspeed_config_file,mixed_precision"}
    assert resolve_precision(settings(), stated) == "no"  # and fill_auto reports the contradiction
    with pytest.raises(ConfigError, match=r"bf16\.enabled = True"):
        resolved(stated)


def test_fp16_is_refused_where_it_would_run_without_cuda_and_nowhere_else(monkeypatch):
    assert resolve_precision(settings(), {"ACCELERATE_MIXED_PRECISION": "fp16"}) == "fp16"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="needs a CUDA device"):
        refuse_fp16_on_cpu("fp16")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    refuse_fp16_on_cpu("fp16")


def test_deepspeed_with_use_cpu_is_refused_because_accelerate_would_drop_it():
    with pytest.raises(ConfigError, match="use_cpu: false"):
        resolved(DEEPSPEED | {"ACCELERATE_USE_CPU": "True"})


def test_without_deepspeed_there_is_no_deepspeed_configuration():
    assert resolved({"ACCELERATE_MIXED_PRECISION": "no"}) is None


@pytest.mark.parametrize(
    ("distributed_type", "environ"),
    [
        (DistributedType.NO, {}),
        (DistributedType.MULTI_CPU, {"WORLD_SIZE": "2"}),
        (DistributedType.DEEPSPEED, DEEPSPEED | {"WORLD_SIZE": "2"}),
        (DistributedType.FSDP, FSDP2 | {"WORLD_SIZE": "2"}),
    ],
)
def test_what_was_asked_for_passes(distributed_type, environ):
    check_engine(started(distributed_type, int(environ.get("WORLD_SIZE", 1))), environ)


@pytest.mark.parametrize(
    ("distributed_type", "ranks", "environ", "said"),
    [
        (DistributedType.MULTI_CPU, 2, FSDP2, "asked for FSDP2"),
        (DistributedType.MULTI_CPU, 2, DEEPSPEED, "asked for DeepSpeed"),
        (DistributedType.DEEPSPEED, 1, DEEPSPEED, "2 ranks were launched"),
        (DistributedType.NO, 2, {}, "not exchange gradients"),
    ],
)
def test_an_engine_that_was_dropped_or_ranks_that_train_alone_are_an_error(
    distributed_type, ranks, environ, said
):
    with pytest.raises(TrainingError, match=said):
        check_engine(started(distributed_type, ranks), environ | {"WORLD_SIZE": "2"})

"""What DeepSpeed would refuse, or pass over, is told from its configuration alone."""

from __future__ import annotations

import importlib.util

import pytest

from swaft.training.launch import deepspeed_extension
from swaft.training.launch.deepspeed_rules import deepspeed_problems

pytestmark = pytest.mark.unit

PLAIN = {
    "train_batch_size": 64,
    "train_micro_batch_size_per_gpu": 8,
    "gradient_accumulation_steps": 4,
    "gradient_clipping": 0.5,
    "bf16": {"enabled": True},
    "fp16": {"enabled": False},
}
NVME = {"device": "nvme", "nvme_path": "/nowhere"}


def told(zero, **top) -> tuple[list[str], list[str]]:
    return deepspeed_problems(PLAIN | {"zero_optimization": zero} | top, source="mine.json")


@pytest.mark.parametrize(
    "zero",
    [
        {"stage": 0},
        {"stage": 1, "reduce_bucket_size": "auto"},
        {"stage": 2, "allgather_bucket_size": 5e8, "overlap_comm": False, "round_robin_gradients": True},
        {"stage": 3, "sub_group_size": 1e12, "gather_16bit_weights_on_model_save": True},
    ],
)
def test_what_deepspeed_starts_with_is_no_problem(zero):
    assert told(
        zero, steps_per_print=2000, wall_clock_breakdown=False, zero_allow_untested_optimizer=True
    ) == ([], [])


@pytest.mark.parametrize(
    ("zero", "top", "expected"),
    [
        (
            {"stage": 2, "overlap_com": True},
            {},
            "does not have. Did you mean 'overlap_comm'?",
        ),
        ({"stage": 2, "offload_optimiser": {}}, {}, "Did you mean 'offload_optimizer'?"),
        (
            {"stage": 3, "offload_param": {"pin_memroy": 1}},
            {},
            "Did you mean 'pin_memory'?",
        ),
        ({"stage": 3, "cpu_offload_params": True}, {}, "Did you mean 'cpu_offload_param'?"),
        ({"stage": 3, "offload_param": {"device": "disk"}}, {}, "offload_param.device, which DeepSpeed"),
        (
            {"stage": 2},
            {"bf16": {"enabled": True, "auto_cast": False}},
            "sets bf16.auto_cast, which DeepSpeed",
        ),
        ({"stage": 2}, {"compile": {"disable": False}}, "sets compile.disable, which DeepSpeed"),
        ({"stage": 2}, {"elasticity": {"enabled": True}}, "Elastic training has been removed"),
        ({"stage": 3, "mics_shard_size": 2}, {}, "MiCS ZeRO-3 sharding has been removed"),
        ({"stage": 2}, {"fp16": {"enabled": True}}, "cannot be simultaneously enabled"),
        ({"stage": 3}, {"gradient_allreduce_op": "sum"}, "gradient_allreduce_op"),
        (
            {"stage": 1},
            {"gradient_allreduce_op": "sum"},
            "= sum, but the recipe takes the mean",
        ),
        (
            {"stage": 2},
            {"gradient_cliping": 1.0},
            "gradient_cliping, which DeepSpeed does not have. Did you mean ",
        ),
        (
            {"stage": 2},
            {"activation_checkpointing": {"partition_activation": True}},
            "activation_checkpointing.partition_activation, which DeepSpeed does not have",
        ),
        ({"stage": 1, "legacy_stage1": True}, {}, "legacy_stage1"),
        ({"stage": 2, "compute_grad_norm": False}, {}, "compute_grad_norm"),
        ({"stage": 1, "allgather_bucket_size": 5}, {}, "allgather_bucket_size = 5; expected an even number"),
        ({"stage": 3}, {"prescale_gradients": True}, "reduce_scatter = false"),
        ({"stage": 2}, {"managed_gradient_accumulation": False}, "managed_gradient_accumulation"),
        ({"stage": 2}, {"checkpoint": {"writer": {"decoupled": True}}}, "checkpoint.writer.decoupled"),
        (
            {"stage": 2},
            {"data_types": {"param_dtype": "fp32"}},
            "param_dtype = fp32, but the run computes in bf16",
        ),
        ({"stage": 0}, {"data_types": {"grad_accum_dtype": "fp32"}}, "grad_accum_dtype = fp32, but the run"),
        ({"stage": 2}, {"data_types": {"grad_accum_dtype": "fp23"}}, "expected fp32, bf16 or fp16"),
    ],
)
def test_what_deepspeed_refuses_or_passes_over_is_one_problem_with_its_name(zero, top, expected):
    problems, ignored = told(zero, **top)
    assert len(problems) == 1
    assert problems[0].startswith("mine.json")
    assert expected in problems[0]
    assert ignored == []


@pytest.mark.parametrize(
    ("zero", "top", "setting"),
    [
        ({"stage": 2, "zenflow": {"topk_ratio": 0.1}}, {}, "zenflow"),
        ({"stage": 3, "offload_optimizer": {"device": "cpu", "super_offload": True}}, {}, "super_offload"),
        (
            {"stage": 2},
            {"bf16": {"enabled": True, "bf16_master_weights_and_grads": True}},
            "masters of 16 bits",
        ),
        (
            {"stage": 3, "offload_optimizer": {"device": "cpu", "ratio": 0.5}},
            {},
            "offload_optimizer.ratio < 1",
        ),
        ({"stage": 2, "offload_optimizer": NVME}, {}, "offload_optimizer.device=nvme"),
        ({"stage": 3, "offload_param": NVME}, {}, "offload_param.device=nvme"),
        ({"stage": 3, "zero_hpz_partition_size": 2}, {}, "zero_hpz_partition_size > 1"),
        ({"stage": 3, "zero_quantized_weights": True}, {}, "zero_quantized_weights"),
        ({"stage": 3, "zero_quantized_nontrainable_weights": True}, {}, "zero_quantized_weights"),
        ({"stage": 2}, {"torch_autocast": {"enabled": True, "dtype": "float16"}}, "torch_autocast in fp16"),
        ({"stage": 3}, {"compile": {"deepcompile": True}}, "compile.deepcompile"),
        ({"stage": 3}, {"hybrid_engine": {"enabled": True}}, "hybrid_engine.enabled"),
        ({"stage": 2}, {"expert_parallel": {"enabled": True}}, "expert_parallel.enabled"),
        ({"stage": 2}, {"tensor_parallel": {"autotp_size": 2}}, "tensor_parallel.autotp_size > 1"),
    ],
)
def test_a_mode_whose_masters_cannot_be_averaged_is_refused_before_an_engine_starts(zero, top, setting):
    [problem] = told(zero, **top)[0]
    assert problem.startswith("mine.json sets ")
    assert setting in problem
    assert "without averaging" not in problem


def test_every_faulty_section_is_told_at_once():
    problems, _ = told(
        {"stage": 2, "overlap_com": True, "stag": 1}, bf16={"enabeld": True}, compile={"disable": False}
    )
    assert len(problems) == 4


def test_a_name_that_is_like_none_of_deepspeeds_is_said_to_be_ignored():
    others = {
        "_comment": "from elsewhere",
        "monitor_config": {"enabled": True},
        "comms_config": {},
        "fp8": {},
    }
    assert told({"stage": 2}, **others) == ([], sorted(others, key=[*others].index))


def test_a_logger_of_deepspeeds_needs_its_package(monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "wandb" else found(name))
    [problem] = told({"stage": 2}, wandb={"enabled": True})[0]
    assert "wandb.enabled, which needs the package wandb" in problem


def test_without_deepspeed_it_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert told({"stage": 2}) == (
        ["the launcher asks for DeepSpeed, which is not installed; install swaft[deepspeed]"],
        [],
    )


@pytest.fixture
def nothing_built(monkeypatch, tmp_path):
    monkeypatch.setattr(deepspeed_extension, "build_folder", lambda extension="": tmp_path)
    return tmp_path


def test_an_optimizer_on_the_host_needs_a_compiler_or_the_op_that_it_made(nothing_built, monkeypatch):
    offload = {"stage": 2, "offload_optimizer": {"device": "cpu"}}
    monkeypatch.setenv("CXX", "no-such-compiler -O3")
    [problem] = told(offload)[0]
    assert "there is no C++ compiler no-such-compiler" in problem
    assert "zero_force_ds_cpu_optimizer" in problem
    assert told(offload, zero_force_ds_cpu_optimizer=False) == ([], [])
    assert told({"stage": 2}) == ([], [])
    (nothing_built / "cpu_adam.so").touch()
    assert told(offload) == ([], [])


def test_an_optimizer_on_the_host_needs_ninja(nothing_built, monkeypatch):
    monkeypatch.setattr("torch.utils.cpp_extension.is_ninja_available", lambda: False)
    [problem] = told({"stage": 3, "offload_optimizer": {"device": "cpu"}})[0]
    assert "ninja is not installed here" in problem

from __future__ import annotations

import base64
import copy
import json
from dataclasses import replace

import pytest

from swaft.errors import ConfigError
from swaft.training.config import TrainConfig
from swaft.training.launch.deepspeed_config import (
    declared_precision,
    fill_auto,
    launcher_config,
    launcher_problems,
    recipe_values,
)

pytestmark = pytest.mark.unit

TRAIN = TrainConfig(
    output_dir="unused",
    per_device_train_batch_size=8,
    gradient_accumulation_steps=4,
    max_grad_norm=0.5,
    learning_rate=3e-5,
    weight_decay=0.1,
    adam_beta1=0.9,
    adam_beta2=0.98,
    adam_epsilon=1e-6,
    warmup_steps=0,
)

TRAINER_STYLE = {
    "bf16": {"enabled": "auto"},
    "fp16": {"enabled": "auto", "loss_scale": 0},
    "optimizer": {
        "type": "AdamW",
        "params": {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"},
    },
    "zero_optimization": {
        "stage": 3,
        "reduce_bucket_size": "auto",
        "stage3_prefetch_bucket_size": "auto",
        "stage3_param_persistence_threshold": "auto",
        "stage3_gather_16bit_weights_on_model_save": "auto",
    },
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
}


def filled(config, train=TRAIN, hidden_size=64):
    wanted = recipe_values(train, precision="bf16", world_size=2, hidden_size=hidden_size)
    return fill_auto(config, wanted, source="zero3.json")


def test_every_auto_of_a_trainer_style_file_is_filled_from_the_recipe():
    result = filled(TRAINER_STYLE)
    assert result.problems == []
    assert result.config == {
        "bf16": {"enabled": True},
        "fp16": {"enabled": False, "loss_scale": 0},
        "zero_optimization": {
            "stage": 3,
            "reduce_bucket_size": 64 * 64,
            "stage3_prefetch_bucket_size": int(0.9 * 64 * 64),
            "stage3_param_persistence_threshold": 640,
            "stage3_gather_16bit_weights_on_model_save": False,
        },
        "gradient_accumulation_steps": 4,
        "gradient_clipping": 0.5,
        "train_batch_size": 64,
        "train_micro_batch_size_per_gpu": 8,
        "timers": {"throughput": {"enabled": False}},
    }


def test_a_files_own_timers_stay():
    timers = {"throughput": {"enabled": True}}
    assert filled({"zero_optimization": {"stage": 2}, "timers": timers}).config["timers"] == timers


def test_filling_leaves_the_file_as_it_was_read():
    before = copy.deepcopy(TRAINER_STYLE)
    filled(TRAINER_STYLE)
    assert before == TRAINER_STYLE


def test_missing_clipping_takes_the_recipes_and_says_so():
    result = filled({"zero_optimization": {"stage": 2}})
    assert result.config["gradient_clipping"] == 0.5
    assert ("gradient_clipping", 0.5, "missing -> train.max_grad_norm") in result.rows


def test_missing_accumulation_takes_the_recipes_and_says_so():
    result = filled({"zero_optimization": {"stage": 2}})
    assert result.config["gradient_accumulation_steps"] == 4
    assert ("gradient_accumulation_steps", 4, "missing -> train.gradient_accumulation_steps") in result.rows


def test_clipping_that_is_off_in_the_recipe_is_off_and_not_1():
    result = filled(TRAINER_STYLE, replace(TRAIN, max_grad_norm=0.0))
    assert result.config["gradient_clipping"] == 0.0


def test_the_optimizer_block_that_deepspeed_would_build_from_is_gone_and_the_table_says_who_trains():
    result = filled(TRAINER_STYLE)
    assert "optimizer" not in result.config
    assert ("optimizer", "torch AdamW") in [row[:2] for row in result.rows]


@pytest.mark.parametrize("stage", [2, 3])
def test_offloading_the_optimizer_says_which_class_takes_the_place_of_the_recipes(stage):
    offload = {"zero_optimization": {"stage": stage, "offload_optimizer": {"device": "cpu"}}}
    for config in (offload, TRAINER_STYLE | offload):
        told = [row[1] for row in filled(config).rows if row[0] == "optimizer"]
        assert told == ["DeepSpeedCPUAdam"]


@pytest.mark.parametrize(
    "config",
    [
        {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "none"}}},
        {"zero_optimization": {"stage": 3, "offload_optimizer": None}},
        {"zero_optimization": {"stage": 3, "offload_param": {"device": "cpu"}}},
        {
            "zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu"}},
            "zero_force_ds_cpu_optimizer": False,
        },
    ],
)
def test_where_the_recipes_optimizer_stays_nothing_else_is_told(config):
    assert "DeepSpeedCPUAdam" not in str(filled(config).rows)


def test_the_table_names_value_and_source_of_each_filled_key():
    rows = {key: (value, source) for key, value, source in filled(TRAINER_STYLE).rows}
    assert rows["train_micro_batch_size_per_gpu"] == (8, "auto -> train.per_device_train_batch_size")
    assert rows["zero_optimization.reduce_bucket_size"] == (4096, "auto -> the model's hidden size")


def test_numbers_that_agree_are_no_problem():
    agreeing = {"zero_optimization": {"stage": 1}, "train_batch_size": 64, "gradient_clipping": 0.5}
    assert filled(agreeing).problems == []


@pytest.mark.parametrize(
    ("change", "found", "wanted"),
    [
        ({"train_micro_batch_size_per_gpu": 3}, "train_micro_batch_size_per_gpu = 3", "8"),
        ({"gradient_accumulation_steps": 2}, "gradient_accumulation_steps = 2", "4"),
        ({"train_batch_size": 7}, "train_batch_size = 7", "64"),
        ({"gradient_clipping": 1.0}, "gradient_clipping = 1.0", "0.5"),
        ({"bf16": {"enabled": False}}, "bf16.enabled = False", "True"),
        ({"fp16": {"enabled": True}}, "fp16.enabled = True", "False"),
        ({"optimizer": {"type": "AdamW", "params": {"lr": 1e-3}}}, "optimizer.params.lr = 0.001", "3e-05"),
        ({"optimizer": {"type": "AdamW", "params": {"betas": [0.9, 0.999]}}}, "[0.9, 0.999]", "[0.9, 0.98]"),
    ],
)
def test_a_number_that_differs_is_reported_with_both_values_and_the_setting(change, found, wanted):
    (problem,) = filled({"zero_optimization": {"stage": 2}} | change).problems
    assert found in problem
    assert f" of this run is {wanted}; make them equal" in problem
    assert "zero3.json" in problem


@pytest.mark.parametrize(
    "optimizer",
    [{"type": "Lamb"}, {"type": "Adam", "params": {"adam_w_mode": False}}, {"type": "OneBitAdam"}],
)
def test_an_optimizer_the_recipe_does_not_train_with_is_refused(optimizer):
    (problem,) = filled({"zero_optimization": {"stage": 2}, "optimizer": optimizer}).problems
    assert optimizer["type"] in problem
    assert "AdamW" in problem


@pytest.mark.parametrize(
    ("kind", "params"),
    [
        (
            "WarmupDecayLR",
            dict.fromkeys(("warmup_min_lr", "warmup_max_lr", "warmup_num_steps", "total_num_steps"), "auto"),
        ),
        (
            "WarmupLR",
            {"warmup_min_lr": 0, "warmup_max_lr": 3e-5, "warmup_num_steps": 100, "warmup_type": "linear"},
        ),
        ("WarmupCosineLR", {}),
    ],
)
def test_a_scheduler_block_that_agrees_is_set_aside_with_one_line(kind, params):
    scheduler = {"type": kind, "params": params}
    result = filled(
        {"zero_optimization": {"stage": 2}, "scheduler": scheduler},
        replace(TRAIN, warmup_steps=100),
    )
    assert result.problems == []
    assert "scheduler" not in result.config
    [said] = [row for row in result.rows if row[0] == "scheduler"]
    assert said[1] == "set aside"
    assert kind in said[2]
    assert "train.lr_scheduler_type" in said[2]


@pytest.mark.parametrize(
    ("params", "found", "setting"),
    [
        ({"warmup_num_steps": 50}, "scheduler.params.warmup_num_steps = 50", "train.warmup_steps"),
        ({"warmup_max_lr": 1e-4}, "scheduler.params.warmup_max_lr = 0.0001", "train.learning_rate"),
        ({"total_num_steps": 900}, "scheduler.params.total_num_steps = 900", "train.max_steps"),
        ({"warmup_type": "log", "warmup_num_steps": "auto"}, "warmup_type = log", "linear"),
    ],
)
def test_a_number_of_a_scheduler_block_that_differs_is_a_problem(params, found, setting):
    scheduler = {"type": "WarmupDecayLR", "params": params}
    (problem,) = filled({"zero_optimization": {"stage": 2}, "scheduler": scheduler}).problems
    assert found in problem
    assert setting in problem


@pytest.mark.parametrize("kind", ["OneCycle", "LRRangeTest"])
def test_a_scheduler_of_another_kind_is_refused_and_names_the_setting_to_use(kind):
    (problem,) = filled({"zero_optimization": {"stage": 2}, "scheduler": {"type": kind}}).problems
    assert kind in problem
    assert "train.lr_scheduler_type" in problem


@pytest.mark.parametrize(
    ("old", "new"), [("cpu_offload", "offload_optimizer"), ("cpu_offload_param", "offload_param")]
)
def test_an_old_name_of_offloading_is_obeyed_by_its_new_one(old, new):
    result = filled({"zero_optimization": {"stage": 3, old: True}})
    assert result.config["zero_optimization"] == {"stage": 3, new: {"device": "cpu"}}
    assert (f"zero_optimization.{new}", {"device": "cpu"}, f"by its old name, {old}") in result.rows


def test_all_problems_are_reported_at_once():
    config = {
        "zero_optimization": {"stage": 2},
        "gradient_clipping": 3,
        "train_batch_size": 7,
        "scheduler": {"type": "OneCycle"},
    }
    assert len(filled(config).problems) == 3


def test_an_auto_that_nothing_fills_is_a_problem_where_deepspeed_has_no_default_for_it():
    config = {"zero_optimization": {"stage": 3, "stage3_max_live_parameters": "auto"}}
    result = filled(config | {"communication_data_type": "auto"})
    (problem,) = result.problems
    assert "communication_data_type" in problem
    assert result.config["zero_optimization"] == {"stage": 3}
    left = ("zero_optimization.stage3_max_live_parameters", "left out", "auto -> DeepSpeed's default")
    assert left in result.rows


def test_a_name_without_stage3_before_it_is_filled_like_the_one_with_it():
    short = {
        "prefetch_bucket_size": "auto",
        "gather_16bit_weights_on_model_save": True,
        "max_live_parameters": 0,
    }
    zero = filled({"zero_optimization": {"stage": 3, **short}}).config["zero_optimization"]
    assert zero == {
        "stage": 3,
        "stage3_prefetch_bucket_size": int(0.9 * 64 * 64),
        "stage3_gather_16bit_weights_on_model_save": True,
        "stage3_max_live_parameters": 0,
    }


def test_without_a_hidden_size_the_bucket_sizes_stay_for_accelerate():
    result = filled(TRAINER_STYLE, hidden_size=None)
    assert result.problems == []
    assert result.config["zero_optimization"]["reduce_bucket_size"] == "auto"


def test_the_launchers_file_is_read_from_a_path_or_from_encoded_text(tmp_path):
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(TRAINER_STYLE))
    encoded = base64.urlsafe_b64encode(json.dumps(TRAINER_STYLE).encode()).decode()
    assert launcher_config({"ACCELERATE_DEEPSPEED_CONFIG_FILE": str(path)}) == (TRAINER_STYLE, str(path))
    assert launcher_config({"ACCELERATE_DEEPSPEED_CONFIG_FILE": encoded})[0] == TRAINER_STYLE


def test_without_a_file_the_launchers_single_values_make_the_configuration():
    environ = {
        "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3",
        "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "cpu",
        "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": "none",
    }
    config, _ = launcher_config(environ)
    assert config == {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu"}}}


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"nowhere\.json"):
        launcher_config({"ACCELERATE_DEEPSPEED_CONFIG_FILE": str(tmp_path / "nowhere.json")})


def test_a_refused_relative_name_says_in_which_folder_it_starts(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=rf"relative names start in {tmp_path}"):
        launcher_config({"ACCELERATE_DEEPSPEED_CONFIG_FILE": "ds_configs/zero3.json"})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"zero_optimization": {"stage": "auto"}}, "stage is 'auto'; expected 0, 1, 2 or 3"),
        ({"zero_optimization": {"stage": "3"}}, "stage is '3'; expected 0, 1, 2 or 3"),
        (
            {"zero_optimization": {"stage": 2, "offload_optimizer": "cpu"}},
            "_optimizer\" is 'cpu'; expected a section",
        ),
        (
            {"zero_optimization": {"stage": 1}, "optimizer": {"params": None}},
            '"optimizer.params" is None; expected',
        ),
        (
            {"zero_optimization": {"stage": 1}, "optimizer": "AdamW"},
            "\"optimizer\" is 'AdamW'; expected a section",
        ),
    ],
)
def test_a_file_that_names_no_stage_or_no_section_is_refused(tmp_path, content, message):
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(content))
    with pytest.raises(ConfigError, match=message):
        launcher_config({"ACCELERATE_DEEPSPEED_CONFIG_FILE": str(path)})


def test_deepspeeds_older_name_of_bf16_is_read_and_an_offload_may_be_null(tmp_path):
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({"bfloat16": {"enabled": True}, "zero_optimization": {"offload_param": None}}))
    config, _ = launcher_config({"ACCELERATE_DEEPSPEED_CONFIG_FILE": str(path)})
    assert declared_precision(config) == "bf16"


def test_single_values_of_the_accelerate_file_that_would_be_dropped_are_reported():
    environ = {
        "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "1",
        "ACCELERATE_GRADIENT_CLIPPING": "0.5",
        "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2",
    }
    problems = launcher_problems(environ, TRAIN, {"zero_optimization": {"stage": 3}})
    assert len(problems) == 2
    assert "gradient_accumulation_steps = 1" in problems[0]
    assert "zero_stage = 2" in problems[1]

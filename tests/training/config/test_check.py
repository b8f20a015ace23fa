"""Settings that cannot work are found before anything is loaded."""

from __future__ import annotations

import math
from typing import get_args

import pytest

from swaft.noise.presets import PRESETS
from swaft.options import docs_of
from swaft.training.config import AveragingConfig, ModelConfig, TrainConfig, check_averaging, check_config
from swaft.training.config.values import sections, settings
from swaft.training.data.causal_lm import CausalDataConfig
from swaft.training.data.classification import ClassificationConfig, DataConfig
from swaft.training.data.question_answering import QuestionAnsweringConfig
from swaft.training.data.seq2seq import (
    Seq2SeqConfig,
    Seq2SeqDataConfig,
    Seq2SeqModelConfig,
    Seq2SeqTrainConfig,
)

pytestmark = pytest.mark.unit


def config(**changes: object) -> ClassificationConfig:
    made = ClassificationConfig(
        model=ModelConfig(model_name_or_path="demo"),
        data=DataConfig(task_name="mrpc"),
        train=TrainConfig(output_dir="runs/x"),
    )
    for name, value in changes.items():
        section, leaf = name.split("__")
        setattr(getattr(made, section), leaf, value)
    return made


def test_defaults_have_no_problem():
    assert check_config(config()) == []


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("train__learning_rate", math.nan),
        ("train__num_train_epochs", 0.0),
        ("train__max_steps", 0),
        ("train__max_steps", -2),
        ("train__per_device_train_batch_size", 0),
        ("train__gradient_accumulation_steps", 0),
        ("train__warmup_steps", 1.0),
        ("train__warmup_steps", -1),
        ("train__adam_beta2", 1.0),
        ("train__output_dir", ""),
        ("train__ddp_timeout", 0),
        ("data__max_seq_length", 0),
        ("data__max_train_samples", 0),
        ("averaging__start", 1.5),
        ("averaging__start", -1),
        ("averaging__every", 0),
        ("averaging__decay", 1.0),
        ("averaging__decay", 0.0),
        ("averaging__decay", math.nan),
        ("averaging__half_life", 0),
        ("averaging__half_life", 0.0),
        ("averaging__half_life", 100.0),
        ("averaging__half_life", math.nan),
        ("averaging__warmup", "rampp"),
        ("averaging__last", 1),
        ("averaging__weights", "quadratic"),
        ("averaging__ema_power", -0.1),
        ("averaging__bias_power", math.inf),
        ("averaging__lag", 0),
        ("averaging__multiplier", -1.0),
        ("averaging__snapshots", 0),
        ("averaging__blocks", 1),
        ("averaging__sigma_rel", 0.0),
        ("averaging__sigma_rel", 0.3),
        ("averaging__precision", "half"),
        ("averaging__threads", 0),
        ("averaging__blend", 2.5),
        ("averaging__blend", math.nan),
        ("noise__sigma", -1e-5),
        ("noise__sigma", math.nan),
        ("noise__weight", -1.0),
        ("noise__kind", "r2f"),
        ("eval__eval_steps", 0),
    ],
)
def test_value_out_of_range_is_one_problem_that_names_its_setting(name, value):
    [problem] = check_config(config(**{name: value}))
    assert problem.startswith(name.replace("__", ".") + ":")


@pytest.mark.parametrize(
    ("name", "value", "meant"),
    [
        ("averaging__rule", "swaa", "swa"),
        ("eval__metric", "acuracy", "accuracy"),
        ("track__report_to", "wanbd", "wandb"),
        ("train__lr_scheduler_type", "linaer", "linear"),
    ],
)
def test_misspelt_choice_gets_a_suggestion(name, value, meant):
    [problem] = check_config(config(**{name: value}))
    assert problem.startswith(name.replace("__", ".") + ":")
    assert f"Did you mean '{meant}'?" in problem


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("train__logging_steps", 0, "train.logging_steps: is 0, expected a whole number, at least 1"),
        ("train__weight_decay", -math.inf, "train.weight_decay: is -inf, expected a number, at least 0"),
        (
            "train__weight_decay",
            math.nan,
            "train.weight_decay: is nan, expected a number, at least 0",
        ),
        (
            "train__learning_rate",
            math.inf,
            "train.learning_rate: is inf, expected a number, above 0",
        ),
        ("train__learning_rate", 0.0, "train.learning_rate: is 0.0, expected a number, above 0"),
        (
            "train__ddp_timeout",
            10**15,
            "train.ddp_timeout: is 1000000000000000, expected a whole number, at least 1 and at most 31536000",
        ),
    ],
)
def test_a_number_out_of_range_is_told_with_the_range(name, value, said):
    [problem] = check_config(config(**{name: value}))
    assert problem.startswith(said)


@pytest.mark.parametrize("value", [0, 3, 0.0, 0.5, 1.0])
def test_every_sensible_start_is_taken(value):
    assert check_config(config(averaging__rule="swa", averaging__start=value)) == []


def test_rows_have_to_come_from_exactly_one_place():
    assert "no rows named" in check_config(config(data__task_name=None))[0]
    assert "keep one" in check_config(config(data__train_file="a.csv"))[0]
    [problem] = check_config(config(data__validation_file="a.csv"))
    assert problem.startswith("data.validation_file:")
    [problem] = check_config(config(data__dataset_config_name="x"))
    assert problem.startswith("data.dataset_config_name:")


@pytest.mark.parametrize(
    ("section", "total_steps", "fits"),
    [
        (AveragingConfig(rule="swa", start=0.5), 100, True),
        (AveragingConfig(rule="swa", start=100), 99, False),
        (AveragingConfig(rule="swa", start=98), 99, True),
        (AveragingConfig(rule="swa", start=90, every=20), 99, False),
        (AveragingConfig(rule="ema", start=200), 99, False),
        (AveragingConfig(rule="ema", start=0.0), 99, True),
        (AveragingConfig(rule="ema", decay=0.9, half_life=10), 99, False),
        (AveragingConfig(rule="ema", include_start=False), 99, False),
        (AveragingConfig(rule="lawa", start=0.5, last=51), 100, True),
        (AveragingConfig(rule="lawa", start=0.5, last=52), 100, False),
        (AveragingConfig(rule="merge", weights="1-sqrt"), 99, True),
        (AveragingConfig(rule="merge"), 99, False),
        (AveragingConfig(rule="bema", every=400), 99, False),
        (AveragingConfig(rule="power_ema"), 99, True),
        (AveragingConfig(rule="windows"), 99, True),
        (AveragingConfig(rule="none", start=200), 99, False),
        (AveragingConfig(rule="none", threads=2, precision="plain", spill_dir="/tmp"), 99, True),
    ],
)
def test_average_that_would_stay_empty_is_found_once_the_length_is_known(section, total_steps, fits):
    found = check_averaging(section, total_steps)
    assert (found == []) is fits
    assert all(problem.startswith(("averaging.", "section averaging: ")) for problem in found)


def test_max_steps_tells_the_length_before_the_run():
    [problem] = check_config(config(averaging__rule="swa", averaging__start=100, train__max_steps=50))
    assert problem.startswith("section averaging: start=100 with every=1")
    assert check_config(config(averaging__rule="swa", averaging__start=100, train__max_steps=150)) == []


@pytest.mark.parametrize("recipe", [ClassificationConfig, Seq2SeqConfig, QuestionAnsweringConfig])
def test_every_setting_has_a_doc(recipe):
    for section, section_class in sections(recipe).items():
        texts = docs_of(section_class)
        for name in settings(recipe):
            owner, short = name.split(".")
            assert owner != section or len(texts[short].split()) >= 3, name


def test_choices_of_the_averaging_section_are_those_of_the_rules():
    from swaft.averaging.rules import RULES
    from swaft.averaging.rules.means import Decay, Warmup

    known = settings(ClassificationConfig)
    assert known["averaging.rule"].choices == ("none", *RULES)
    assert known["averaging.warmup"].choices == get_args(Warmup)
    assert known["averaging.weights"].choices == get_args(Decay)


def test_choices_of_the_noise_section_are_those_of_the_objectives():
    from swaft.noise.generator import Noise
    from swaft.noise.loss import Detach
    from swaft.noise.presets import Masks, Passes, Reduction
    from swaft.noise.spectral import Layers

    known = settings(ClassificationConfig)
    assert known["noise.preset"].choices == tuple(PRESETS)
    assert known["noise.noise"].choices == get_args(Noise)
    assert known["noise.masks"].choices == get_args(Masks)
    assert known["noise.reduction"].choices == get_args(Reduction)
    assert known["noise.detach"].choices == get_args(Detach)
    assert known["noise.passes"].choices == get_args(Passes)
    assert known["noise.layers"].choices == get_args(Layers)


def seq2seq_config(**changes: object) -> Seq2SeqConfig:
    made = Seq2SeqConfig(
        model=Seq2SeqModelConfig(model_name_or_path="t5-small"),
        data=Seq2SeqDataConfig(task_name="e2e"),
        train=Seq2SeqTrainConfig(output_dir="runs/x"),
    )
    for name, value in changes.items():
        section, leaf = name.split("__")
        setattr(getattr(made, section), leaf, value)
    return made


def test_defaults_of_seq2seq_have_no_problem():
    assert check_config(seq2seq_config()) == []
    new = {"model__model_name_or_path": None, "model__config": {"model_type": "t5"}, "model__vocab_size": 300}
    assert check_config(seq2seq_config(**new)) == []


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("model__model_name_or_path", None),
        ("model__config", {"model_type": "t5"}),
        ("model__vocab_size", 4096),
        ("data__task_name", None),
        ("data__max_source_length", 1),
        ("data__max_target_length", 0),
        ("train__label_smoothing_factor", 1.0),
        ("train__label_smoothing_factor", -0.1),
        ("train__label_smoothing_factor", math.nan),
        ("eval__metric", "accuracy"),
        ("eval__metric", "ruoge"),
        ("eval__num_beams", 0),
        ("eval__max_new_tokens", 0),
        ("eval__num_samples", -1),
    ],
)
def test_value_out_of_range_of_seq2seq_is_one_problem_that_names_its_setting(name, value):
    [problem] = check_config(seq2seq_config(**{name: value}))
    assert problem.startswith(name.replace("__", ".") + ":")


@pytest.mark.parametrize("size", [0, -1, "many", None, True])
def test_a_new_model_without_embeddings_is_refused(size):
    entries = {"model_type": "bart", "vocab_size": size}
    made = seq2seq_config(model__model_name_or_path=None, model__config=entries)
    [problem] = check_config(made)
    assert problem.startswith(f"model.config: vocab_size is {size!r}; expected 1 or more")


@pytest.mark.parametrize(
    ("one", "other"),
    [("source_column", "target_column"), ("source_lang", "target_lang")],
)
def test_a_column_or_language_without_its_counterpart_is_named(one, other):
    for given, missing in ((one, other), (other, one)):
        [problem] = check_config(seq2seq_config(**{f"data__{given}": "x"}))
        assert problem.startswith(f"data.{missing}: is not set")


@pytest.mark.parametrize(
    ("data", "name"),
    [
        (CausalDataConfig, "prompt_prefix"),
        (CausalDataConfig, "prompt_suffix"),
        (Seq2SeqDataConfig, "source_prefix"),
    ],
)
def test_a_line_break_that_a_shell_does_not_read_as_one_is_a_problem(data, name):
    rows = {"task_name": "x"}
    assert [*data(**rows, **{name: "a\n"}).conflicts()] == []
    [(setting, fault)] = data(**rows, **{name: r"a\n"}).conflicts()
    assert setting == name
    assert "a backslash and an n, not a line break" in fault


def test_what_is_said_about_texts_that_are_not_generated_is_a_problem():
    quiet = {"eval__predict_with_generate": False}
    assert check_config(seq2seq_config(**quiet)) == []
    for name, value in (("metric", "rouge"), ("num_beams", 4), ("max_new_tokens", 9)):
        [problem] = check_config(seq2seq_config(**quiet, **{f"eval__{name}": value}))
        assert problem.startswith(f"eval.{name}:")


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"model__lora_r": 8}, "model.lora_r: is 8, which model.use_peft=false does not use (true does)"),
        ({"model__lora_target_modules": "query"}, "model.lora_target_modules: is query, which model"),
        ({"model__use_peft": True, "model__lora_r": 0}, "model.lora_r: is 0, expected"),
        ({"model__use_peft": True, "model__lora_alpha": 0}, "model.lora_alpha: is 0, expected"),
        ({"model__use_peft": True, "model__lora_dropout": 1.0}, "model.lora_dropout: is 1.0, expected"),
        ({"model__use_peft": True, "model__lora_dropout": math.nan}, "model.lora_dropout: is nan, expected"),
        (
            {"model__use_peft": True, "model__lora_target_modules": "a,,b"},
            "model.lora_target_modules: 'a,,b' holds",
        ),
    ],
)
@pytest.mark.parametrize("recipe", ["classification", "seq2seq"])
def test_adapters_that_cannot_be_are_one_problem_in_every_recipe(recipe, changes, expected):
    made = config(**changes) if recipe == "classification" else seq2seq_config(**changes)
    [problem] = check_config(made)
    assert problem.startswith(expected)


def test_adapters_need_a_pretrained_model():
    made = seq2seq_config(
        model__use_peft=True, model__model_name_or_path=None, model__config={"model_type": "t5"}
    )
    [problem] = check_config(made)
    assert problem.startswith("model.use_peft: adapters change a pretrained model")


STOP = {"eval__early_stopping_patience": 2, "eval__eval_steps": 10}
AVERAGED = {"averaging__rule": "swa", "eval__eval_steps": 10}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"eval__keep_best": "last"}, "eval.keep_best: needs evaluations while training"),
        ({"eval__early_stopping_patience": 2}, "eval.early_stopping_patience: needs evaluations"),
        ({**STOP, "eval__early_stopping_patience": 0}, "eval.early_stopping_patience: is 0, expected"),
        (
            {**STOP, "eval__early_stopping_threshold": -0.1},
            "eval.early_stopping_threshold: is -0.1, expected",
        ),
        ({"eval__early_stopping_threshold": 0.1}, "eval.early_stopping_threshold: 0.1 is used with"),
        ({"eval__keep_best": "averaged", "eval__eval_steps": 5}, "eval.keep_best: averaged needs averaged"),
        ({"eval__keep_best": "either", "eval__eval_steps": 5}, "eval.keep_best: either needs averaged"),
        ({"eval__metric_for_best_model": "loss"}, "eval.metric_for_best_model: loss decides between"),
        ({"averaging__blend": 0.3}, "averaging.blend: is 0.3, which averaging.rule=none"),
        (
            {"averaging__start": 0.25},
            "averaging.start: is 0.25, which averaging.rule=none does not use (swa, ",
        ),
        ({**AVERAGED, "averaging__sigma_rel": 0.1}, "averaging.sigma_rel: is 0.1, which averaging.rule=swa"),
        ({"averaging__every": 10}, "averaging.every: is 10, which averaging.rule=none"),
        (
            {"noise__weight": 2.0},
            "noise.weight: is 2.0, which noise.kind=none does not use (r3f, r4f, rdrop do)",
        ),
        ({"noise__kind": "rdrop", "noise__sigma": 0.1}, "noise.sigma: is 0.1, which noise.kind=rdrop"),
        ({"averaging__search_blend": True}, "averaging.search_blend: is true, which averaging"),
        (
            {**AVERAGED, "averaging__blend": 0.3, "averaging__search_blend": True},
            "averaging.blend: is chosen",
        ),
        (
            {"averaging__rule": "windows", "averaging__blend": 0.3},
            "averaging.blend: is 0.3, which averaging.rule=windows does not use",
        ),
        (
            {**STOP, "averaging__rule": "merge", "averaging__weights": "cosine"},
            "eval.early_stopping_patience: averaging.rule=merge weights",
        ),
    ],
)
def test_settings_that_do_not_go_together_are_one_problem(changes, expected):
    [problem] = check_config(config(**changes))
    assert problem.startswith(expected)


@pytest.mark.parametrize(
    "changes",
    [
        {**AVERAGED, "eval__keep_best": "averaged"},
        {**AVERAGED, "eval__keep_best": "either", "eval__metric_for_best_model": "loss"},
        {**STOP, "eval__early_stopping_threshold": 0.01, "eval__metric_for_best_model": "f1"},
        {"averaging__rule": "windows", "eval__metric_for_best_model": "f1"},
        {**AVERAGED, "averaging__search_blend": True, "eval__metric_for_best_model": "f1"},
        {**AVERAGED, "averaging__blend": -0.3},
        {"model__use_peft": True, "model__lora_r": 8, "model__lora_target_modules": "query, value"},
    ],
)
def test_choosing_between_weights_and_adapters_that_can_be_have_no_problem(changes):
    assert check_config(config(**changes)) == []

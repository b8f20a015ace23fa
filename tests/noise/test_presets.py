from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from swaft.errors import ConfigError
from swaft.noise import PRESETS, R3F, R4F, NoiseSettings, RDrop
from swaft.noise.presets import resolve_settings

pytestmark = pytest.mark.unit


def test_no_preset_is_the_paper():
    assert R3F().settings_for(torch.nn.Linear(1, 1)) == NoiseSettings()
    assert NoiseSettings() == NoiseSettings(
        noise="uniform", sigma=1e-5, masks="shared", reduction="mean", detach="none"
    )
    assert resolve_settings("paper", generates=True) == NoiseSettings()


def test_relative_measures_sigma_against_the_embeddings():
    settings = resolve_settings("relative", generates=False)
    assert (settings.sigma, settings.relative, settings.masks) == (1.0, True, "shared")


def test_fairseq_differs_between_classifying_and_generating_as_the_released_code_does():
    classifying, generating = (resolve_settings("fairseq", generates=g) for g in (False, True))
    assert (classifying.noise, classifying.detach_embedding) == ("uniform", True)
    assert (generating.noise, generating.detach_embedding) == ("normal", False)
    for settings in (classifying, generating):
        assert (settings.sigma, settings.masks, settings.reduction) == (1e-5, "independent", "batchmean")


def test_rdrop_has_no_noise_and_halves_the_divergence():
    settings = resolve_settings("rdrop", generates=False)
    assert settings == NoiseSettings(sigma=0.0, masks="independent", scale=0.5, ce_on_noised=True)
    assert resolve_settings("rdrop_paper", generates=True) == replace(settings, task_scale=2.0)


def test_explicit_values_override_the_preset_and_none_does_not():
    settings = resolve_settings("fairseq", generates=False, sigma=0.5, masks="shared", noise=None)
    assert (settings.sigma, settings.masks, settings.noise) == (0.5, "shared", "uniform")
    assert settings.reduction == "batchmean"


@pytest.mark.parametrize("preset", PRESETS)
def test_zero_can_override_every_preset_where_the_masks_differ(preset):
    assert resolve_settings(preset, generates=False, sigma=0, masks="independent").sigma == 0
    with pytest.raises(ConfigError, match="sigma=0 with masks='shared': nothing differs"):
        resolve_settings(preset, generates=False, sigma=0, masks="shared")


def test_every_invalid_value_is_named_at_once():
    with pytest.raises(ConfigError) as caught:
        R3F(
            noise="gamma",  # type: ignore[arg-type]
            sigma=-1.0,
            preset="papr",
            masks="same",  # type: ignore[arg-type]
            detach="all",  # type: ignore[arg-type]
            reduction="max",  # type: ignore[arg-type]
            passes="three",  # type: ignore[arg-type]
            label_smoothing=1.0,
            fused="no",  # type: ignore[arg-type]
        )
    text = str(caught.value)
    assert len(caught.value.problems) == 9
    for expected in (
        "noise is 'gamma', expected one of uniform, normal",
        "masks is 'same', expected one of shared, independent",
        "detach is 'all', expected one of none, clean, noised, target",
        "reduction is 'max', expected one of mean, batchmean",
        "preset is 'papr', expected one of paper, relative, fairseq, rdrop",
        "sigma is -1.0, expected a number, at least 0",
        "passes is 'three', expected one of two, doubled",
        "label_smoothing is 1.0, expected a number, at least 0 and below 1",
        "fused is 'no', expected true or false",
    ):
        assert expected in text


@pytest.mark.parametrize(
    ("objective", "weight"),
    [*((R3F, weight) for weight in (-1.0, math.nan, math.inf, "1")), (R4F, -1.0), (RDrop, -1.0)],
)
def test_weight_must_be_a_finite_number_not_below_zero(objective, weight):
    with pytest.raises(ConfigError, match="weight is"):
        objective(weight)


@pytest.mark.parametrize("sigma", [math.nan, math.inf, "1e-5"])
def test_sigma_must_be_a_finite_number(sigma):
    with pytest.raises(ConfigError, match="sigma is"):
        R3F(sigma=sigma)


@pytest.mark.parametrize("objective", [R3F, R4F, RDrop])
def test_a_seed_must_be_a_whole_number(objective):
    with pytest.raises(ConfigError, match=r"seed is 1\.5, expected a whole number"):
        objective(seed=1.5)  # type: ignore[arg-type]


@pytest.mark.parametrize("preset", ["paper", "relative", "fairseq", "alpha"])
def test_rdrop_takes_its_own_presets_alone(preset):
    with pytest.raises(ConfigError, match=f"preset is '{preset}', expected one of rdrop, rdrop_paper"):
        RDrop(preset=preset)  # type: ignore[arg-type]


def test_unknown_layers_are_refused():
    with pytest.raises(ConfigError, match="layers is 'first', expected one of all, last"):
        R4F(layers="first")  # type: ignore[arg-type]


def test_a_doubled_pass_cannot_be_one_sided():
    with pytest.raises(ConfigError, match="passes='doubled' with detach='noised'"):
        R3F(passes="doubled", detach="noised")


def test_nothing_but_the_noised_side_constant_is_one_sided():
    assert resolve_settings("paper", generates=True, detach="noised").one_sided
    assert not resolve_settings("paper", generates=True, detach="target").one_sided
    assert not resolve_settings("rdrop", generates=True, detach="noised").one_sided


def test_every_objective_takes_the_options_of_its_passes():
    for objective in (R3F, R4F, RDrop):
        built = objective(passes="doubled", fused=False, label_smoothing=0.1)
        for settings in (built._classifying, built._generating):
            assert (settings.passes, settings.fused, settings.label_smoothing) == ("doubled", False, 0.1)

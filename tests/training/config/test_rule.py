from __future__ import annotations

from dataclasses import fields

import pytest

from swaft.averaging import rules
from swaft.errors import ConfigError
from swaft.training.config import AveragingConfig, build_rule

pytestmark = pytest.mark.unit


def test_rules_carry_the_settings():
    assert build_rule(AveragingConfig()) is None
    swa = build_rule(AveragingConfig(rule="swa", start=0.25, every=3, include_start=False))
    assert swa == rules.SWA(start=0.25, every=3, include_start=False)
    ema = build_rule(AveragingConfig(rule="ema", start=10, every=2, decay=0.99))
    assert ema == rules.EMA(decay=0.99, start=10, every=2)
    lawa = build_rule(AveragingConfig(rule="lawa", start=0, every=5, last=3))
    assert lawa == rules.LAWA(last=3, start=0, every=5)
    merge = build_rule(AveragingConfig(rule="merge", weights="cosine"))
    assert merge == rules.Merge(weights="cosine", start=0.5, every=1)
    bema = build_rule(AveragingConfig(rule="bema", start=0, every=400, lag=5, multiplier=2.0))
    assert bema == rules.BEMA(lag=5, multiplier=2.0)
    power_ema = build_rule(AveragingConfig(rule="power_ema", snapshots=4))
    assert power_ema == rules.PowerEMA(snapshots=4)
    for sigma, tracked in ((0.05, (0.05, 0.1)), (0.1, (0.1, 0.05)), (0.15, (0.15, 0.1))):
        plan = build_rule(AveragingConfig(rule="power_ema", sigma_rel=sigma)).plan(1000)
        assert plan.sigma_rel == tracked
        assert all(plan.readout(members) == {0: 1.0} for members in (1, 2, 50, 1001)), "exact from the start"
    windows = build_rule(AveragingConfig(rule="windows", start=0, blocks=8))
    assert windows == rules.Windows(blocks=8)


def test_a_null_leaves_the_choice_to_the_rule():
    for name, rule in rules.RULES.items():
        options = {"weights": "linear"} if name == "merge" else {}
        built = build_rule(AveragingConfig(rule=name, **options))
        assert built == rule(every=1, **options)
    built = build_rule(AveragingConfig(rule="ema", half_life=0.1, warmup="debias"))
    assert built == rules.EMA(half_life=0.1, warmup="debias")


def test_every_argument_of_a_rule_is_a_setting_and_every_setting_is_of_a_rule():
    arguments = {argument.name for rule in rules.RULES.values() for argument in fields(rule)}
    settings = {setting.name for setting in fields(AveragingConfig)}
    assert arguments <= settings
    assert settings - arguments == {"rule", "precision", "spill_dir", "threads", "blend", "search_blend"}


def test_an_option_of_another_rule_is_an_error():
    with pytest.raises(ConfigError) as caught:
        build_rule(AveragingConfig(rule="swa", decay=0.9, last=3))
    assert caught.value.problems == [
        f"averaging.{name}: is {value}, which averaging.rule=swa does not use ({user} does); set averaging.rule="
        f"{user}, or remove it: averaging.{name}=null"
        for name, value, user in (("decay", 0.9, "ema"), ("last", 3, "lawa"))
    ]
    with pytest.raises(ConfigError, match=r"averaging\.blocks: is 8, which averaging\.rule=none"):
        build_rule(AveragingConfig(blocks=8))


def test_a_merge_has_to_be_told_its_weights():
    with pytest.raises(ConfigError, match=r"averaging\.weights is null, which averaging\.rule=merge needs"):
        build_rule(AveragingConfig(rule="merge"))

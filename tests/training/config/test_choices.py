"""One setting of a section decides which of the others are used: a later one drops the rest of what came before."""

from __future__ import annotations

import pytest

from swaft.training.config import read_config
from swaft.training.data.classification import ClassificationConfig

pytestmark = pytest.mark.unit

REQUIRED = ["model.model_name_or_path=demo", "data.task_name=mrpc", "train.output_dir=runs/x"]
EVERY_CHOICE = """
model: {use_peft: true, lora_r: 4}
averaging: {rule: ema, half_life: 0.2, start: 0.1, threads: 2, precision: plain}
noise: {kind: r3f, preset: relative, weight: 2.0}
"""


def read(*argv: str):
    return read_config(ClassificationConfig, [*REQUIRED, *argv])


@pytest.fixture
def first(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text(EVERY_CHOICE)
    return str(path)


def test_a_later_choice_keeps_what_it_uses(first):
    found = read("--config", first, "averaging.rule=ema", "noise.kind=r4f", "model.use_peft=true")
    kept = found.config
    assert (kept.averaging.half_life, kept.noise.preset, kept.model.lora_r) == (0.2, "relative", 4)
    assert found.problems == found.replaced == []


def test_a_later_choice_drops_what_it_does_not_use_and_says_so(first):
    found = read("--config", first, "averaging.rule=swa", "noise.kind=rdrop", "model.use_peft=False")
    averaging, noise = found.config.averaging, found.config.noise
    assert (averaging.half_life, averaging.start, averaging.threads) == (None, 0.1, 2)
    assert (noise.weight, noise.preset, found.config.model.lora_r) == (2.0, None, 16)
    assert found.problems == []
    assert found.replaced == [
        f"model.use_peft=false (command line) replaces model.lora_r=4 ({first})",
        f"averaging.rule=swa (command line) replaces averaging.half_life=0.2 ({first})",
        f"noise.kind=rdrop (command line) replaces noise.preset=relative ({first})",
    ]


def test_a_later_file_drops_settings_as_the_command_line_does_and_none_may_be_an_unquoted_no(first, tmp_path):
    second = tmp_path / "b.yaml"
    second.write_text("averaging: {rule: no}\nnoise: {kind: none}\n")
    found = read("--config", first, "--config", str(second))
    averaging, noise = found.config.averaging, found.config.noise
    assert (averaging.rule, averaging.start, averaging.threads, averaging.precision) == (
        "none",
        None,
        2,
        "plain",
    )
    assert (noise.kind, noise.weight, noise.preset) == ("none", 1.0, None)
    assert found.problems == []


@pytest.mark.parametrize("choice", ["averaging.rule=swaa", "averaging.rule=${oc.env:MY_RULE}"])
def test_a_choice_that_is_not_known_yet_drops_nothing_and_is_one_problem_at_most(first, monkeypatch, choice):
    monkeypatch.setenv("MY_RULE", "ema")
    found = read("--config", first, choice)
    assert found.replaced == []
    assert [problem.split(":")[0] for problem in found.problems] == ["averaging.rule"] * choice.endswith(
        "swaa"
    )


def test_a_value_that_is_filled_in_later_is_dropped_only_if_no_value_would_be_used(tmp_path, monkeypatch):
    path = tmp_path / "a.yaml"
    path.write_text("noise: {kind: r3f, preset: '${oc.env:MY_PRESET}', sigma: '${oc.env:MY_SIGMA}'}\n")
    monkeypatch.setenv("MY_PRESET", "rdrop_paper")
    found = read("--config", str(path), "noise.kind=rdrop")
    assert (found.problems, found.config.noise.preset) == ([], "rdrop_paper")


def test_one_layer_that_sets_a_choice_and_what_it_does_not_use_is_refused(first):
    [problem] = read("--config", first, "averaging.rule=swa", "averaging.decay=0.9").problems
    assert problem == (
        "averaging.decay: is 0.9, which averaging.rule=swa does not use (ema does); set averaging.rule=ema, or "
        "remove it: averaging.decay=null"
    )
    [problem] = read("noise.kind=rdrop", "noise.preset=relative").problems
    assert problem.startswith("noise.preset: is relative, which noise.kind=rdrop does not use (r3f, r4f do)")

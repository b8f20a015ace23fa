"""Outcomes, roundings, batches and the order of the grid: pure pieces."""

from __future__ import annotations

import math
from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sklearn.metrics import f1_score, matthews_corrcoef
from torch import nn

from benchmarks.study import grid, reading
from benchmarks.study.cell import Cell, parse_cell
from benchmarks.study.loop import rate_at
from benchmarks.study.model import GROUP, changed, to_int4, to_int8
from benchmarks.study.numerics import fingerprint, kind_of
from benchmarks.study.outcomes import BINS, Prediction, calibration_error, outcomes, temperature
from benchmarks.study.readouts import rules_for
from benchmarks.study.rows import Rows, epoch_batches, evaluation_batches
from benchmarks.study.trainings import TRAININGS
from swaft.averaging.rules import EMA, SWA

pytestmark = pytest.mark.unit


def test_outcomes_are_those_of_scikit_learn_and_of_the_definition():
    torch.manual_seed(0)
    logits, labels = torch.randn(200, 2) * 2, torch.randint(2, (200,))
    predicted = logits.argmax(-1)
    assert outcomes(logits, labels, "mcc")["mcc"] == pytest.approx(matthews_corrcoef(labels, predicted))
    found = outcomes(logits, labels, "f1")
    assert found["f1"] == pytest.approx(f1_score(labels, predicted))
    assert found["accuracy"] == pytest.approx(float((predicted == labels).double().mean()))
    assert found["nll"] == pytest.approx(
        float(-logits.double().log_softmax(-1)[torch.arange(200), labels].mean())
    )
    top, hits = logits.double().softmax(-1).amax(-1), (predicted == labels).double()
    expected = 0.0
    for i in range(BINS):
        inside = (top >= i / BINS) & (top < (i + 1) / BINS)
        if inside.any():
            expected += float(inside.double().mean() * (hits[inside].mean() - top[inside].mean()).abs())
    assert calibration_error(top, hits) == pytest.approx(expected)
    assert calibration_error(torch.ones(4), torch.tensor([1.0, 1.0, 1.0, 0.0])) == 0.25


def test_outcomes_of_one_class_and_of_rounded_logits():
    logits = (
        torch.randn(50, 2, generator=torch.Generator().manual_seed(0)) + torch.tensor([9.0, 0.0])
    ).bfloat16()
    labels = torch.zeros(50, dtype=torch.long)
    found = outcomes(logits, labels, "mcc") | outcomes(logits, labels, "f1")
    assert (found["mcc"], found["f1"], found["accuracy"]) == (0, 0, 1)
    assert found["nll"] == pytest.approx(float(-logits.double().log_softmax(-1)[:, 0].mean()))


def test_averages_are_what_their_names_say():
    rules = {
        name: rule
        for schedule in ("decayed", "constant")
        for name, rule in rules_for(TRAININGS[schedule], 1000).items()
    }
    for name, rule in rules.items():
        kind, _, number = name.partition("-")
        if kind == "tail":
            assert rule == SWA(start=1 - float(number), every=1)
        elif kind == "swa":
            assert rule == SWA(start=float(number), every=12)
        elif kind == "ema" and number:
            assert rule == EMA(half_life=float(number), every=12)
        else:
            assert (name, rule.every) in {("lawa", 50), ("power-ema", 12), ("bema", 12), ("merge", 12)}


def test_a_readout_is_scaled_and_chosen_by_the_validation_rows(monkeypatch):
    generator, model = torch.Generator().manual_seed(0), nn.Linear(1, 1)
    logits = 2 * torch.randn(2000, 3, generator=generator)
    labels = torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]
    read = []  # which weights the model has

    @contextmanager
    def in_place(_model, _averager, readout):
        read.append(readout.name)
        yield

    def predict(_task, _model, rows):
        scale = {"validation": 3.0, "test": 2.0}[rows]
        if read[-1] == "tail-0.2":  # better on validation rows, and worse on test rows
            scale = {"validation": 1.5, "test": 9.0}[rows]
        return Prediction(scale * logits, labels, dict)

    monkeypatch.setattr(reading, "in_place", in_place)
    monkeypatch.setattr(reading, "predict", predict)
    trained = SimpleNamespace(averager=None)
    splits = SimpleNamespace(validation="validation", test="test")
    found = reading.score_test(model, trained, TRAININGS["decayed"], splits, SimpleNamespace(generates=False))
    assert found["last"]["temperature"] == pytest.approx(3, rel=0.1)
    scaled = outcomes(logits * 2 / found["last"]["temperature"], labels, "accuracy")
    assert found["last"]["outcomes"]["nll_scaled"] == scaled["nll"]
    assert found["chosen"]["chosen"] == "tail-0.2"
    assert found["chosen"]["outcomes"] == found["tail-0.2"]["outcomes"]


def test_the_temperature_undoes_what_logits_were_multiplied_by():
    torch.manual_seed(0)
    logits = torch.randn(4000, 3)
    labels = torch.multinomial(logits.softmax(-1), 1)[:, 0]
    assert temperature(logits * 3, labels) == pytest.approx(3, rel=0.1)
    assert temperature(logits / 2, labels) == pytest.approx(0.5, rel=0.1)


def test_int8_keeps_each_weight_within_half_a_step_and_int4_has_16_levels_a_group():
    weight = torch.randn(5, GROUP + 10)
    step = weight.abs().amax(1, keepdim=True) / 127
    assert ((to_int8("", weight) - weight).abs() <= step / 2 + 1e-7).all()
    rounded = to_int4("", weight)
    assert rounded.shape == weight.shape
    for row, before in zip(rounded[:, :GROUP], weight[:, :GROUP], strict=True):
        assert 8 < len(row.unique()) <= 16
        assert (row - before).abs().max() <= (before.max() - before.min()) / 30 + 1e-6
    assert torch.equal(to_int4("", weight[0]), weight[0])  # vectors stay


def test_changed_weights_are_back_bit_for_bit_also_after_an_error():
    model = nn.Linear(3, 3)
    before = model.weight.detach().clone()

    def fail_inside():
        with changed(model, lambda name, weight: weight * 0):
            assert not model.weight.any()
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        fail_inside()
    assert torch.equal(model.weight, before)


def test_an_epoch_has_every_row_once_in_an_order_of_its_seed_and_little_padding():
    generator = np.random.default_rng(0)
    rows = Rows(tuple((1,) * n for n in generator.integers(3, 60, size=300)), (), torch.zeros(300))
    batches = epoch_batches(rows, size=8, seed=1, epoch=0)
    assert sorted(np.concatenate(batches).tolist()) == list(range(300))
    again, other = (epoch_batches(rows, size=8, seed=1, epoch=epoch) for epoch in (0, 1))
    assert all(map(np.array_equal, batches, again))
    assert not all(map(np.array_equal, batches, other))

    def padded(some: list[np.ndarray]) -> int:
        return sum(len(places) * max(len(rows.ids[place]) for place in places) for places in some)

    assert padded(batches) < 1.35 * sum(map(len, rows.ids))
    assert sorted(np.concatenate(evaluation_batches(rows)).tolist()) == list(range(300))


def test_the_rate_warms_up_and_decays_to_one_step_above_nothing():
    decayed = [rate_at(step, 100, "decayed") for step in range(100)]
    assert decayed[5] == 1.0 == max(decayed)
    assert decayed[0] == pytest.approx(1 / 6)
    assert decayed[99] == pytest.approx(1 / 94)
    assert [rate_at(step, 100, "constant") for step in range(6, 100)] == [1.0] * 94


def test_a_cell_is_read_back_from_its_name():
    cell = Cell("mrpc", "rdrop-decayed", "small", 2e-5, 7, "tuning")
    assert parse_cell(cell.name) == cell


def tuning_rows(losses: dict[float, float], training: str = "constant", task: str = "trec") -> list[dict]:
    return [
        {
            "cell": grid.tuning_cell(training, "main", task, rate).name,
            "readout": TRAININGS[training].principal,
            "outcomes": {"nll": nll},
            "split": "tuning",
        }
        for rate, nll in losses.items()
    ]


@pytest.mark.parametrize(
    ("known", "following"),
    [
        ({}, [1e-4, 2e-4]),
        ({1e-4: 0.3}, [2e-4]),
        ({1e-4: 0.3, 2e-4: 0.2}, [4e-4]),
        ({1e-4: 0.2, 2e-4: 0.2}, [5e-5]),
        ({1e-4: 0.3, 2e-4: 0.2, 4e-4: 0.25}, []),
        ({1e-4: 0.4, 2e-4: 0.3, 4e-4: 0.2, 8e-4: 0.1}, [1.6e-3]),
        ({rate: 1 - rate for rate in grid.RATES}, []),
        ({rate: 1 + rate for rate in grid.RATES}, []),
        ({1e-4: math.inf, 2e-4: math.inf, 5e-5: math.inf, 2.5e-5: 0.1}, [1.25e-5]),
    ],
)
def test_the_search_for_a_rate_goes_downhill_until_the_loss_rises_or_the_rates_end(known, following):
    assert grid.missing_rates(known, "main") == following


def test_with_few_rows_the_search_ends_only_when_two_rates_on_either_side_are_worse():
    assert grid.missing_rates({5e-5: 0.3, 1e-4: 0.2, 2e-4: 0.3}, "small") == [2.5e-5, 4e-4]
    lower_valley = {1.25e-5: 0.3, 2.5e-5: 0.1, 5e-5: 0.3, 1e-4: 0.2, 2e-4: 0.3, 4e-4: 0.4}
    assert grid.missing_rates(lower_valley, "small") == [6.25e-6]
    assert grid.missing_rates({6.25e-6: 0.4, **lower_valley}, "small") == []


def test_reported_cells_wait_for_a_rate_and_take_the_one_of_the_lowest_loss():
    rows = tuning_rows({1e-4: 0.3, 2e-4: 0.2, 4e-4: 0.4})
    last = [
        {**row, "readout": "last", "outcomes": {"nll": 0.01}} for row in rows[2:]
    ]  # not what it is judged by
    assert grid.chosen_rate("constant", "main", "trec", rows[:2] + last) is None
    assert grid.chosen_rate("constant", "main", "trec", rows + last) == 2e-4
    made = list(grid.all_cells(rows))
    assert made[:2] == [grid.tuning_cell("decayed", "main", "sst2", rate) for rate in (1e-4, 2e-4)]
    reported = [cell for cell in made if cell.split == "test"]
    assert {(cell.task, cell.training, cell.rate) for cell in reported} == {("trec", "constant", 2e-4)}
    assert len(set(made)) == len(made)


def test_probes_train_at_the_baselines_rate_whatever_suits_their_training():
    rows = tuning_rows({1e-4: 0.3, 2e-4: 0.2, 4e-4: 0.4}) + tuning_rows(
        {5e-5: 0.3, 1e-4: 0.2, 2e-4: 0.4}, training="decayed"
    )
    phase = grid.Phase(("constant", "rdrop-decayed"), "main", ("trec",), (1,), "probe")
    cells = list(grid.cells_of(phase, rows))
    assert {cell.training for cell in cells if cell.split == "tuning"} == {"decayed"}
    probes = [cell for cell in cells if cell.split == "probe"]
    assert {(cell.training, cell.rate) for cell in probes} == {("constant", 1e-4), ("rdrop-decayed", 1e-4)}
    made = [{"training": "constant", "split": "probe", "regime": "main", "task": "trec", "rate": 1e-4}]
    assert grid.at_chosen_rates(made, rows) == made


def test_a_pair_that_another_machine_has_is_not_made_again_and_an_arm_alone_is_made_with_its_baseline():
    rates = {1e-4: 0.3, 2e-4: 0.2, 4e-4: 0.4}
    here, there = {"processor": "here"}, {"processor": "there"}
    rows = []
    for training, principal in (
        ("decayed2x", "last"),
        ("rdrop-decayed", "last"),
        ("rdrop-constant", "swa-0.5"),
    ):
        rows += [
            {**row, "cell": row["cell"].replace("constant", training), "readout": principal}
            for row in tuning_rows(rates)
        ]
    rows = [{**row, "fingerprint": "f", "of": 1, "machine": there} for row in rows]
    tests = [f"trec/{name}/main/0.0002/1/test" for name in ("decayed2x", "rdrop-decayed", "rdrop-constant")]
    rows += [{**rows[0], "cell": name} for name in tests[:2]]
    made = grid.Made(rows, "here")
    missing = [cell.name for cell in made.missing()]
    assert not [name for name in missing if name.endswith("tuning") and name in {row["cell"] for row in rows}]
    assert [name for name in missing if name.endswith("/1/test")] == [tests[0], tests[2]]
    rows.append(
        {**rows[0], "cell": tests[0], "machine": here, "fingerprint": parse_cell(tests[0]).fingerprint}
    )
    left = [cell.name for cell in grid.Made(rows, "here").missing()]
    assert [name for name in left if name.endswith("/1/test")] == [tests[2]]


def test_a_longer_run_is_made_with_the_shorter_plain_run_that_may_beat_it():
    r4f = "r4f-relative-1.0-decayed"
    cells = [
        grid.tuning_cell(training, regime, "trec", rate)
        for regime, training in (("main", "decayed"), ("long", "decayed2x"), ("long", r4f))
        for rate in grid.RATES
    ]
    rows = [
        {"cell": cell.name, "readout": "last", "outcomes": {"nll": cell.rate}, "split": "tuning", "of": 1,
         "fingerprint": "f", "machine": {"processor": "there"}}
        for cell in cells
    ]  # fmt: skip
    longer, *plain = (
        f"trec/{run}/{grid.RATES[0]}/1/test" for run in (f"{r4f}/long", "decayed/main", "decayed2x/long")
    )
    rows += [
        {**rows[0], "cell": cell, "split": "test"} for cell in plain
    ]  # one machine has these, and not R4F's
    names = [cell.name for cell in grid.Made(rows, "here").missing()]
    assert all(names.index(cell) < names.index(longer) for cell in plain)


def test_another_precision_is_another_kind_of_machine_and_another_arithmetic():
    machine = {"processor": "p", "torch": "t"}
    assert len({kind_of({"machine": {**machine, "precision": each}}) for each in ("bf16", "fp32")}) == 2
    assert len({fingerprint("decayed", "cpu", each) for each in ("bf16", "fp32")}) == 2


def test_a_rate_at_which_a_training_diverged_is_not_chosen_and_one_at_which_it_failed_is_awaited():
    rows = tuning_rows({1e-4: 0.9, 2e-4: math.nan, 5e-5: 0.95})
    assert grid.chosen_rate("constant", "main", "trec", rows) == 1e-4
    whole, failed = rows[0], {"cell": rows[0]["cell"], "readout": "failed"}
    rows[0] = failed | {"failed": "OutOfMemoryError: tried to allocate"}
    assert grid.chosen_rate("constant", "main", "trec", rows) is None
    assert grid.missing_rates(grid.tried("constant", "main", "trec", rows), "main") == [1e-4]
    assert grid.chosen_rate("constant", "main", "trec", [*rows, whole]) == 1e-4
    rows[0] = failed | {"failed": "AveragingError: the weights after step 9 are not finite on 1 of 1 ranks"}
    rows += tuning_rows({2.5e-5: 0.97})
    assert grid.chosen_rate("constant", "main", "trec", rows) == 5e-5


def test_a_cell_that_failed_elsewhere_is_made_here_and_one_that_failed_here_is_not():
    (row,) = tuning_rows({1e-4: 0.3}, "decayed", "sst2")
    row |= {"readout": "failed", "of": 1, "machine": {"processor": "there"}}
    row |= {"fingerprint": parse_cell(row["cell"]).fingerprint}
    for failed, made_in in (("MemoryError", ["here"]), ("the weights after step 9 are not finite", [])):
        rows = [row | {"failed": failed}]
        found = [
            kind for kind in ("here", "there") if next(grid.Made(rows, kind).missing()).name == row["cell"]
        ]
        assert found == made_in


def test_a_baseline_that_several_arms_wait_for_is_wanted_once():
    trainings = {"decayed2x": "last", "rdrop-decayed": "last", "rdrop-constant": "swa-0.5"}
    rows = [
        row | {"readout": readout, "fingerprint": "f", "of": 1, "machine": {"processor": "there"}}
        for training, readout in trainings.items()
        for row in tuning_rows({1e-4: 0.3, 2e-4: 0.2, 4e-4: 0.4}, training)
    ]
    missing = list(grid.Made(rows, "here").missing())
    assert {f"trec/{name}/main/0.0002/1/test" for name in trainings} < {cell.name for cell in missing}
    assert len(set(missing)) == len(missing)


def test_no_tuning_seed_is_reported_and_no_confirming_task_is_chosen_on():
    assert grid.TUNING_SEED not in grid.SEEDS
    assert not set(grid.CHOOSING) & set(grid.CONFIRMING)

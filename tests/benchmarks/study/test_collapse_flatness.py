"""Probes and chains of tasks, and curvature, against what is known exactly."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression
from torch import nn

from benchmarks.study import collapse, flatness
from benchmarks.study.cell import parse_cell, run_cell
from benchmarks.study.reading import recommended_readouts
from benchmarks.study.readouts import rules_for
from benchmarks.study.rows import Rows
from benchmarks.study.trainings import TRAININGS
from swaft.averaging.rules import RECOMMENDED

pytestmark = pytest.mark.unit


class Bag(nn.Module):
    """Mean of embeddings, a nonlinearity, classes: a model small enough for its whole Hessian."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.head = nn.Embedding(6, 3), nn.Linear(3, 2)

    def forward(self, input_ids, attention_mask, token_type_ids):
        mask = attention_mask[..., None]
        return SimpleNamespace(
            logits=self.head(((self.embedding(input_ids) * mask).sum(1) / mask.sum(1)).tanh())
        )


def test_top_eigenvalue_and_trace_are_those_of_the_whole_hessian(monkeypatch):
    monkeypatch.setattr(flatness, "ITERATIONS", 60)
    monkeypatch.setattr(flatness, "PROBES", 300)
    monkeypatch.setattr(flatness, "REACH_OF_TRACE", 0.01)
    generator = np.random.default_rng(0)
    ids = tuple(tuple(generator.integers(6, size=4).tolist()) for _ in range(12))
    rows = Rows(ids, tuple((0,) * 4 for _ in ids), torch.from_numpy(generator.integers(2, size=12)))
    model = Bag().double()
    before = [parameter.detach().clone() for parameter in model.parameters()]
    found = flatness.curvature(model, rows, seed=0)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))

    flat = torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
    batch = rows.batch(np.arange(12))
    labels = batch.pop("labels")

    def loss(vector):
        parts, start = {}, 0
        for name, parameter in model.named_parameters():
            parts[name] = vector[start : start + parameter.numel()].view_as(parameter)
            start += parameter.numel()
        return F.cross_entropy(torch.func.functional_call(model, parts, (), batch).logits, labels)

    hessian = torch.autograd.functional.hessian(loss, flat)
    values = torch.linalg.eigvalsh(hessian)
    assert found["top_eigenvalue"] == pytest.approx(float(values[values.abs().argmax()]), rel=1e-3)
    assert found["trace"] == pytest.approx(float(hessian.trace()), rel=0.1)


def test_the_probe_is_logistic_regression():
    generator = np.random.default_rng(0)
    inputs = torch.from_numpy(generator.standard_normal((80, 5)))
    labels = (inputs[:, 0] + 0.5 * torch.from_numpy(generator.standard_normal(80)) > 0).long()
    ours = collapse.logistic_regression(inputs, labels, 2, 0.05)
    theirs = LogisticRegression(C=1 / (0.05 * 80 / 2), tol=1e-8).fit(inputs, labels)
    # Two rows of softmax weights under a penalty on both are one row of twice their length under half the penalty.
    difference = (ours[:, 1] - ours[:, 0]).numpy()
    np.testing.assert_allclose(difference[:-1], theirs.coef_[0], rtol=1e-3)
    np.testing.assert_allclose(difference[-1], theirs.intercept_[0], rtol=1e-3)


@pytest.fixture
def one_probe(monkeypatch):
    monkeypatch.setattr(collapse, "PROBED", ("cr",))
    monkeypatch.setattr(collapse, "CHAIN", ("cr",))
    monkeypatch.setattr(collapse, "CYCLES", 2)
    monkeypatch.setattr(flatness, "RADII", (0.05, 1.0))
    monkeypatch.setattr(flatness, "ITERATIONS", 1)
    monkeypatch.setattr(flatness, "PROBES", 1)


def test_beyond_scores_a_constant_run_is_judged_by_the_recommended_average():
    (_, average) = recommended_readouts(TRAININGS["constant"])
    assert replace(rules_for(TRAININGS["constant"], 100)[average.name], every=1) == RECOMMENDED
    assert [readout.name for readout in recommended_readouts(TRAININGS["decayed"])] == ["last"]


def test_probes_chains_and_flatness_come_to_rows(tiny_task, one_probe):
    probed = run_cell(parse_cell("cr/constant/main/0.0002/1/probe"))
    assert [row["readout"] for row in probed] == ["last:cr", "ema-0.1:cr"]
    beside_the_baseline = run_cell(parse_cell("cr/decayed/main/0/1/probe"))
    assert [row["readout"] for row in beside_the_baseline] == ["pretrained:cr", "last:cr"]
    before, after = (row["outcomes"] for row in beside_the_baseline)
    assert before == after  # at a rate of 0 nothing is learned
    chained = run_cell(parse_cell("cr/constant/main/0.0002/1/cycle"))
    assert [row["readout"] for row in chained] == ["00:next", "00:first", "01:next", "01:first"]
    losses = [row["outcomes"]["nll"] for row in chained]
    assert losses[1] == losses[2]  # the second stage begins with what the first one handed on
    assert losses[0] != losses[1] != losses[3]
    flat = run_cell(parse_cell("cr/decayed/main/0.0002/1/flatness"))
    assert [row["readout"] for row in flat] == ["last", "tail-0.2", "line"]
    line = flat[2]["train_and_test_nll"]
    assert line[1][1] == flat[0]["test_nll"][0]  # place 0 is the last weights
    assert line[3][1] == pytest.approx(flat[1]["test_nll"][0], rel=1e-5)  # place 1 is the average
    assert flat[0]["test_nll"][2] > flat[0]["test_nll"][0]  # noise as large as the weights hurts

"""Averages inside an accelerator's checkpoints, in one process: what is carried, and what is refused."""

from __future__ import annotations

import weakref
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration
from launching import forget_accelerate
from safetensors.torch import load_file
from tiny_trainer import model, rows
from torch.utils.data import DataLoader

import swaft
from swaft.cli.export import run as export
from swaft.errors import ConfigError, StateError, UnsupportedEngineError
from swaft.integrations.accelerate import register_averager

pytestmark = pytest.mark.unit
SWA, EMA = swaft.SWA(start=2), swaft.EMA(decay=0.5)
STEPS, ACCUMULATION = 6, 2


class Loop:
    """An ordinary accelerate loop: accumulation, a prepared scheduler, checkpoints named by accelerate itself."""

    def __init__(self, folder: Path, *rules: swaft.SWA | swaft.EMA, seed: int = 0):
        forget_accelerate()
        naming = ProjectConfiguration(str(folder), automatic_checkpoint_naming=True, total_limit=1)
        self.accelerator = Accelerator(
            cpu=True, gradient_accumulation_steps=ACCUMULATION, project_config=naming
        )
        network = model()
        optimizer = torch.optim.AdamW(network.parameters(), lr=1e-2)
        self.model, self.optimizer, self.scheduler, self.loader = self.accelerator.prepare(
            network,
            optimizer,
            torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9),
            DataLoader(rows(4 * STEPS * ACCUMULATION, 0).with_format("torch"), batch_size=4),
        )
        self.averagers = [
            swaft.WeightAverager(self.model, self.optimizer, rule=rule, total_steps=STEPS) for rule in rules
        ]

    def registered(self) -> Loop:
        for averager in self.averagers:
            register_averager(self.accelerator, averager)
        return self

    def train(self, first: int = 0, last: int = STEPS) -> Loop:
        self.model.train()
        for number, batch in enumerate(self.loader):
            if not first <= number // ACCUMULATION < last:
                continue
            torch.manual_seed(number)
            with self.accelerator.accumulate(self.model):
                self.accelerator.backward(self.model(**batch).loss)
                self.optimizer.step()
                self.scheduler.step()
                self.optimizer.zero_grad()
            for averager in self.averagers:
                averager.step()
        return self


def test_a_loop_resumes_its_weights_its_rate_and_the_averages_of_two_averagers(tmp_path):
    whole = Loop(tmp_path / "whole", SWA, EMA).registered().train()
    broken_off = Loop(tmp_path / "run", SWA, EMA).registered()
    for last in (2, 4):  # accelerate deletes the first checkpoint when it writes the second
        broken_off.train(last - 2, last).accelerator.save_state()
    written = tmp_path / "run" / "checkpoints"
    assert [path.name for path in written.iterdir()] == ["checkpoint_1"]
    resumed = Loop(tmp_path / "run", SWA, EMA).registered()
    resumed.accelerator.load_state()
    resumed.train(4)
    assert resumed.scheduler.get_last_lr() == whole.scheduler.get_last_lr()
    for before, after in zip(whole.averagers, resumed.averagers, strict=True):
        assert torch.equal(before.shard(), after.shard())
    assert all(map(torch.equal, whole.model.parameters(), resumed.model.parameters()))


def test_a_checkpoint_takes_the_place_of_an_older_one_of_its_name(tmp_path):
    loop = Loop(tmp_path, SWA).registered()
    loop.accelerator.project_configuration.automatic_checkpoint_naming = False
    for last in (3, 5):
        loop.train(0 if last == 3 else 3, last).accelerator.save_state(str(tmp_path / "latest"))
    again = Loop(tmp_path, SWA).registered()
    again.accelerator.load_state(str(tmp_path / "latest"))
    assert torch.equal(again.averagers[0].shard(), loop.averagers[0].shard())


def test_averages_in_a_checkpoint_are_exported_as_the_loop_itself_would(tmp_path):
    loop = Loop(tmp_path / "run", SWA).registered().train()
    loop.accelerator.save_state()
    loop.averagers[0].save_pretrained(tmp_path / "own")
    saved = tmp_path / "run" / "checkpoints" / "checkpoint_0" / "averages"
    export([str(saved), "--base", str(tmp_path / "own"), "--output", str(tmp_path / "exported")])
    own, exported = (load_file(tmp_path / name / "model.safetensors") for name in ("own", "exported"))
    assert own.keys() == exported.keys()
    assert all(torch.equal(own[name], exported[name]) for name in own)


@pytest.mark.parametrize(
    ("saved", "resumed", "message"),
    [
        ([], [SWA], "no averages.*written before register_averager"),
        ([SWA], [EMA], "EMA"),
        ([SWA], [SWA, EMA], r"no averages.*averages-1"),
    ],
    ids=["none", "those of another rule", "those of one averager of two"],
)
def test_a_checkpoint_that_lacks_the_averages_is_refused(tmp_path, saved, resumed, message):
    Loop(tmp_path, *saved).registered().train(0, 3).accelerator.save_state()
    with pytest.raises(StateError, match=message):
        Loop(tmp_path, *resumed).registered().accelerator.load_state()


def test_objects_registered_in_another_order_are_refused(tmp_path):
    saving = Loop(tmp_path, SWA)
    saving.accelerator.register_for_checkpointing(swaft.R3F())
    saving.registered().accelerator.save_state()
    loading = Loop(tmp_path, SWA).registered()
    loading.accelerator.register_for_checkpointing(swaft.R3F())
    with pytest.raises(StateError, match="in the same order"):
        loading.accelerator.load_state()


def test_an_averager_is_registered_once(tmp_path):
    loop = Loop(tmp_path, SWA).registered()
    with pytest.raises(ConfigError, match="registered already"):
        loop.registered()


def test_averagers_of_a_new_optimizer_take_the_places_of_those_before(tmp_path):
    """As when a cell of a notebook is run again, with the model and the accelerator of an earlier cell."""
    loop = Loop(tmp_path, SWA, EMA).registered()
    loop.train(0, 2)
    old = [weakref.ref(averager) for averager in loop.averagers]
    loop.optimizer = loop.accelerator.prepare(torch.optim.AdamW(loop.model.parameters(), lr=1e-2))
    loop.averagers = [
        swaft.WeightAverager(loop.model, loop.optimizer, rule=rule, total_steps=STEPS) for rule in (SWA, EMA)
    ]
    loop.registered().train(0, 3)
    assert [each() for each in old] == [None, None]
    loop.accelerator.save_state()
    written = tmp_path / "checkpoints" / "checkpoint_0"
    assert sorted(path.name for path in written.glob("averages*")) == ["averages", "averages-1"]
    for name, averager in zip(("averages", "averages-1"), loop.averagers, strict=True):
        averager.load_state(written / name)


def test_an_averager_without_an_optimizer_yet_is_refused():
    with pytest.raises(UnsupportedEngineError, match=r"a NoneType.*as `accelerator.prepare` returned"):
        swaft.WeightAverager(model(), None, rule=SWA, total_steps=STEPS)

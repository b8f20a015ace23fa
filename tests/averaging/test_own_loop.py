"""A training loop of one's own, with accelerate, that is ended and goes on as docs/checkpoints.md says."""

from __future__ import annotations

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from tiny_inputs import save_model
from transformers import AutoModelForSequenceClassification

import swaft

pytestmark = pytest.mark.unit

ACCUMULATION, STEPS, ENDED = 2, 6, 3


class Loop:
    """Six steps of R3F and SWA on rows that are the same in every loop."""

    def __init__(self, folder) -> None:
        set_seed(0)
        self.accelerator = Accelerator(cpu=True, gradient_accumulation_steps=ACCUMULATION)
        model = AutoModelForSequenceClassification.from_pretrained(folder)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        self.model, self.optimizer = self.accelerator.prepare(model, optimizer)
        self.objective = swaft.R3F()
        self.averager = None

    def average(self) -> None:
        self.averager = swaft.WeightAverager(
            self.model, self.optimizer, rule=swaft.SWA(start=0.3), total_steps=STEPS
        )

    def train(self, first: int, last: int) -> None:
        rows = torch.arange(8 * STEPS * ACCUMULATION * 4).reshape(STEPS * ACCUMULATION, 4, 8) % 7 + 1
        self.model.train()
        for number in range(first * ACCUMULATION, last * ACCUMULATION):
            with self.accelerator.accumulate(self.model):
                batch = {"input_ids": rows[number], "labels": torch.tensor([0, 1, 0, 1])}
                self.accelerator.backward(self.objective(self.model, batch).loss)
                self.optimizer.step()
                self.optimizer.zero_grad()
            if self.accelerator.sync_gradients:
                self.averager.step()

    def average_of(self, name: str) -> torch.Tensor:
        with self.averager.swapped_in():
            return self.model.get_parameter(name).detach().clone()


def test_a_loop_of_ones_own_goes_on_to_the_bit(tmp_path):
    save_model(tmp_path / "model")
    unbroken = Loop(tmp_path / "model")
    unbroken.average()
    unbroken.train(0, STEPS)

    ended = Loop(tmp_path / "model")
    ended.average()
    ended.train(0, ENDED)
    ended.accelerator.save_state(str(tmp_path / "step-3" / "engine"))
    average = tmp_path / "step-3" / "average"
    average.mkdir()
    (average / "rank-00000.safetensors").write_bytes(b"half")  # by a loop that was killed here before
    ended.averager.save_state(average, overwrite=True)

    found = Loop(tmp_path / "model")
    found.accelerator.load_state(str(tmp_path / "step-3" / "engine"))
    found.average()
    found.averager.load_state(tmp_path / "step-3" / "average")
    found.objective.step = ENDED * ACCUMULATION
    found.train(ENDED, STEPS)

    assert found.averager.num_averaged == unbroken.averager.num_averaged
    for name, expected in unbroken.model.named_parameters():
        assert torch.equal(found.model.get_parameter(name), expected), name
        assert torch.equal(found.average_of(name), unbroken.average_of(name)), name

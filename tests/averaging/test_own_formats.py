"""Models that write themselves in a way of their own, exported."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from lora_models import bert
from safetensors.torch import load_file
from small_runs import averaged
from torch import nn
from transformers import BertForSequenceClassification

from swaft.averaging import attach_engine, save_pretrained

pytestmark = pytest.mark.unit


class PassesOn(BertForSequenceClassification):
    """A model of transformers that adds a file of its own."""

    def save_pretrained(self, folder, **options):
        super().save_pretrained(folder, **options)
        (Path(folder) / "added").touch()


class TakesAFolder(BertForSequenceClassification):
    def save_pretrained(self, folder):
        super().save_pretrained(folder)


@pytest.mark.parametrize("kind", [PassesOn, TakesAFolder])
def test_a_model_that_overrides_transformers_saving_is_written_as_one_of_transformers(kind, tmp_path):
    model = kind(bert().config)
    engine = attach_engine(model, torch.optim.SGD(model.parameters(), lr=0.1))
    shard = torch.randn(engine.numel)
    save_pretrained(engine, tmp_path / "out", shard=shard)
    opened = kind.from_pretrained(tmp_path / "out")
    assert torch.equal(torch.cat([p.detach().flatten() for p in opened.parameters()]), shard)
    assert (tmp_path / "out" / "added").exists() == (kind is PassesOn)


class OwnFormat(nn.Linear):
    """A model with a format of its own, as of sentence-transformers."""

    def save_pretrained(self, path):
        torch.save(self.state_dict(), path / "own.pt")


def test_a_format_of_its_own_is_warned_about_with_what_writes_it(tmp_path, caplog):
    model = OwnFormat(2, 2)
    averager = averaged(model)
    averager.save_pretrained(tmp_path / "out")
    assert "save_pretrained of OwnFormat takes no state_dict" in caplog.text
    assert "call copy.deepcopy(model).save_pretrained(path), and for an average do that inside" in caplog.text
    with averager.swapped_in():
        copy.deepcopy(model).save_pretrained(tmp_path)
    average = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(average[name], value) for name, value in torch.load(tmp_path / "own.pt").items())

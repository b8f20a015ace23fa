"""The settings that a copied recipe adds."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest

from swaft.training.config import Section, load_config
from swaft.training.data.classification import ClassificationConfig

pytestmark = pytest.mark.unit

REQUIRED = ["model.model_name_or_path=demo", "data.task_name=mrpc", "train.output_dir=runs/x"]


@dataclass(kw_only=True)
class LossConfig(Section):
    gamma: float = 2.0
    weights: dict = field(default_factory=lambda: {"rare": 2})
    """Weight of a class."""


@dataclass(frozen=True, kw_only=True)
class OwnConfig(ClassificationConfig):
    loss: LossConfig = field(default_factory=LossConfig)


def test_a_setting_may_have_no_doc_and_a_default_that_is_made(capsys):
    config = load_config(OwnConfig, [*REQUIRED, "loss.gamma=1.5"])
    assert (config.loss.gamma, config.loss.weights) == (1.5, {"rare": 2})
    with pytest.raises(SystemExit):
        load_config(OwnConfig, ["--help"])
    page = capsys.readouterr().out
    assert "loss.gamma  <float>  [default 2.0]\n" in page
    assert "loss.weights  <mapping>  [default {'rare': 2}]\n      Weight of a class." in page

from __future__ import annotations

import numpy as np
import pytest
import torch
from tiny_training import make_classifier, make_loader, make_rows

from swaft.errors import TrainingError
from swaft.training.evaluation.evaluate import (
    Evaluation,
    each_row_once,
    evaluate_classes,
    mean_evaluations,
    without_row_id,
)
from swaft.training.metrics import Metric

pytestmark = pytest.mark.unit


def accuracy(predictions: np.ndarray, references: np.ndarray) -> dict[str, float]:
    return {"accuracy": float((predictions == references).mean()), "rows": len(predictions)}


def scored(accelerator, model, rows, batch_size):
    loader = accelerator.prepare_data_loader(make_loader(rows, batch_size))
    metric = Metric("accuracy", ("accuracy", "rows"), accuracy)
    return evaluate_classes(model, loader, accelerator, metric=metric, num_rows=len(rows)).scores


def test_scores_do_not_depend_on_the_batch_size(make_accelerator):
    accelerator, model, rows = make_accelerator(), make_classifier(), make_rows(10)
    assert scored(accelerator, model, rows, 3) == scored(accelerator, model, rows, 10)
    assert scored(accelerator, model, rows, 4)["rows"] == 10


def test_loss_is_the_mean_over_rows_and_not_of_batch_means(make_accelerator):
    accelerator, model, rows = make_accelerator(), make_classifier().eval(), make_rows(7)
    with torch.no_grad():
        losses = [
            model(r["input_ids"][None], r["attention_mask"][None], r["labels"][None]).loss.double()
            for r in rows
        ]
    assert scored(accelerator, model, rows, 3)["loss"] == pytest.approx(
        torch.stack(losses).mean().item(), rel=1e-6
    )


def test_evaluation_draws_nothing_from_the_generator_of_training(make_accelerator):
    accelerator, model, rows = make_accelerator(), make_classifier(dropout=True), make_rows(6)
    before = torch.get_rng_state()
    scored(accelerator, model, rows, 4)
    assert torch.equal(torch.get_rng_state(), before)


def test_evaluation_is_without_dropout_and_leaves_the_mode_it_found(make_accelerator):
    accelerator, model, rows = make_accelerator(), make_classifier(dropout=True), make_rows(6)
    model.train()
    assert scored(accelerator, model, rows, 4) == scored(accelerator, model, rows, 4)
    assert model.training
    model.eval()
    scored(accelerator, model, rows, 4)
    assert not model.training


def test_a_loss_that_is_not_finite_is_an_error(make_accelerator):
    accelerator, model, rows = make_accelerator(), make_classifier(), make_rows(6)
    model.head.bias.data[0] = float("nan")
    with pytest.raises(TrainingError, match="evaluation loss is nan"):
        scored(accelerator, model, rows, 4)


def test_repeated_rows_are_dropped_and_the_rest_is_in_order():
    ids = torch.tensor([2, 0, 1, 2, 0])
    logits = torch.tensor([[2.0], [0.0], [1.0], [2.0], [0.0]])
    ordered, labels = each_row_once(ids, logits, ids * 10, num_rows=3)
    assert ordered.tolist() == [[0.0], [1.0], [2.0]]
    assert labels.tolist() == [0, 10, 20]


@pytest.mark.parametrize("ids", [[0, 1], [0, 1, 3], [0, 0, 1]])
def test_a_missing_row_is_an_error(ids):
    tensor = torch.tensor(ids)
    with pytest.raises(TrainingError, match="of 3"):
        each_row_once(tensor, tensor[:, None].float(), tensor, num_rows=3)


def test_the_mean_of_splits_is_that_of_each_score_for_each_kind_of_weights():
    found = {
        split: {kind: Evaluation(scores={"accuracy": a, "loss": 1 - a}) for kind, a in kinds.items()}
        for split, kinds in {
            "en": {"last": 0.5, "averaged": 0.75},
            "de": {"last": 0.25, "averaged": 1.0},
            "fr": {"last": 0.0, "averaged": 0.0},
        }.items()
    }
    means = mean_evaluations(found, {"both": ["en", "de"]})
    assert {kind: each.scores for kind, each in means["both"].items()} == {
        "last": {"accuracy": 0.375, "loss": 0.625},
        "averaged": {"accuracy": 0.875, "loss": 0.125},
    }


def test_row_numbers_do_not_reach_the_model():
    assert without_row_id({"input_ids": 1, "idx": 2}) == {"input_ids": 1}

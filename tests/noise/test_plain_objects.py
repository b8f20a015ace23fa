"""What objectives take and return beside the models of transformers and the numbers of Python."""

from __future__ import annotations

import copy
import pickle
from collections import namedtuple

import numpy as np
import pytest
import torch
from tiny_models import bert, causal_batch, classification_batch, gpt2
from transformers.modeling_outputs import SequenceClassifierOutput

from swaft.errors import NoiseError
from swaft.noise import R3F, RDrop, TaskLoss

pytestmark = pytest.mark.unit


class WithoutConfiguration(torch.nn.Module):
    """A classifier that says nothing of itself."""

    def __init__(self, dropout: float):
        super().__init__()
        self.embedding, self.dropout = torch.nn.Embedding(512, 8), torch.nn.Dropout(dropout)
        self.head = torch.nn.Linear(8, 3)

    def get_input_embeddings(self):
        return self.embedding

    def forward(self, input_ids, labels=None, **_):
        logits = self.head(self.dropout(self.embedding(input_ids)).mean(1))
        loss = None if labels is None else torch.nn.functional.cross_entropy(logits, labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)


def test_a_model_without_a_configuration_is_asked_for_its_dropout_all_the_same():
    with pytest.raises(NoiseError, match=r"has no dropout \(none in its configuration\)"):
        RDrop().prepare_model(WithoutConfiguration(0.0))
    assert RDrop()(WithoutConfiguration(0.5).train(), classification_batch()).divergence > 0


def test_numpys_numbers_are_options_like_pythons():
    model, batch = bert(), classification_batch()
    options = {"sigma": np.float32(0.5), "preset": "relative", "label_smoothing": np.float32(0.125)}
    same = {"sigma": 0.5, "preset": "relative", "label_smoothing": 0.125}
    losses = []
    for objective in (R3F(np.float32(1.0), seed=np.int64(7), **options), R3F(1.0, seed=7, **same)):
        torch.manual_seed(1)
        losses.append(objective(model, batch).loss)
    assert torch.equal(*losses)


def test_what_is_logged_holds_no_graph():
    out = R3F(sigma=0.1)(bert(), classification_batch())
    assert out.loss.requires_grad
    assert not any(value.requires_grad for value in out.logged.values())


def returning(model, form):
    """The model, whose forward hands its output on in another form."""
    forward = model.forward
    model.forward = lambda **inputs: form(forward(**inputs))
    return model


Named = namedtuple("Named", ["loss", "logits"])
FORMS = {
    "dictionary": dict,
    "named tuple": lambda output: Named(output.loss, output.logits),
}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize(
    "objective",
    [TaskLoss(), TaskLoss(label_smoothing=0.1), R3F(preset="relative"), RDrop()],
    ids=["plain", "smoothed", "R3F", "RDrop"],
)
@pytest.mark.parametrize(("build", "batch"), [(bert, classification_batch()), (gpt2, causal_batch())])
def test_loss_and_logits_are_read_from_whatever_names_them(form, objective, build, batch):
    losses = []
    for model in (build(), returning(build(), form)):
        torch.manual_seed(1)
        objective.step = 0
        losses.append(objective(model, batch).loss)
    assert torch.equal(*losses)


def test_a_routers_loss_in_a_dictionary_is_refused():
    model = returning(bert(), lambda output: {**output, "aux_loss": torch.tensor(0.0)})
    with pytest.raises(NoiseError, match="adds aux_loss of its routers"):
        R3F(preset="relative")(model, classification_batch())


def test_a_loss_without_a_name_is_asked_for_by_name():
    model = returning(bert(), lambda output: output.to_tuple())
    for objective in (TaskLoss(), R3F(preset="relative")):
        with pytest.raises(NoiseError, match=r"tuple.*return_dict=True"):
            objective(model, classification_batch())


def test_a_configuration_that_is_a_dictionary_is_read_for_its_dropout():
    model = WithoutConfiguration(0.0)
    model.config = {"hidden": 8, "dropout": 0.0}
    with pytest.raises(NoiseError, match=r"has no dropout \(dropout=0\.0\)"):
        RDrop().prepare_model(model)
    model.config["dropout"] = 0.5
    RDrop().prepare_model(model)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda objective: pickle.loads(pickle.dumps(objective))])
@pytest.mark.parametrize("objective", [TaskLoss(0.1), R3F(sigma=0.1), RDrop()])
def test_a_copy_of_an_objective_goes_on_at_its_step_and_makes_its_own_proof(objective, copied):
    model, batch = bert(), classification_batch()
    objective(model, batch)
    again, losses = copied(objective), []
    assert not again._proved
    for each in (objective, again):
        torch.manual_seed(1)
        losses.append(each(model, batch).loss)
    assert torch.equal(*losses)
    assert again.step == objective.step


@pytest.mark.parametrize("make", [lambda: R3F(sigma=0.1), RDrop])
def test_an_objective_inside_a_compiled_step_is_the_same(make):
    model, batch = bert(), classification_batch()
    losses = []
    for compiled in (False, True):
        objective = make()

        def step(rows, objective=objective):
            return objective(model, rows).loss

        torch.manual_seed(1)
        compiled_step = torch.compile(step, backend="eager", disable=not compiled)
        losses.append(torch.stack([compiled_step(batch) for _ in range(3)]))
    assert torch.equal(*losses)

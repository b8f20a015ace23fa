"""Noise objectives in a Trainer."""

from __future__ import annotations

import functools
from contextlib import nullcontext

import pytest
import torch
from datasets import Dataset
from tiny_trainer import model, rows, sft_trainer, trainer
from transformers import BertForQuestionAnswering, GPT2Config, GPT2LMHeadModel, Trainer, set_seed

import swaft
from swaft.errors import NoiseError
from swaft.integrations.transformers import NoiseCallback

pytestmark = pytest.mark.unit


def test_the_step_of_the_noise_is_resumed(tmp_path):
    whole = trainer(tmp_path / "a", NoiseCallback(swaft.R3F(preset="relative", sigma=1.0)))
    whole.train()
    resumed = trainer(tmp_path / "b", NoiseCallback(swaft.R3F(preset="relative", sigma=1.0)))
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-4"))
    after = dict(resumed.model.named_parameters())
    assert all(torch.equal(value, after[name]) for name, value in whole.model.named_parameters())


@pytest.mark.parametrize("streams", [False, True])
def test_the_log_says_what_the_noise_does(tmp_path, streams):
    run = trainer(tmp_path, NoiseCallback(swaft.R3F(preset="relative", sigma=1.0)))
    if streams:  # two passes over it
        run.train_dataset = rows(16, 0).to_iterable_dataset()
    run.train()
    assert run.state.log_history[0]["noise_to_signal"] > 0.1
    for line in (line for line in run.state.log_history if "loss" in line):
        assert line["loss"] == pytest.approx(line["task_loss"] + line["divergence"], rel=1e-5)


def test_the_log_has_only_what_the_objective_measures(tmp_path):
    added = {swaft.TaskLoss(): set(), swaft.RDrop(): {"task_loss", "divergence"}}
    for objective, names in added.items():
        run = trainer(
            tmp_path / type(objective).__name__, NoiseCallback(objective), max_steps=2, eval_strategy="no"
        )
        run.train()
        losses = [line for line in run.state.log_history if "loss" in line]
        assert {"task_loss", "divergence", "noise_to_signal"} & losses[0].keys() == names


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"label_smoothing_factor": 0.1}, "give the objective label_smoothing=0.1"),
        ({"kind": type("Own", (Trainer,), {"compute_loss": lambda *_: None})}, "a loss of its own"),
    ],
)
def test_a_loss_that_the_objective_would_replace_is_refused(tmp_path, settings, message):
    with pytest.raises(NoiseError, match=message):
        trainer(tmp_path, NoiseCallback(swaft.R3F()), **settings).train()


def test_what_was_set_on_the_trainer_itself_is_refused_or_put_back(tmp_path):
    run = trainer(tmp_path, NoiseCallback(swaft.R3F(sigma=0.01)), max_steps=2, eval_strategy="no")
    mine = run.log = lambda logs, *_: None
    run.train()
    assert run.log is mine
    run.compute_loss = functools.partial(lambda model, inputs, **_: None)
    with pytest.raises(NoiseError, match="partial is a loss of its own"):
        run.train()


@pytest.mark.parametrize("objective", [swaft.R3F, "r3f", None])
def test_what_is_no_objective_is_refused_at_once(objective):
    with pytest.raises(NoiseError, match=r"objective is .*; expected one, such as swaft\.R3F\("):
        NoiseCallback(objective)


def test_r4f_is_refused_because_the_trainer_could_not_save_its_head(tmp_path):
    with pytest.raises(NoiseError, match="parametrization"):
        trainer(tmp_path, NoiseCallback(swaft.R4F())).train()


def answers_model() -> BertForQuestionAnswering:
    config = model(0.0).config
    config.num_labels = 2
    return BertForQuestionAnswering(config)


FAMILIES = {
    "GPT-2, which shifts its labels": lambda: GPT2LMHeadModel(
        GPT2Config(
            vocab_size=60, n_embd=16, n_layer=1, n_head=2, n_positions=8, **dict.fromkeys(DROPOUTS, 0.0)
        )
    ),
    "answers, which have no labels": answers_model,
    "classes": lambda: model(0.0),
}
DROPOUTS = ("resid_pdrop", "embd_pdrop", "attn_pdrop")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_step_is_the_mean_over_its_rows_however_they_are_cut(tmp_path, family):
    # 12 rows at once, and in micro-batches of 5, 5 and 2.
    ids = torch.randint(3, 60, (12, 6), generator=torch.Generator().manual_seed(1))
    labels = ids.clone()
    labels[torch.rand(ids.shape, generator=torch.Generator().manual_seed(2)) < 0.4] = -100
    row = {"input_ids": ids.tolist()}
    row |= {"labels": labels.tolist()} if "GPT" in family else {"labels": (ids[:, 0] % 3).tolist()}
    if "answers" in family:
        row = {"input_ids": ids.tolist(), "start_positions": [1] * 12, "end_positions": [2] * 12}
    after = []
    for size, accumulation in ((12, 1), (5, 3)):
        run = trainer(
            tmp_path / str(size),
            NoiseCallback(swaft.R3F(weight=0.0, sigma=0.01)),
            per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulation,
            max_steps=1,
            optim="sgd",
            learning_rate=1.0,
            eval_strategy="no",
            train_sampling_strategy="sequential",
            logging_steps=1,
        )
        set_seed(0)
        run.model = run.model_wrapped = FAMILIES[family]()
        run.train_dataset = Dataset.from_dict(row)
        start = {name: value.clone() for name, value in run.model.named_parameters()}
        run.train()
        first = run.state.log_history[0]
        assert first["loss"] == pytest.approx(first["task_loss"], rel=1e-5)
        after.append({name: value - start[name] for name, value in run.model.named_parameters()})
    moved = sum(value.square().sum() for value in after[0].values()).sqrt()
    apart = sum((after[0][name] - after[1][name]).square().sum() for name in after[0]).sqrt()
    assert moved > 0
    assert apart < 1e-5 * moved


def test_a_step_in_which_nothing_counts_leaves_the_weights_finite(tmp_path):
    run = trainer(tmp_path, NoiseCallback(swaft.R3F(sigma=0.01)), max_steps=1, eval_strategy="no")
    run.train_dataset = rows(4, 0).map(lambda row: {"labels": -100})
    run.train()
    assert all(value.isfinite().all() for value in run.model.parameters())


def test_another_loss_of_the_sft_trainer_is_refused(tmp_path):
    with pytest.raises(NoiseError, match="loss_type='nll'"):
        sft_trainer(tmp_path, NoiseCallback(swaft.R3F()), loss_type="dft").train()


def test_a_training_that_failed_can_be_started_again(tmp_path):
    def fail(*_):
        raise RuntimeError("CUDA out of memory")

    settings = {"max_steps": 2, "eval_strategy": "no", "save_strategy": "no"}
    run = trainer(tmp_path, NoiseCallback(swaft.R3F(sigma=0.01)), **settings)
    failing = run.model.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        run.train()
    failing.remove()
    run.train()
    assert run.state.global_step == 2


class Counting(swaft.R3F):
    """An objective that knows how often it was asked, and how often a training has ended."""

    finished = 0

    def finish(self):
        self.finished += 1
        super().finish()

    def __call__(self, model, batch):
        self.asked = getattr(self, "asked", 0) + 1
        return super().__call__(model, batch)


def test_an_objective_trains_only_while_its_callback_is_there(tmp_path):
    first, second = Counting(sigma=0.01), Counting(sigma=0.01)
    run = trainer(tmp_path, NoiseCallback(first), max_steps=2, eval_strategy="no")
    run.train()
    run.remove_callback(NoiseCallback)
    run.train()
    assert first.asked == 2
    run.add_callback(NoiseCallback(second))
    run.train()
    assert (first.asked, second.asked) == (2, 2)
    assert (first.finished, second.finished) == (1, 1)
    run.add_callback(NoiseCallback(first))
    with pytest.raises(NoiseError, match="twice"):
        run.train()


class OwnStep(Trainer):
    """Computes its loss without `compute_loss`."""

    def training_step(self, model, inputs, num_items_in_batch=None):
        loss = model.train()(**self._prepare_inputs(inputs)).loss
        self.accelerator.backward(loss)
        return loss.detach()


class OwnStepForSomeBatches(Trainer):
    """Leaves out a batch now and then."""

    def training_step(self, model, inputs, num_items_in_batch=None):
        if self.state.global_step == 1:
            return torch.zeros((), device=self.args.device)
        return super().training_step(model, inputs, num_items_in_batch)


class OwnStepAround(Trainer):
    """Does something before each step."""

    def training_step(self, model, inputs, num_items_in_batch=None):
        return super().training_step(model, inputs, num_items_in_batch)


def test_a_training_step_that_never_asks_the_objective_is_refused_after_its_first_step(tmp_path):
    for kind in (OwnStepAround, OwnStepForSomeBatches, OwnStep):
        run = trainer(
            tmp_path, NoiseCallback(swaft.R3F(sigma=0.01)), kind=kind, max_steps=2, save_strategy="no"
        )
        with pytest.raises(NoiseError, match=r"step 1 .*OwnStep\.") if kind is OwnStep else nullcontext():
            run.train()

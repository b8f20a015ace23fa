from __future__ import annotations

import shutil
import weakref

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from tiny_trainer import averaged, exported, model, numbers_tokenizer, rows, sft_trainer, trainer
from transformers import DataCollatorWithPadding, Trainer
from trl import DPOConfig, DPOTrainer

import swaft
from swaft.averaging import host
from swaft.distributed import Ranks
from swaft.errors import AveragingError, ConfigError, NoiseError, StateError, UnsupportedEngineError
from swaft.integrations.transformers import (
    NoiseCallback,
    WeightAveragingCallback,
    averaged_weights,
    write_surface,
)
from swaft.report.runs import read_run

pytestmark = pytest.mark.unit


@pytest.fixture
def averaging() -> WeightAveragingCallback:
    return WeightAveragingCallback(swaft.SWA(start=0.5))


@pytest.mark.parametrize("held_by", ["trainer", "collator"])
def test_the_end_of_training_leaves_the_averaged_model_with_its_tokenizer(tmp_path, averaging, held_by):
    run = trainer(tmp_path, averaging)
    if held_by == "collator":
        run.data_collator = DataCollatorWithPadding(numbers_tokenizer(60))
    else:
        run.processing_class = numbers_tokenizer(60)
    run.train()
    assert (tmp_path / "final-averaged" / "tokenizer.json").is_file()
    mean, written = averaged(run), exported(run)
    assert all(torch.equal(mean[name], written[name]) for name in mean)


def test_the_names_are_at_the_top_level_too():
    assert swaft.WeightAveragingCallback is WeightAveragingCallback
    assert swaft.averaged_weights is averaged_weights
    assert swaft.NoiseCallback is NoiseCallback


def test_each_of_several_evaluation_sets_is_scored_with_both_weights_once(tmp_path, averaging):
    run = trainer(tmp_path, averaging)
    run.eval_dataset = {"near": rows(16, 1), "eval": rows(16, 2)}
    run.train()
    names = [name for entry in run.state.log_history[-6:] for name in entry if name.endswith("_loss")]
    assert sorted(names) == [
        "eval_averaged_eval_loss",
        "eval_averaged_near_loss",
        "eval_eval_loss",
        "eval_near_loss",
        "train_loss",
    ]


@pytest.mark.parametrize("name", ["f1", "eval_f1"])
def test_averaged_scores_are_named_alike_however_the_metrics_name_theirs(tmp_path, averaging, name):
    run = trainer(tmp_path, averaging, max_steps=2, metric_for_best_model="averaged_f1", eval_delay=1)
    run.compute_metrics = lambda _: {name: 0.5}
    run.train()
    assert {"eval_f1", "eval_averaged_f1"} <= run.evaluate().keys()
    assert any("eval_averaged_f1" in entry for entry in run.state.log_history)


def test_an_evaluation_before_anything_is_averaged_is_as_always(tmp_path, averaging):
    run = trainer(tmp_path, averaging)
    assert "eval_averaged_loss" not in run.evaluate()
    with pytest.raises(AveragingError, match=r"call trainer\.train\(\) first"), averaged_weights(run):
        pass
    with (
        pytest.raises(AveragingError, match="no WeightAveragingCallback"),
        averaged_weights(trainer(tmp_path)),
    ):
        pass


def test_two_callbacks_are_refused_before_training(tmp_path, averaging):
    with pytest.raises(ConfigError, match="twice"):
        trainer(tmp_path, averaging, WeightAveragingCallback(swaft.EMA())).train()


def test_adapters_that_peft_leaves_in_16_bits_are_refused_until_they_are_cast(tmp_path, averaging):
    run = trainer(tmp_path, averaging, bf16=True, max_steps=2, eval_strategy="no", save_strategy="no")
    lora = LoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS")
    run.model = run.model_wrapped = get_peft_model(model().to(torch.bfloat16), lora)
    advice = r"dtype=torch\.float32\)\), or set p\.data = p\.data\.float\(\).*Trainer: bf16=True"
    with pytest.raises(UnsupportedEngineError, match=advice):
        run.train()
    for p in run.model.parameters():
        if p.requires_grad:
            p.data = p.data.float()
    run.train()
    assert averaging.averager.num_averaged == 2


def test_a_model_is_trained_further_by_another_trainer_and_the_average_stays(tmp_path, averaging):
    first = trainer(tmp_path / "a", averaging)
    first.train()
    assert averaging.averager is not None
    mean = averaging.averager.shard().clone()
    second = trainer(tmp_path / "b", max_steps=2)
    second.model = second.model_wrapped = first.model
    second.train()
    assert torch.equal(averaging.averager.shard(), mean)


def test_training_again_does_not_hold_the_averages_of_before_beside_the_new_ones(
    tmp_path, averaging, monkeypatch
):
    run = trainer(tmp_path, averaging, max_steps=2, eval_strategy="no", save_strategy="no")
    run.train()
    shutil.rmtree(tmp_path / "final-averaged")
    [lane] = averaging.averager._averages.lanes["average"].held().values()
    before = weakref.ref(lane)
    del lane
    held = []
    monkeypatch.setattr(host, "require_host_memory", lambda *_: held.append(before()))
    run.train()
    assert held == [None]


def test_a_model_whose_training_failed_is_trained_by_another_trainer(tmp_path, averaging):
    def fail(*_):
        if first.state.global_step == 1:
            raise RuntimeError("CUDA out of memory")

    first = trainer(tmp_path / "a", averaging, max_steps=2, eval_strategy="no", save_strategy="no")
    failing = first.model.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        first.train()
    failing.remove()
    second = trainer(tmp_path / "b", max_steps=2, eval_strategy="no", save_strategy="no")
    second.model = second.model_wrapped = first.model
    second.train()


@pytest.mark.parametrize("evaluates", [lambda run: run.evaluate(), lambda run: run.predict(run.eval_dataset)])
def test_evaluations_in_16_bits_after_training_cast_both_weights(tmp_path, averaging, evaluates):
    run = trainer(tmp_path, averaging, bf16_full_eval=True)
    run.train()
    evaluates(run)
    with averaged_weights(run):
        evaluates(run)
    assert run.model.dtype == torch.bfloat16


def test_trainers_that_hand_weights_on_once_a_step_hand_on_both(tmp_path, averaging):
    class HandingOn(Trainer):
        """As TRL's do it to vLLM."""

        _last_loaded_step, seen = -1, ()

        def evaluation_loop(self, *args, **kwargs):
            if self._last_loaded_step != self.state.global_step:
                self._last_loaded_step = self.state.global_step
                self.handed = next(self.model.parameters()).detach().clone()
            self.seen = (*self.seen, torch.equal(self.handed, next(self.model.parameters())))
            return super().evaluation_loop(*args, **kwargs)

    run = trainer(tmp_path, averaging, kind=HandingOn)
    run.train()
    with averaged_weights(run):
        run.evaluate()
    run.evaluate()
    assert len(run.seen) > 6
    assert all(run.seen)


def test_an_optimizer_that_averages_by_itself_is_refused(tmp_path, averaging):
    run = trainer(tmp_path, averaging)
    run.optimizer = type("Free", (torch.optim.SGD,), {"eval": lambda self: None})(
        run.model.parameters(), lr=0.1
    )
    with pytest.raises(ConfigError, match="Free averages by itself"):
        run.train()


def test_checkpoints_in_a_folder_that_other_machines_do_not_see_are_refused(tmp_path, averaging, monkeypatch):
    monkeypatch.setattr("swaft.storage.together.SHARED_PATIENCE_S", -1.0)
    monkeypatch.setattr(Ranks, "is_main", False)  # that is on another machine
    with pytest.raises(ConfigError, match=r"output_dir: .* is not the folder the main process writes to"):
        trainer(tmp_path, averaging).train()
    monkeypatch.undo()
    trainer(tmp_path, averaging, max_steps=2, eval_strategy="no").train()
    assert not [entry.name for entry in tmp_path.iterdir() if entry.name.startswith(".")]


def test_an_export_that_is_there_already_is_not_overwritten(tmp_path, averaging):
    (tmp_path / "final-averaged").mkdir()
    with pytest.raises(ConfigError, match="move it away"):
        trainer(tmp_path, averaging).train()


def test_resuming_without_averages_names_the_latest_checkpoint_that_has_some(tmp_path, averaging):
    trainer(tmp_path, averaging, save_steps=2).train()
    shutil.rmtree(tmp_path / "final-averaged")
    # Killed while the averages were written, and between the Trainer's save and ours.
    (tmp_path / "checkpoint-8" / "averages" / "COMPLETE").unlink()
    shutil.rmtree(tmp_path / "checkpoint-6" / "averages")
    shutil.copytree(tmp_path / "checkpoint-2", tmp_path / "checkpoint-best")  # the user's
    with pytest.raises(StateError, match=r"has no averages.*resume from .*checkpoint-4, the latest"):
        trainer(tmp_path, WeightAveragingCallback(swaft.SWA(start=0.5)), max_steps=10).train(
            resume_from_checkpoint=True
        )


def test_resuming_with_another_rule_is_refused(tmp_path, averaging):
    trainer(tmp_path, averaging).train()
    shutil.rmtree(tmp_path / "final-averaged")
    with pytest.raises(StateError, match="EMA"):
        trainer(tmp_path, WeightAveragingCallback(swaft.EMA())).train(
            resume_from_checkpoint=str(tmp_path / "checkpoint-4")
        )


def test_a_run_that_goes_back_to_an_earlier_checkpoint_writes_the_later_ones_again(tmp_path, averaging):
    settings = {"max_steps": 4, "save_steps": 2, "eval_strategy": "no"}
    trainer(tmp_path, averaging, **settings).train()
    shutil.rmtree(tmp_path / "final-averaged")
    again = WeightAveragingCallback(swaft.SWA(start=0.5))
    trainer(tmp_path, again, **settings).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert torch.equal(again.averager.shard(), averaging.averager.shard())


def test_a_run_without_the_callbacks_is_not_resumed_with_them(tmp_path, averaging):
    trainer(tmp_path).train()
    with pytest.raises(StateError, match=r"noise\.json"):
        trainer(tmp_path, NoiseCallback(swaft.R3F())).train(resume_from_checkpoint=True)
    with pytest.raises(StateError, match="train from the beginning, or without averaging"):
        trainer(tmp_path, averaging).train(resume_from_checkpoint=True)


@pytest.mark.parametrize("callback", [WeightAveragingCallback, lambda: NoiseCallback(swaft.R3F())])
def test_checkpoints_of_which_callbacks_are_not_told_are_refused(tmp_path, callback):
    run = trainer(tmp_path, callback())
    run.args.enable_jit_checkpoint = True
    with pytest.raises(ConfigError, match="set enable_jit_checkpoint=False"):
        run.train()


def test_a_search_over_settings_is_refused(tmp_path, averaging):
    run = trainer(tmp_path, averaging)
    run.hp_search_backend = "optuna"
    with pytest.raises(ConfigError, match="hyperparameter_search"):
        run.train()


def test_a_callback_that_no_trainer_calls_says_where_it_belongs(tmp_path, averaging):
    run = trainer(tmp_path)
    with pytest.raises(ConfigError, match=r"pass it to Trainer\(\.\.\., callbacks="):
        averaging.on_train_begin(run.args, run.state, run.control)


def test_trls_preference_trainer_averages_and_refuses_noise(tmp_path, averaging):
    def preferring(*callbacks):
        base = sft_trainer(tmp_path / "unused")
        pairs = [{"prompt": "5 6 ", "chosen": str(n), "rejected": str(n + 1)} for n in range(7, 39)]
        return DPOTrainer(
            model=base.model,
            args=DPOConfig(
                str(tmp_path / "dpo"),
                max_steps=4,
                learning_rate=1e-2,
                use_cpu=True,
                bf16=False,
                report_to="none",
            ),
            train_dataset=Dataset.from_list(pairs),
            processing_class=base.processing_class,
            callbacks=list(callbacks),
        )

    preferring(averaging).train()
    assert averaging.averager is not None
    assert averaging.averager.num_averaged == 3
    assert (tmp_path / "dpo" / "final-averaged" / "adapter_model.safetensors").is_file()
    with pytest.raises(NoiseError, match=r"DPOTrainer\.compute_loss is a loss of its own"):
        preferring(NoiseCallback(swaft.R3F())).train()


def test_an_averaging_callback_that_was_exchanged_is_not_evaluated(tmp_path, averaging):
    run = trainer(tmp_path / "a", averaging)
    run.train()
    run.remove_callback(WeightAveragingCallback)
    assert "eval_averaged_loss" not in run.evaluate()
    other = WeightAveragingCallback(swaft.SWA(start=0.75))
    run.args.output_dir = str(tmp_path / "b")
    run.add_callback(other)
    run.train()
    with averaged_weights(run):
        expected = run.evaluate()["eval_loss"]
    assert run.evaluate()["eval_averaged_loss"] == expected
    assert other.averager is not None
    assert other.averager.num_averaged == 3


def test_what_trl_adds_to_the_scores_of_averaged_weights_is_named_as_theirs(tmp_path, averaging):
    run = sft_trainer(tmp_path, averaging, max_steps=4, save_strategy="no")
    run.train()
    both = run.evaluate()
    with averaged_weights(run):
        expected = run.evaluate()["eval_entropy"]
    assert both["eval_averaged_entropy"] == expected
    run.remove_callback(WeightAveragingCallback)
    assert both["eval_entropy"] == run.evaluate()["eval_entropy"] != expected
    logged = [entry for entry in run.state.log_history if "eval_averaged_loss" in entry]
    assert len(logged) == 3
    assert all("eval_averaged_entropy" in entry and "eval_entropy" not in entry for entry in logged)


def test_a_callback_that_another_trainer_has_trained_with_is_not_evaluated(tmp_path, averaging):
    alone = {"max_steps": 4, "eval_strategy": "no", "save_strategy": "no"}
    first, second = (trainer(tmp_path / name, averaging, **alone) for name in ("a", "b"))
    first.train()
    second.train()
    assert "eval_averaged_loss" in second.evaluate()
    assert "eval_averaged_loss" not in first.evaluate()
    with pytest.raises(AveragingError, match="a callback of its own"), averaged_weights(first):
        pass


def test_a_model_that_the_trainer_was_given_after_training_has_no_average(tmp_path, averaging):
    run = trainer(tmp_path, averaging, max_steps=4, eval_strategy="no", save_strategy="no")
    run.train()
    trained = run.model
    run.model = run.model_wrapped = model()
    assert "eval_averaged_loss" not in run.evaluate()
    with pytest.raises(AveragingError, match="has been given another model"), averaged_weights(run):
        pass
    run.model = run.model_wrapped = trained
    assert "eval_averaged_loss" in run.evaluate()


def test_the_page_of_a_trainers_run_has_the_loss_between_both_weights(tmp_path, averaging):
    run = trainer(tmp_path, averaging, eval_strategy="no")
    run.train()
    scores = run.evaluate()
    before = {name: value.clone() for name, value in run.model.named_parameters()}
    with pytest.raises(ConfigError, match="one data set of numbered rows"):
        write_surface(run, eval_dataset={"one": run.eval_dataset})
    write_surface(run, rows=1000)
    after = dict(run.model.named_parameters())
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    surface = read_run(tmp_path).surface
    assert surface is not None
    assert surface["rows"] == 16
    at = dict(zip(surface["line"]["position"], surface["line"]["loss"], strict=True))
    assert at[0.0] == pytest.approx(scores["eval_loss"], rel=1e-6)
    assert at[1.0] == pytest.approx(scores["eval_averaged_loss"], rel=1e-6)


def test_an_evaluation_that_is_set_on_the_trainer_itself_scores_both_weights_once(tmp_path, averaging):
    run = trainer(tmp_path, averaging, max_steps=2, eval_strategy="no", save_strategy="no")
    own, asked = run.evaluate, []
    run.evaluate = lambda *args, **kwargs: asked.append(kwargs) or own(*args, **kwargs)
    for _ in range(2):
        run.args.output_dir = f"{run.args.output_dir}/again"
        run.train()
    assert {"eval_averaged_loss", "eval_loss"} <= run.evaluate().keys()
    assert len(asked) == 2


class OfExamples(Trainer):
    """Evaluates as transformers' run_qa.py does, and adds a score under a name of its own."""

    def evaluate(self, eval_dataset=None, eval_examples=None, ignore_keys=None, metric_key_prefix="eval"):
        scores = super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        return scores | {"eval_first": float(self.model.classifier.bias[0])}


class PassingOn(Trainer):
    def evaluate(self, *args, **kwargs):
        return super().evaluate(*args, **kwargs)


class OfItsOwn(Trainer):
    def evaluate(self, eval_dataset=None):
        return super().evaluate(eval_dataset)


@pytest.mark.parametrize("kind", [OfExamples, PassingOn, OfItsOwn])
def test_an_evaluation_of_the_users_own_scores_both_weights(tmp_path, averaging, kind):
    run = trainer(tmp_path, averaging, kind=kind, eval_strategy="no", save_strategy="no")
    run.train()
    both = run.evaluate(run.eval_dataset)
    with averaged_weights(run):
        expected = run.evaluate()["eval_loss"]
    first = float(run.model.classifier.bias[0])
    run.remove_callback(WeightAveragingCallback)
    logged = [entry["eval_averaged_loss"] for entry in run.state.log_history if "eval_averaged_loss" in entry]
    assert logged == [expected]
    assert both["eval_loss"] == run.evaluate()["eval_loss"] != expected
    if kind is OfExamples:
        assert both["eval_first"] == first
    if kind is PassingOn:
        run.add_callback(averaging)
        assert run.evaluate(metric_key_prefix="test")["test_averaged_loss"] == expected

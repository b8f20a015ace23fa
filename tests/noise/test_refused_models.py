"""Models and batches that the fused loss, or any noise, would be wrong for: refused with what to do."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import tiny_models as tiny
import torch
import torch.nn.functional as F
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from accelerate.utils.other import compile_regions
from tiny_models import VOCABULARY, bert, causal_batch, classification_batch, generation_batch, t5
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from transformers import (
    BartForCausalLM,
    BertForMaskedLM,
    BertForMultipleChoice,
    BertForSequenceClassification,
    DebertaV2Config,
    DebertaV2ForMaskedLM,
    T5ForConditionalGeneration,
)

from swaft.errors import NoiseError
from swaft.noise import R3F, R4F, RDrop, TaskLoss

pytestmark = pytest.mark.unit


class Rescaled(T5ForConditionalGeneration):
    """Multiplies its logits by a number that no attribute tells."""

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = 1.5 * output.logits
        if output.loss is not None:
            output.loss = F.cross_entropy(output.logits.flatten(0, 1), kwargs["labels"].flatten())
        return output


class Weighted(T5ForConditionalGeneration):
    """Weights the classes in its loss."""

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        if output.loss is not None:
            weights = torch.linspace(0.5, 2.0, VOCABULARY)
            output.loss = F.cross_entropy(output.logits.flatten(0, 1), kwargs["labels"].flatten(), weights)
        return output


class Tempered(T5ForConditionalGeneration):
    """Trains a temperature, which is 1 at first."""

    def __init__(self, config):
        super().__init__(config)
        self.temperature = torch.nn.Parameter(torch.ones(()))

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = output.logits / self.temperature
        return output


class Untrained(T5ForConditionalGeneration):
    """Gives logits that nothing can be learned from."""

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = output.logits.detach()
        return output


class Reseeding(T5ForConditionalGeneration):
    """Seeds torch's random state anew in every pass, as Reformer does."""

    def forward(self, *args, **kwargs):
        torch.seed()
        return super().forward(*args, **kwargs)


class TwoCalls(T5ForConditionalGeneration):
    """Asks its head twice in a pass."""

    def forward(self, *args, **kwargs):
        self.lm_head(torch.zeros(1, 1, 16))
        return super().forward(*args, **kwargs)


def of_kind(kind):
    torch.manual_seed(0)
    return kind(t5().config).train()


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (Rescaled, r"does more to its logits after the head than is known.*fused=False"),
        (Tempered, r"trainable weight of shape \(\) to its logits.*fused=False"),
        (Untrained, r"cuts the gradient of its logits"),
        (TwoCalls, r"ran 2 times in one forward pass.*Set fused=False"),
    ],
)
def test_a_head_that_is_not_understood_is_refused_and_trains_from_logits(kind, message):
    model, batch = of_kind(kind), generation_batch()
    with pytest.raises(NoiseError, match=message):
        R3F(sigma=0.1)(model, batch)
    assert "forward" not in vars(model.lm_head)
    with nullcontext() if kind is not Untrained else pytest.raises(RuntimeError):
        R3F(sigma=0.1, fused=False)(model, batch).loss.backward()


def test_a_masked_model_that_names_a_layer_before_its_head_is_refused_and_trains_from_logits():
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    config = DebertaV2Config(vocab_size=VOCABULARY, hidden_size=16, legacy=False, **sizes)
    model = DebertaV2ForMaskedLM(config).train()
    with pytest.raises(NoiseError, match=r"does more to its logits.*fused=False"):
        RDrop()(model, causal_batch())
    assert RDrop(fused=False)(model, causal_batch()).divergence > 0


@pytest.mark.parametrize("fused", [True, False])
def test_a_model_that_trains_another_loss_is_refused(fused):
    with pytest.raises(NoiseError, match=r"the model's own loss is another one.*swaft\.TaskLoss"):
        R3F(sigma=0.1, fused=fused)(of_kind(Weighted), generation_batch())


def test_labels_that_are_not_shifted_as_in_barts_decoder_are_another_loss():
    with pytest.raises(NoiseError, match=r"of other rows.*swaft\.TaskLoss"):
        R3F(sigma=0.1)(tiny.bart(BartForCausalLM), causal_batch())


@pytest.mark.parametrize("fused", [True, False])
def test_losses_of_routers_are_refused_however_small(fused):
    model = tiny.mixtral(output_router_logits=True, router_aux_loss_coef=1e-6)
    with pytest.raises(NoiseError, match=r"adds losses of its routers.*=False.*router_aux_loss_coef=0\.0"):
        R3F(sigma=0.1, fused=fused)(model, causal_batch())


def test_a_model_that_seeds_its_passes_itself_shares_no_masks():
    model, batch = of_kind(Reseeding), generation_batch()
    with pytest.raises(NoiseError, match=r"reseeds torch's random state.*masks='independent'"):
        R3F(sigma=0.1)(model, batch)
    assert R3F(sigma=0.1, masks="independent")(model, batch).divergence > 0


def with_virtual_tokens(model, task: str):
    from peft import PromptTuningConfig, get_peft_model

    return get_peft_model(model, PromptTuningConfig(task_type=task, num_virtual_tokens=4)).train()  # type: ignore[arg-type]


@pytest.mark.parametrize("objective", [R3F(sigma=0.1), RDrop()])
def test_virtual_tokens_among_the_rows_are_refused(objective):
    with pytest.raises(NoiseError, match=r"virtual tokens of prompt tuning"):
        objective(with_virtual_tokens(tiny.llama(), "CAUSAL_LM"), causal_batch())


def test_virtual_tokens_before_the_encoder_leave_no_embedding_to_noise_there():
    model = with_virtual_tokens(t5(), "SEQ_2_SEQ_LM")
    with pytest.raises(NoiseError, match=r"ran 0 times.*prompt tuning.*swaft\.RDrop"):
        R3F(sigma=0.1)(model, generation_batch())
    assert RDrop()(model, generation_batch()).divergence > 0


def test_token_types_that_share_the_embedding_are_refused():
    batch = causal_batch()
    batch["token_type_ids"] = torch.zeros_like(batch["input_ids"])
    with pytest.raises(NoiseError, match=r"ran 2 times.*leave out token_type_ids"):
        R3F(sigma=0.1)(tiny.gpt2(), batch)


def test_a_batch_without_a_counted_label_proves_nothing_and_the_next_one_does():
    model, objective, batch = of_kind(Weighted), R3F(sigma=0.1), generation_batch()
    nothing = {**batch, "labels": torch.full_like(batch["labels"], -100)}
    assert objective(model, nothing).loss == 0
    with pytest.raises(NoiseError, match="another one"):
        objective(model, batch)


def test_a_model_over_several_devices_is_refused_by_what_loaded_it_so():
    model = tiny.gpt2()
    add_hook_to_module(model.get_output_embeddings(), AlignDevicesHook())
    with pytest.raises(NoiseError, match="load it without device_map"):
        R3F(sigma=0.1).prepare_model(model)


def test_an_adapted_head_is_refused_before_training_and_trains_from_logits():
    model, batch = tiny.t5_with_adapters(target_modules=["q", "lm_head"]), generation_batch()
    with pytest.raises(
        NoiseError, match=r"is a Linear with a forward of its own.*target_modules.*modules_to_save"
    ):
        R3F(sigma=0.1).prepare_model(model)
    objective = R3F(sigma=0.1, fused=False)
    objective.prepare_model(model)
    objective(model, batch).loss.backward()


def test_a_quantised_head_is_refused():
    model = tiny.untied_t5()
    model.lm_head = torch.ao.nn.quantized.dynamic.Linear(16, VOCABULARY)
    with pytest.raises(NoiseError, match=r"do not quantise it"):
        R3F(sigma=0.1).prepare_model(model)


@pytest.mark.parametrize("build", [tiny.bert, tiny.t5])
@pytest.mark.parametrize("in_place", [True, False])
def test_noise_in_a_model_that_is_compiled_whole_is_refused(build, in_place):
    model = build()
    if in_place:
        model.compile(backend="eager")
    else:
        model = torch.compile(model, backend="eager")
    with pytest.raises(NoiseError, match=r"compiled whole.*token embedding.*torch_compile"):
        R3F(sigma=0.1, fused=False).prepare_model(model)
    RDrop(fused=False).prepare_model(model)


def test_noise_in_a_model_whose_regions_accelerate_compiles_is_not():
    R3F(sigma=0.1).prepare_model(compile_regions(tiny.bert(), backend="eager"))


@pytest.mark.parametrize("objective", [R3F(), R4F(), RDrop()])
def test_regression_is_refused_before_training(objective):
    with pytest.raises(NoiseError, match=r"at least two classes.*swaft\.TaskLoss"):
        objective.prepare_model(bert(num_labels=1))


def test_regression_is_refused_at_the_first_call_too():
    batch = {**classification_batch(), "labels": torch.rand(4)}
    with pytest.raises(NoiseError, match="at least two classes"):
        R3F()(bert(num_labels=1), batch)


def test_a_configuration_of_one_label_does_not_concern_a_model_with_other_classes():
    config, batch = bert(num_labels=1).config, classification_batch()
    masked = {**batch, "labels": batch["input_ids"]}
    choices = {
        **{name: value.view(2, 2, -1) for name, value in masked.items()},
        "labels": torch.tensor([0, 1]),
    }
    for kind, rows in ((BertForMaskedLM, masked), (BertForMultipleChoice, choices)):
        assert RDrop()(kind(config).train(), rows).loss.isfinite()
    single = {**{name: value.unsqueeze(1) for name, value in masked.items()}, "labels": torch.zeros(4).long()}
    with pytest.raises(NoiseError, match="at least two classes"):
        RDrop()(BertForMultipleChoice(config).train(), single)


@pytest.mark.parametrize("kwargs", [{"use_reentrant": True}, {"preserve_rng_state": True}])
def test_reentrant_checkpointing_is_refused(kwargs):
    model = bert()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=kwargs)
    with pytest.raises(NoiseError, match=r'kwargs=\{"use_reentrant": False\}.*gradient_checkpointing=False'):
        R3F().prepare_model(model)


def test_parts_that_a_pass_changes_must_not_be_recomputed_after_it():
    model = bert()
    model.bert.embeddings = checkpoint_wrapper(model.bert.embeddings)
    with pytest.raises(NoiseError, match=r"bert\.embeddings \(BertEmbeddings\) is recomputed .* Embedding"):
        R3F(sigma=0.1)(model, classification_batch())
    whole = checkpoint_wrapper(t5())
    with pytest.raises(
        NoiseError, match=r"T5ForConditionalGeneration\) is recomputed .* changes in its Linear"
    ):
        RDrop()(whole, generation_batch())
    layers = bert()
    layers.bert.encoder.layer[0] = checkpoint_wrapper(layers.bert.encoder.layer[0])
    layers.bert.embeddings.word_embeddings = checkpoint_wrapper(layers.bert.embeddings.word_embeddings)
    assert R3F(sigma=0.1)(layers, classification_batch()).divergence > 0


def test_several_labels_a_row_are_refused():
    model = bert()
    model.config.problem_type = "multi_label_classification"
    batch = {**classification_batch(), "labels": torch.ones(4, 3)}
    with pytest.raises(NoiseError, match=r"Labels of shape \(4, 3\) do not fit the model's rows, \(4,\)"):
        R3F(sigma=0.1)(model, batch)


class WeightedClassifier(BertForSequenceClassification):
    """Weights the classes in its loss; counts its passes."""

    passes = 0

    def forward(self, *args, **kwargs):
        self.passes += 1
        output = super().forward(*args, **kwargs)
        if output.loss is not None:
            weights = torch.tensor([1.0, 2.0, 3.0])
            output.loss = F.cross_entropy(output.logits, kwargs["labels"], weights)
        return output


def test_class_weights_that_cancel_in_a_batch_of_one_class_are_found_in_the_next():
    model, objective, batch = WeightedClassifier(bert().config), R3F(sigma=0.1), classification_batch()
    objective(model, {**batch, "labels": torch.ones_like(batch["labels"])})
    with pytest.raises(NoiseError, match=r"own loss is another one.*swaft\.TaskLoss"):
        objective(model, batch)


def test_batches_of_one_row_prove_the_loss_once():
    model, objective = WeightedClassifier(bert().config), R3F(sigma=0.1)
    for passes in (4, 6):  # class weights cancel in one row, so its loss is the mean cross entropy
        objective(model, classification_batch(rows=1))
        assert model.passes == passes


def test_a_batch_without_labels_is_refused():
    batch = classification_batch()
    del batch["labels"]
    with pytest.raises(NoiseError, match="no labels"):
        R3F()(bert(), batch)
    with pytest.raises(NoiseError, match="has no loss"):
        TaskLoss()(bert(), batch)


def test_a_model_without_a_task_head_is_refused():
    class Headless(BertForSequenceClassification):
        def forward(self, labels=None, **kwargs):  # type: ignore[override]
            return self.bert(**kwargs)

    model = Headless(bert().config)
    with pytest.raises(NoiseError, match=r"lacks \.loss or \.logits"):
        R3F(sigma=0.1)(model, classification_batch())

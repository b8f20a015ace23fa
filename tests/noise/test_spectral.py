from __future__ import annotations

import copy

import pytest
import torch
from tiny_models import bart, bart_classifier, bert, classification_batch, roberta, t5
from torch.nn.utils.parametrizations import spectral_norm
from transformers import BertForMaskedLM

from swaft.averaging.buffers import fold_parametrizations
from swaft.errors import ConfigError, NoiseError
from swaft.noise import R3F, R4F
from swaft.noise.spectral import normalise_head, normalised_layers, power_iteration_paused

pytestmark = pytest.mark.unit


@pytest.mark.parametrize(
    ("build", "layers", "names"),
    [
        (bert, "all", ["classifier"]),
        (bert, "last", ["classifier"]),
        (roberta, "all", ["classifier.dense", "classifier.out_proj"]),
        (roberta, "last", ["classifier.out_proj"]),
        (bart_classifier, "all", ["classification_head.dense", "classification_head.out_proj"]),
        (bart_classifier, "last", ["classification_head.out_proj"]),
    ],
)
def test_the_head_is_what_lies_outside_the_base_model(build, layers, names):
    assert normalise_head(build(), layers=layers) == names


def test_normalising_twice_is_normalising_once():
    model = roberta()
    assert normalise_head(model) == normalise_head(model)
    assert len(model.classifier.dense.parametrizations.weight) == 1


@pytest.mark.parametrize("build", [bart, t5])
def test_generation_models_have_no_head_to_normalise(build):
    with pytest.raises(ConfigError, match=r"no classification head.*swaft\.R3F"):
        R4F().prepare_model(build())


def test_a_masked_language_model_has_no_head_to_normalise():
    with pytest.raises(ConfigError, match="no classification head"):
        normalise_head(BertForMaskedLM(bert().config))


def test_a_head_already_partitioned_is_refused():
    model = bert()
    model.classifier.weight = torch.nn.Parameter(torch.empty(0))
    with pytest.raises(ConfigError, match="zero3_init_flag"):
        normalise_head(model)


def test_r4f_without_a_prepared_model_is_an_error():
    with pytest.raises(NoiseError, match=r"prepare_model\(model\) before accelerator\.prepare"):
        R4F(sigma=0.1)(bert(), classification_batch())


def test_the_weight_of_a_normalised_layer_has_spectral_norm_one():
    model = roberta()
    normalise_head(model)
    for _ in range(200):
        model.classifier.dense.weight  # noqa: B018  each access in training mode is one power iteration
    model.eval()
    norm = torch.linalg.matrix_norm(model.classifier.dense.weight.detach(), 2)
    assert float(norm) == pytest.approx(1, abs=1e-4)


def test_the_normalisation_is_torchs_own_bit_for_bit():
    model = roberta()
    reference = spectral_norm(copy.deepcopy(model.classifier.dense))
    normalise_head(model)
    ours = model.classifier.dense
    reference.load_state_dict(ours.state_dict())
    for _ in range(3):
        assert torch.equal(ours.weight, reference.weight)
        probe = torch.randn(2, 16)
        torch.testing.assert_close(
            torch.autograd.grad(ours(probe).sum(), ours.parametrizations.weight.original),
            torch.autograd.grad(reference(probe).sum(), reference.parametrizations.weight.original),
        )
    assert ours.state_dict().keys() == reference.state_dict().keys()


def test_normalising_leaves_the_global_random_state_alone_and_repeats():
    first, second = roberta(), roberta()
    before = torch.get_rng_state()
    normalise_head(first, seed=3)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(5)
    normalise_head(second, seed=3)
    for a, b in zip(first.buffers(), second.buffers(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("options", [{}, {"detach": "noised"}, {"passes": "doubled"}])
def test_a_step_makes_one_power_iteration_however_its_passes_are_run(options):
    model, batch, by_hand = bert(dropout=0.0), classification_batch(), bert(dropout=0.0)
    objective = R4F(sigma=0.1, **options)
    for each in (model, by_hand):
        objective.prepare_model(each)
    objective(model, batch)
    by_hand(**batch)
    assert torch.equal(model.classifier.weight, by_hand.classifier.weight)
    name = "classifier.parametrizations.weight.0._u"
    assert torch.equal(model.state_dict()[name], by_hand.state_dict()[name])


def test_pausing_restores_each_modes():
    model = bert()
    normalise_head(model)
    norm = model.classifier.parametrizations.weight[0]
    with power_iteration_paused(model):
        assert not norm.training
        assert model.classifier.training
    assert norm.training


@pytest.mark.parametrize("options", [{"detach": "noised"}, {"passes": "doubled"}])
def test_both_passes_use_the_same_normalised_head(options):
    model = roberta(dropout=0.0)
    objective = R4F(sigma=1e-6, **options)
    objective.prepare_model(model)
    norm = model.classifier.dense.parametrizations.weight[0]
    norm._v.normal_()  # far from converged: an iteration between the passes would show
    assert objective(model, classification_batch()).divergence < 1e-9


def test_r4f_trains_the_weight_under_the_norm():
    model, batch = roberta(), classification_batch()
    objective = R4F(sigma=0.1)
    objective.prepare_model(model)
    objective(model, batch).loss.backward()
    assert model.classifier.dense.parametrizations.weight.original.grad.any()


class Undisturbed(R4F):
    """R4F whose noise is nothing."""

    def _draw(self, embedding, **_):
        return embedding.clone()


def test_two_equal_passes_under_r4f_have_exactly_zero_divergence():
    model = roberta()
    objective = Undisturbed(sigma=1.0)
    objective.prepare_model(model)
    objective._proved.add(model)  # the proof is that noise arrives
    assert objective(model, classification_batch()).divergence == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_folding_gives_the_weight_that_evaluation_uses_bit_for_bit(dtype):
    model, batch = roberta().to(dtype), classification_batch()
    objective = R4F(sigma=0.1)
    objective.prepare_model(model)
    for _ in range(3):
        objective(model, batch)
    model.eval()

    folded = fold_parametrizations(model, model.state_dict(), derive=False)
    plain = roberta().to(dtype).eval()
    assert folded.keys() == plain.state_dict().keys()
    for layer in ("dense", "out_proj"):
        assert torch.equal(folded[f"classifier.{layer}.weight"], getattr(model.classifier, layer).weight)
    plain.load_state_dict(folded)
    assert torch.equal(plain(**batch).logits, model(**batch).logits)


def test_sixteen_bit_weights_beside_fp32_vectors_train_and_fold():
    model, batch = roberta(), classification_batch()
    objective = R4F(sigma=0.1)
    objective.prepare_model(model)
    for parameter in model.parameters():  # as DeepSpeed casts a model: its parameters only
        parameter.data = parameter.data.bfloat16()
    objective(model, batch).loss.backward()
    model.eval()

    assert model.classifier.dense.parametrizations.weight[0]._u.dtype == torch.float32
    assert model.classifier.dense.parametrizations.weight.original.grad.any()
    folded = fold_parametrizations(model, model.state_dict(), derive=False)["classifier.dense.weight"]
    assert torch.equal(folded, model.classifier.dense.weight)


def test_autocast_does_not_round_the_norm():
    model = roberta().eval()
    normalise_head(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        weight = model.classifier.dense.weight
    assert torch.equal(
        weight, fold_parametrizations(model, model.state_dict(), derive=False)["classifier.dense.weight"]
    )


def test_a_plain_model_has_no_normalised_layer():
    model = bert()
    R3F().prepare_model(model)
    assert normalised_layers(model) == []


def test_a_head_without_its_parametrization_is_saved_under_its_own_names_and_opens_as_it_was_trained(
    tmp_path,
):
    model, batch, objective = roberta(), classification_batch(), R4F(sigma=0.1)
    objective.prepare_model(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(2):
        objective(model, batch).loss.backward()
        optimizer.step()
    trained = copy.deepcopy(model).eval()(**batch).logits

    model.eval()  # as docs/methods.md shows it
    for layer in list(model.modules()):
        if torch.nn.utils.parametrize.is_parametrized(layer, "weight"):
            torch.nn.utils.parametrize.remove_parametrizations(layer, "weight")
    model.save_pretrained(tmp_path)
    opened, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert torch.equal(opened.eval()(**batch).logits, trained)

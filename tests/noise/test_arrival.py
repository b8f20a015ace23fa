from __future__ import annotations

import logging
import re

import pytest
import torch
import torch.nn.functional as F
import transformers
from tiny_models import bart, bert, classification_batch, generation_batch, gradients_of, t5

from swaft.errors import NoiseError
from swaft.noise import R3F, R4F, RDrop, TaskLoss, objectives
from swaft.noise.embedding import embedding_hook, find_site
from swaft.noise.generator import add_noise
from swaft.noise.presets import resolve_settings
from swaft.noise.proof import FirstBatches, smallest_surviving_sigma

pytestmark = pytest.mark.unit


def deaf_bert():
    """A BERT that computes its embeddings, drops them, and reads the table on its own: noise goes nowhere."""
    model = bert()
    table = model.bert.embeddings.word_embeddings

    def swallow(module, args, kwargs, output):
        return module.LayerNorm(F.embedding(kwargs["input_ids"], table.weight))

    model.bert.embeddings.register_forward_hook(swallow, with_kwargs=True)
    return model


def test_an_encoder_that_ignores_its_embedding_output_is_found_out():
    with pytest.raises(
        NoiseError,
        match=r"changes nothing in the first layer of BertForSequenceClassification.*sigma=",
    ):
        R3F(sigma=0.5)(deaf_bert(), classification_batch())


@pytest.mark.parametrize("noise", ["uniform", "normal"])
def test_noise_lost_in_rounding_is_an_error_that_names_a_sigma_which_survives(noise):
    model, batch = bert().bfloat16(), classification_batch()
    with pytest.raises(NoiseError, match=r"changes nothing in the embedding output.*bfloat16") as caught:
        R3F(noise=noise, sigma=1e-9)(model, batch)

    found = re.search(r"sigma=(\S+): set that", str(caught.value))
    assert found is not None
    out = R3F(noise=noise, sigma=float(found[1]))(model, batch)
    assert 0.3 < float(out.changed) < 0.6


def test_a_relative_sigma_is_named_as_a_share_too():
    model, batch = bert().bfloat16(), classification_batch()
    with pytest.raises(NoiseError) as caught:
        R3F(preset="relative", sigma=1e-8)(model, batch)
    found = re.search(r"sigma=(\S+): set that", str(caught.value))
    assert found is not None
    assert 1e-3 < float(found[1]) < 1e-1


def test_the_smallest_sigma_of_a_scaled_embedding_is_named_before_its_factor():
    model = bart(scale_embedding=True).bfloat16()
    with pytest.raises(NoiseError, match="changes nothing in the") as caught:
        R3F(preset="fairseq", sigma=1e-9)(model, generation_batch())
    found = re.search(r"sigma=(\S+): set that", str(caught.value))
    assert found is not None
    assert 0.2 < float(R3F(preset="fairseq", sigma=float(found[1]))(model, generation_batch()).changed) < 0.7


@pytest.mark.parametrize("noise", ["uniform", "normal"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_smallest_surviving_sigma_changes_about_half_of_the_entries(noise, dtype):
    model, batch = bert().to(dtype), classification_batch(rows=64)
    site = find_site(model)
    with embedding_hook(site) as record:
        model(**batch)
    sigma = smallest_surviving_sigma(record, noise)

    def disturb(clean):
        return add_noise(clean, noise=noise, sigma=sigma, seed=0, rank=0, step=0)

    with embedding_hook(site, disturb) as record:
        model(**batch)
    assert 0.35 < float(record.changed()) < 0.6


@pytest.mark.parametrize(
    ("build", "batch"),
    [(bert, classification_batch()), (bart, generation_batch()), (t5, generation_batch())],
)
def test_the_proof_changes_neither_gradients_nor_random_state(build, batch, monkeypatch):
    def run():
        model = build()
        torch.manual_seed(5)
        out = R3F(sigma=1e-2)(model, batch)
        out.loss.backward()
        return [out.loss.detach(), out.divergence, *gradients_of(model).values(), torch.get_rng_state()]

    proved = run()
    monkeypatch.setattr(objectives, "prove", lambda *_args, **_kwargs: True)
    unproved = run()
    for a, b in zip(proved, unproved, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    "objective", [R3F(sigma=1e-2), RDrop(), TaskLoss(0.1)], ids=["r3f", "rdrop", "smoothed"]
)
def test_a_pass_before_the_proof_still_has_its_backward(objective):
    model = bert()
    pending = model(**classification_batch()).loss
    (pending + objective(model, classification_batch()).loss).backward()


def test_the_proof_leaves_the_power_iteration_where_it_was(monkeypatch):
    def run():
        model = bert()
        objective = R4F(sigma=1e-2)
        objective.prepare_model(model)
        torch.manual_seed(5)
        objective(model, classification_batch())
        return [buffer.clone() for buffer in model.buffers()]

    proved = run()
    monkeypatch.setattr(objectives, "prove", lambda *_args, **_kwargs: True)
    for a, b in zip(proved, run(), strict=True):
        assert torch.equal(a, b)


def test_the_proof_under_an_outer_autocast_keeps_every_gradient():
    model, batch = bert(), classification_batch()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        R3F(sigma=1e-2)(model, batch).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_the_proof_is_made_at_the_first_call_only():
    model, batch = bert(), classification_batch()
    passes = []
    model.register_forward_hook(lambda *_: passes.append(model.training))
    objective = R3F(sigma=1e-2)
    for expected in (4, 6, 8):
        objective(model, batch)
        assert len(passes) == expected
    model.eval()
    objective(model, batch)
    assert passes[-2:] == [False, False]


def test_what_survives_is_logged_once(caplog):
    model, batch = bert(), classification_batch()
    objective = R3F(sigma=1e-2)
    with caplog.at_level(logging.INFO, logger="swaft"):
        objective(model, batch)
        objective(model, batch)
    assert len(caplog.messages) == 1
    for expected in ("uniform noise, sigma 0.01", "noise-to-signal", "first encoder layer", "smallest sigma"):
        assert expected in caplog.messages[0]


SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("Funnel", {"d_model": 16, "n_head": 2, "d_head": 8, "d_inner": 32, "block_sizes": [1, 1]}),
        ("SqueezeBert", SIZES | {"embedding_size": 16}),
        ("MarkupLM", SIZES | {"max_xpath_tag_unit_embeddings": 220, "xpath_unit_hidden_size": 2}),
    ],
    ids=["blocks in blocks", "layers called past their hooks", "tables among the embeddings"],
)
def test_noise_is_followed_into_layers_of_every_shape(name, sizes):
    config = getattr(transformers, f"{name}Config")(vocab_size=60, pad_token_id=1, num_labels=3, **sizes)
    model = getattr(transformers, f"{name}ForSequenceClassification")(config).train()
    assert float(R3F(sigma=0.5)(model, classification_batch()).divergence) > 0


def test_the_first_layer_that_runs_is_looked_at_where_layerdrop_skips_some(monkeypatch):
    model, batch = bart(), generation_batch()
    model.model.encoder.layerdrop = 0.5
    draws = iter([0.0, 1.0] * 4)  # drop the first encoder layer in every pass, keep the second
    monkeypatch.setattr(torch, "rand", lambda *_args, **_kwargs: torch.tensor(next(draws)))
    assert float(R3F(sigma=1e-2)(model, batch).divergence) > 0


def test_an_encoder_of_which_no_layer_runs_is_an_error(monkeypatch):
    model, batch = bart(), generation_batch()
    model.model.encoder.layerdrop = 0.5
    monkeypatch.setattr(torch, "rand", lambda *_args, **_kwargs: torch.tensor(0.0))
    with pytest.raises(NoiseError, match="No layer of BartEncoder ran"):
        R3F(sigma=1e-2)(model, batch)


def warnings_of(objective, model, caplog, *, batches: int) -> list[str]:
    caplog.clear()
    with caplog.at_level(logging.WARNING, logger="swaft"):
        for _ in range(batches):
            objective(model, classification_batch())
    return caplog.messages


def test_noise_that_will_never_be_felt_is_said_once_after_a_few_batches(caplog):
    model, objective = bert(), R3F()
    assert not warnings_of(objective, model, caplog, batches=7)
    [warning] = warnings_of(objective, model, caplog, batches=20)
    found = re.search(
        r"R3F has no effect: after 8 batches weight x divergence is (\S+) next to a task", warning
    )
    assert found is not None
    assert 0 < float(found[1]) < 1e-9
    assert "Set masks='independent'" in warning
    assert "preset='relative' with sigma=0.5 or more" in warning


def test_a_run_that_ends_before_the_last_check_is_told_at_its_end(caplog):
    model, objective = bert(), R3F(preset="relative", sigma=0.1)
    assert not warnings_of(objective, model, caplog, batches=63)
    objective.finish()
    assert not caplog.messages  # a head that still learns may make the difference
    assert not warnings_of(objective, model, caplog, batches=1)
    objective.finish()
    objective.finish()
    [warning] = caplog.messages
    assert "after 64 batches weight x divergence is" in warning


@pytest.mark.parametrize(("last", "said"), [(1e-3, 1), (3e-3, 0), (float("nan"), 0)])
def test_noise_that_grows_as_the_head_learns_is_judged_later(last, said, caplog):
    first_batches, settings = FirstBatches(), resolve_settings("relative", generates=False)
    for batch in range(1, 300):
        weighted = 4e-8 if batch <= 120 else last if batch <= 128 else 0.0
        first_batches.add(torch.tensor(2.0), torch.tensor(weighted), settings, "R3F")
    assert len(caplog.messages) == said
    assert all("after 128 batches weight x divergence is 1.0e-03" in message for message in caplog.messages)


@pytest.mark.parametrize(
    ("objective", "advice"),
    [
        (R3F(preset="relative", sigma=0.01), "sigma=0.5 or more"),
        (R3F(preset="relative", sigma=0.6, weight=1e-4), "sigma=1.2 or more, or a larger weight"),
        (RDrop(weight=1e-4), "Set more dropout in the model, or a larger weight"),
    ],
)
def test_what_to_set_depends_on_what_is_set(objective, advice, caplog):
    [warning] = warnings_of(objective, bert(), caplog, batches=128)
    assert advice in warning


def test_two_passes_that_stay_the_same_are_said_to_be(caplog):
    model = bert()
    for module in model.modules():
        module.training = module is model  # as where a backbone was put into eval mode by hand
    [warning] = warnings_of(RDrop(), model, caplog, batches=8)
    assert "the two passes are the same" in warning


def test_a_divergence_whose_weight_is_zero_or_large_and_evaluation_are_passed_over(caplog):
    for weight in (0.0, 1e12):  # nothing to feel, and enough to be felt
        assert not warnings_of(R3F(weight=weight), bert(), caplog, batches=8)
    with torch.no_grad():
        assert not warnings_of(R3F(), bert().eval(), caplog, batches=8)

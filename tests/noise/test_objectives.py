from __future__ import annotations

import pytest
import torch
from accelerate import Accelerator
from tiny_models import (
    bart,
    bart_classifier,
    bert,
    causal_batch,
    classification_batch,
    gemma2,
    generation_batch,
    gpt2,
    gradients_of,
    llama,
    mixtral,
    qwen2,
    roberta,
    run,
    t5,
)
from transformers import BertForMultipleChoice

from swaft.errors import NoiseError, StateError
from swaft.functional import cross_entropy_symmetric_kl
from swaft.noise import R3F, RDrop, TaskLoss, objectives, symmetric_kl
from swaft.noise.embedding import embedding_hook, find_site
from swaft.noise.generator import add_noise

pytestmark = pytest.mark.unit

MODELS = [
    (bert, classification_batch),
    (roberta, classification_batch),
    (bart_classifier, classification_batch),
    (bart, generation_batch),
    (t5, generation_batch),
]


def two_passes(model, batch, *, noise, detach_embedding: bool = False, shared: bool):
    """What an objective does, written out: a clean and a noised pass from the random state as it is."""
    state = torch.get_rng_state()
    clean = model(**batch)
    if shared:
        torch.set_rng_state(state)
    with embedding_hook(find_site(model), noise, detach=detach_embedding):
        noised = model(**batch)
    return clean, noised


def paper_noise(sigma: float, *, noise: str = "uniform"):
    return lambda clean: add_noise(clean, noise=noise, sigma=sigma, seed=0, rank=0, step=0)


def norm_wise(computed, exact) -> float:
    difference = sum(float((computed[name].double() - exact[name]).square().sum()) for name in exact)
    return (difference / sum(float(each.square().sum()) for each in exact.values())) ** 0.5


@pytest.mark.parametrize(("build", "batch"), MODELS)
def test_two_equal_passes_give_exactly_zero_divergence_and_the_plain_gradients(build, batch):
    model = build()
    for module in model.modules():
        module.training = module is model  # no dropout, though the model is in training mode
    out, gradients = run(R3F(masks="independent", sigma=0.0), model, batch())
    _, plain_gradients = run(TaskLoss(), build().eval(), batch())

    assert out.divergence == 0
    assert out.loss == out.task_loss
    assert out.noise_to_signal == out.changed == 0
    torch.testing.assert_close(gradients, plain_gradients)


def test_passes_that_only_dropout_makes_differ_are_refused_in_evaluation_mode():
    from peft import LoraConfig, get_peft_model

    model, batch = bert().eval(), classification_batch()
    adapted = get_peft_model(
        bert().eval(), LoraConfig(target_modules=["query"])
    )  # whose own flag says training
    for each in (model, adapted):
        with pytest.raises(
            NoiseError, match=r"evaluation mode, as from_pretrained returns it.*model\.train\(\)"
        ):
            RDrop()(each, batch)
    with torch.no_grad():
        assert RDrop()(model, batch).divergence == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("build", "batch"), [(t5, generation_batch), (bert, classification_batch)])
def test_both_passes_of_a_sixteen_bit_body_compute_in_the_same_types(build, batch, dtype):
    model, batch = build().to(dtype), batch()
    state = torch.get_rng_state()
    with torch.no_grad():
        _, noised = two_passes(model, batch, noise=torch.Tensor.float, shared=True)
        torch.set_rng_state(state)
        with embedding_hook(find_site(model)):
            widened = model(**batch)
    assert torch.equal(widened.logits, noised.logits)


@pytest.mark.parametrize(("build", "batch"), MODELS)
def test_shared_masks_leave_nothing_but_the_noise_between_the_passes(build, batch):
    small = R3F(sigma=1e-4)(build(), batch()).divergence
    dropout = R3F(sigma=1e-4, masks="independent")(build(), batch()).divergence
    assert 0 < small < dropout / 100


def test_r3f_is_the_task_loss_plus_the_weighted_mean_divergence_of_two_passes():
    model, batch = bert(), classification_batch()
    out, gradients = run(R3F(weight=0.5, sigma=0.01), model, batch)

    torch.manual_seed(7)
    clean, noised = two_passes(model, batch, noise=paper_noise(0.01), shared=True)
    expected = cross_entropy_symmetric_kl(clean.logits, noised.logits, batch["labels"], divergence_weight=0.5)
    model.zero_grad()
    (clean.loss + 0.5 * expected.divergence).backward()

    assert torch.equal(out.logits, clean.logits)
    torch.testing.assert_close(out.loss, expected.loss.detach())
    torch.testing.assert_close(out.divergence, expected.divergence.detach())
    torch.testing.assert_close(gradients, gradients_of(model))


def test_only_counted_target_tokens_enter_the_divergence():
    model, batch = t5(), generation_batch()
    out, _ = run(R3F(sigma=0.1), model, batch)
    torch.manual_seed(7)
    clean, noised = two_passes(model, batch, noise=paper_noise(0.1), shared=True)
    counted = batch["labels"] != -100
    expected = symmetric_kl(clean.logits[counted], noised.logits[counted]).mean()
    torch.testing.assert_close(out.divergence, expected.detach())


def test_fp32_training_agrees_with_float64():
    results = {}
    for dtype in (torch.float64, torch.float32):
        model = bert(dropout=0.0).to(dtype)
        results[dtype] = run(R3F(preset="relative", sigma=0.1), model, classification_batch())
    (exact, exact_gradients), (out, gradients) = results[torch.float64], results[torch.float32]

    assert out.loss.dtype == torch.float32
    assert abs(out.loss.double() - exact.loss) / exact.loss < 1e-6
    assert norm_wise(gradients, exact_gradients) < 1e-5


@pytest.mark.parametrize(("build", "batch"), [(bert, classification_batch), (t5, generation_batch)])
def test_the_error_of_the_divergence_at_the_papers_sigma_is_told(build, batch, capsys):
    exact, out = (
        R3F(sigma=1e-5)(build(dropout=0.0).to(dtype), batch()).divergence
        for dtype in (torch.float64, torch.float32)
    )
    error = float(abs(out.double() - exact) / exact)
    with capsys.disabled():
        print(f"\n{build.__name__}, sigma 1e-5: divergence {float(exact):.3e}, fp32 body's error {error:.1e}")
    assert error < 1


def test_rdrop_averages_both_task_losses_and_halves_the_divergence():
    model, batch = bert(), classification_batch()
    out, gradients = run(RDrop(weight=0.7), model, batch)

    torch.manual_seed(7)
    clean, noised = model(**batch), model(**batch)
    task_loss = (clean.loss + noised.loss) / 2
    divergence = symmetric_kl(clean.logits, noised.logits).mean() / 2
    model.zero_grad()
    (task_loss + 0.7 * divergence).backward()

    assert out.divergence > 0
    torch.testing.assert_close(out.task_loss, task_loss.detach())
    torch.testing.assert_close(out.divergence, divergence.detach())
    torch.testing.assert_close(out.loss, task_loss + 0.7 * divergence)
    torch.testing.assert_close(gradients, gradients_of(model))


@pytest.mark.parametrize(("preset", "expected"), [("rdrop", 0.5), ("rdrop_paper", 1.0)])
@pytest.mark.parametrize(("build", "batch"), [(bert, classification_batch), (t5, generation_batch)])
def test_rdrops_alpha_is_that_of_its_readme_or_of_its_equation_by_name(build, batch, preset, expected):
    model, batch, alpha = build().double(), batch(), 5.0
    out, gradients = run(RDrop(alpha, preset=preset), model, batch)

    torch.manual_seed(7)
    first, second = model(**batch), model(**batch)
    counted = batch["labels"] != -100
    divergence = symmetric_kl(first.logits[counted], second.logits[counted]).mean()
    task_loss = expected * (first.loss + second.loss)  # the mean of both, or equation 4's sum
    model.zero_grad()
    (task_loss + alpha / 2 * divergence).backward()

    torch.testing.assert_close(out.task_loss, task_loss.detach())
    torch.testing.assert_close(out.loss, out.task_loss + alpha * out.divergence)
    torch.testing.assert_close(gradients, gradients_of(model))


@pytest.mark.parametrize(
    ("objective", "build"),
    [
        *((RDrop(), build) for build in (llama, qwen2, gemma2, mixtral, t5, bart, bert)),
        (R3F(masks="independent", sigma=0.0), t5),
    ],
)
def test_a_model_without_dropout_is_refused_where_nothing_else_tells_two_passes_apart(objective, build):
    batch = classification_batch() if build is bert else generation_batch()
    off = "dropout|hidden_dropout_prob|dropout_rate"
    for call in (objective.prepare_model, lambda model: objective(model, batch)):
        with pytest.raises(NoiseError, match=rf"has no dropout \(.*({off})=0\.0.*swaft\.TaskLoss"):
            call(build(dropout=0.0))
    objective.prepare_model(build(dropout=0.1))
    R3F(sigma=0.1).prepare_model(build(dropout=0.0))


def test_dropout_of_adapters_alone_is_enough_though_the_first_passes_are_equal():
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], lora_dropout=0.5)
    model = get_peft_model(llama(dropout=0.0), config).train()  # type: ignore[arg-type]
    optimizer = torch.optim.SGD(model.parameters(), lr=10.0)
    objective, divergences = RDrop(), []
    objective.prepare_model(model)
    for _ in range(3):
        out = objective(model, causal_batch())
        out.loss.backward()
        optimizer.step()
        divergences.append(float(out.divergence))
    assert divergences[0] == 0 < divergences[2]


def test_the_fairseq_preset_divides_the_divergence_of_all_positions_by_sentences():
    model, batch = t5(), generation_batch()
    out, _ = run(R3F(preset="fairseq", sigma=0.1), model, batch)
    torch.manual_seed(7)
    clean, noised = two_passes(model, batch, noise=paper_noise(0.1, noise="normal"), shared=False)
    rows = symmetric_kl(clean.logits, noised.logits)
    assert rows.shape == (3, 6)
    torch.testing.assert_close(out.divergence, (rows.sum() / 3).detach())


def test_the_fairseq_preset_cuts_the_embedding_out_of_the_noised_pass_when_classifying():
    model, batch = bert(), classification_batch()
    out, gradients = run(R3F(preset="fairseq", sigma=0.1), model, batch)
    torch.manual_seed(7)
    clean, noised = two_passes(model, batch, noise=paper_noise(0.1), detach_embedding=True, shared=False)
    divergence = symmetric_kl(clean.logits, noised.logits).mean()
    model.zero_grad()
    (clean.loss + divergence).backward()

    torch.testing.assert_close(out.divergence, divergence.detach())
    torch.testing.assert_close(gradients, gradients_of(model))


@pytest.mark.parametrize("detach", ["clean", "noised", "target"])
def test_detach_gives_the_gradient_of_two_full_passes_with_that_side_constant(detach):
    model, batch = bert(), classification_batch()
    _, gradients = run(R3F(sigma=0.1, detach=detach), model, batch)
    torch.manual_seed(7)
    clean, noised = two_passes(model, batch, noise=paper_noise(0.1), shared=True)
    model.zero_grad()
    (clean.loss + symmetric_kl(clean.logits, noised.logits, detach=detach).mean()).backward()
    torch.testing.assert_close(gradients, gradients_of(model))


def test_a_relative_sigma_is_a_share_of_the_embeddings_root_mean_square():
    out = R3F(preset="relative", noise="normal", sigma=0.03)(bert(), classification_batch(rows=64))
    assert float(out.noise_to_signal) == pytest.approx(0.03, rel=0.03)
    assert float(out.changed) > 0.99


@pytest.mark.parametrize("passes", ["two", "doubled"])
def test_the_size_of_the_noise_is_that_of_real_tokens(passes):
    model, batch = bert(dropout=0.0), classification_batch(rows=64)
    batch["attention_mask"][1:, 3:] = 0
    real = batch["attention_mask"] == 1
    with torch.no_grad():
        model.bert.embeddings.word_embeddings.weight[1] = 1e4  # padding, in which the noise vanishes
        batch["input_ids"][~real] = 1
    out = R3F(preset="relative", noise="normal", sigma=0.3, passes=passes)(model, batch)
    assert float(out.noise_to_signal) == pytest.approx(0.3, rel=0.05)
    assert float(out.changed) > 0.99


def test_a_relative_sigma_leaves_out_the_padding_of_choices():
    texts, found = classification_batch(rows=8), []
    texts["attention_mask"][:, 3:], texts["input_ids"][:, 3:] = 0, 1
    batch = {name: texts[name].view(2, 4, 8) for name in ("input_ids", "attention_mask")}
    for size_of_padding in (0.0, 9.0):
        torch.manual_seed(0)
        model = BertForMultipleChoice(bert(dropout=0.0).config).train()
        torch.nn.init.constant_(model.bert.embeddings.word_embeddings.weight[1], size_of_padding)
        found.append(R3F(preset="relative")(model, {**batch, "labels": torch.tensor([0, 3])}).divergence)
    assert found[0] == found[1] > 0


def test_noise_is_set_by_seed_rank_and_step_and_comes_back_when_a_run_resumes(monkeypatch):
    batch = classification_batch()

    def divergences(objective, steps, *, train=True):
        model = bert(dropout=0.0).train(train)
        return [float(objective(model, batch).divergence) for _ in range(steps)]

    run_of_four = divergences(R3F(sigma=0.1, seed=3), 4)
    resumed = R3F(sigma=0.1, seed=3)
    resumed.step = 2
    assert len(set(run_of_four)) == 4
    assert divergences(R3F(sigma=0.1, seed=3), 4, train=False) == run_of_four
    assert divergences(resumed, 2) == run_of_four[2:]
    assert divergences(R3F(sigma=0.1, seed=4), 1) != run_of_four[:1]
    monkeypatch.setattr(objectives, "current_rank", lambda: 1)
    assert divergences(R3F(sigma=0.1, seed=3), 1) != run_of_four[:1]


def test_accelerate_carries_an_objectives_step_through_a_checkpoint(tmp_path):
    model, batch = bert(dropout=0.0), classification_batch()
    accelerator, trained, resumed = Accelerator(cpu=True), R3F(sigma=0.1, seed=3), R3F(sigma=0.1, seed=3)
    for objective, plain in ((trained, TaskLoss()), (resumed, TaskLoss())):
        accelerator._custom_objects = []
        accelerator.register_for_checkpointing(objective, plain)
        if objective is trained:
            for _ in range(3):
                trained(model, batch)
            accelerator.save_state(str(tmp_path / "state"))
            continuing = float(trained(model, batch).divergence)
    accelerator.load_state(str(tmp_path / "state"))
    assert resumed.step == 3
    assert float(resumed(model, batch).divergence) == continuing


@pytest.mark.parametrize("state", [{}, {"step": -1}, {"step": "3"}, {"step": 3, "seed": 0}])
def test_what_is_no_state_of_an_objective_is_refused(state):
    with pytest.raises(StateError, match=r"expected \{'step': n\}"):
        RDrop().load_state_dict(state)


def test_evaluation_works_and_does_not_move_the_noise_of_training():
    model, batch = bert(), classification_batch()
    objective = R3F(sigma=0.1)
    model.eval()
    with torch.no_grad():
        out = objective(model, batch)
    assert objective.step == 0
    assert out.divergence > 0
    assert not out.loss.requires_grad
    assert not model.training
    model.train()
    with torch.no_grad():
        objective(model, batch)
    assert objective.step == 0
    objective(model, batch)
    assert objective.step == 1


def test_an_output_is_detached_but_for_its_loss():
    out = R3F(sigma=0.1)(bert(), classification_batch())
    assert out.loss.requires_grad
    for name in ("task_loss", "divergence", "noise_to_signal", "changed", "num_items", "logits"):
        assert not getattr(out, name).requires_grad
        assert getattr(out, name).dim() == (2 if name == "logits" else 0)
    for objective in (R3F(sigma=0.1), TaskLoss(), TaskLoss(label_smoothing=0.1)):
        assert objective(t5(), generation_batch()).logits is None


def test_plain_fine_tuning_has_the_same_shape_and_no_divergence():
    model, batch = bert(dropout=0.0), classification_batch()
    objective = TaskLoss()
    objective.prepare_model(model)
    out = objective(model, batch)
    assert torch.equal(out.loss, model(**batch).loss)
    assert out.divergence == out.noise_to_signal == out.changed == 0


def test_a_log_gets_only_what_an_objective_measures():
    passes, noise = {"loss", "task_loss", "divergence"}, {"noise_to_signal", "changed"}
    measured = {
        TaskLoss(): {"loss"},
        TaskLoss(label_smoothing=0.1): {"loss"},
        RDrop(): passes,
        R3F(masks="independent", sigma=0.0): passes,
        R3F(): passes | noise,
    }
    for objective, names in measured.items():
        assert objective(bert(), classification_batch()).logged.keys() == names


def test_plain_fine_tuning_keeps_the_loss_of_regression():
    model, batch = bert(num_labels=1, dropout=0.0), classification_batch()
    batch["labels"] = torch.rand(4)
    out = TaskLoss()(model, batch)
    torch.testing.assert_close(out.task_loss, (out.logits.squeeze(1) - batch["labels"]).square().mean())


def test_a_causal_model_counts_as_generating():
    objective = R3F(preset="fairseq")
    objective.prepare_model(gpt2())
    assert objective.settings_for(gpt2()).noise == "normal"
    assert objective.settings_for(bert()).noise == "uniform"


def test_a_causal_models_rows_are_held_to_the_next_token():
    model, batch = gpt2(dropout=0.0), causal_batch()
    out = R3F(sigma=0.1, fused=False)(model, batch)
    clean, noised = two_passes(model, batch, noise=paper_noise(0.1), shared=True)
    counted = batch["labels"][:, 1:] != -100
    rows = symmetric_kl(clean.logits[:, :-1], noised.logits[:, :-1])
    torch.testing.assert_close(out.divergence, rows[counted].mean().detach())


def test_non_reentrant_checkpointing_gives_the_same_gradients():
    batch, plain, checkpointed = classification_batch(), bert(), bert()
    checkpointed.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    _, expected = run(R3F(sigma=0.1), plain, batch)
    _, gradients = run(R3F(sigma=0.1), checkpointed, batch)
    torch.testing.assert_close(gradients, expected, rtol=0, atol=0)

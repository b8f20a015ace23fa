from __future__ import annotations

import copy

import pytest
import tiny_models as tiny
import torch
import torch.nn.functional as F
from tiny_models import VOCABULARY, bert, causal_batch, classification_batch, generation_batch, run, t5
from transformers import AutoModelForSeq2SeqLM

from swaft.errors import NoiseError
from swaft.functional import linear_cross_entropy_symmetric_kl
from swaft.noise import R3F, RDrop
from swaft.noise.head import find_head

pytestmark = pytest.mark.unit

SEQ2SEQ = [
    tiny.t5,
    tiny.untied_t5,
    tiny.mt5,
    tiny.biased_bart,
    tiny.mbart,
    tiny.pegasus,
    tiny.marian,
    tiny.m2m100,
    tiny.t5_with_adapters,
    tiny.t5_with_a_frozen_head,
]
CAUSAL = [
    tiny.gpt2,
    tiny.llama,
    tiny.qwen2,
    tiny.gemma2,
    tiny.cohere,
    tiny.granite,
    tiny.opt,
    tiny.gemma3,
    tiny.mixtral,
]
MASKED = [tiny.masked_bert, tiny.masked_roberta]
MODELS = [
    *(pytest.param(build, generation_batch, id=build.__name__) for build in SEQ2SEQ),
    *(pytest.param(build, causal_batch, id=build.__name__) for build in (*CAUSAL, *MASKED)),
]
OBJECTIVES = {
    "r3f": lambda **options: R3F(sigma=0.1, **options),
    "one-sided": lambda **options: R3F(sigma=0.1, detach="noised", **options),
    "clean side constant": lambda **options: R3F(sigma=0.1, detach="clean", **options),
    "fairseq": lambda **options: R3F(sigma=0.1, preset="fairseq", **options),
    "rdrop": RDrop,
    "smoothed": lambda **options: R3F(sigma=0.1, label_smoothing=0.1, **options),
    "doubled": lambda **options: R3F(sigma=0.1, masks="independent", passes="doubled", **options),
    "doubled rdrop": lambda **options: RDrop(passes="doubled", **options),
}


BATCHES = {bert: classification_batch, tiny.gpt2: causal_batch, tiny.llama: causal_batch}


def assert_same_step(found, expected, *, tolerance: float = 1e-5) -> None:
    (out, gradients), (expected_out, expected_gradients) = found, expected
    for name in ("loss", "task_loss", "divergence", "noise_to_signal", "changed"):
        torch.testing.assert_close(getattr(out, name), getattr(expected_out, name), rtol=tolerance, atol=1e-7)
    assert gradients.keys() == expected_gradients.keys()
    whole = torch.cat([gradient.flatten() for gradient in expected_gradients.values()]).norm()
    for name, expected_gradient in expected_gradients.items():
        apart = (gradients[name] - expected_gradient).norm()
        assert apart <= tolerance * (expected_gradient.norm() + 1e-2 * whole), name


@pytest.mark.parametrize(("build", "batch"), MODELS)
def test_the_fused_loss_and_all_its_gradients_are_those_from_logits(build, batch):
    fused, slow = (run(R3F(sigma=0.1, fused=fused), build(), batch()) for fused in (True, False))
    assert_same_step(fused, slow)
    assert fused[0].logits is None
    assert slow[0].logits.shape[-1] == VOCABULARY


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize(
    ("build", "batch"), [(tiny.biased_bart, generation_batch), (tiny.gemma2, causal_batch)]
)
def test_every_kind_of_objective_is_the_same_fused_and_from_logits(build, batch, objective):
    fused, slow = (run(OBJECTIVES[objective](fused=fused), build(), batch()) for fused in (True, False))
    assert_same_step(fused, slow)
    assert float(fused[0].divergence) > 0


@pytest.mark.parametrize(
    ("objective", "form"),
    [(R3F(sigma=0.1), "difference"), (R3F(sigma=0.1, masks="independent"), "direct"), (RDrop(), "direct")],
)
def test_only_passes_with_the_same_masks_are_near_enough_to_multiply_their_difference(
    objective, form, monkeypatch
):
    taken = []

    def noting(*operands, **options):
        taken.append(options["form"])
        return linear_cross_entropy_symmetric_kl(*operands, **options)

    monkeypatch.setattr("swaft.noise.passes.linear_cross_entropy_symmetric_kl", noting)
    objective(tiny.gpt2(), causal_batch())
    assert {*taken} == {form}


@pytest.mark.parametrize(
    ("build", "batch"), [(t5, generation_batch), (tiny.m2m100, generation_batch), (tiny.gpt2, causal_batch)]
)
def test_the_loss_of_the_task_is_the_models_own(build, batch):
    model, batch = build(dropout=0.0), batch()
    torch.testing.assert_close(R3F(sigma=0.1)(model, batch).task_loss, model(**batch).loss.detach())


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize(("build", "batch"), [(t5, generation_batch), (tiny.llama, causal_batch)])
def test_label_smoothing_is_torchs_own(build, batch, fused):
    model, batch = build(dropout=0.0), batch()
    logits, labels = model(**batch).logits, batch["labels"]
    if batch["labels"].shape == batch["input_ids"].shape:
        logits, labels = logits[:, :-1], labels[:, 1:]
    expected = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), label_smoothing=0.2)
    out = R3F(sigma=0.1, label_smoothing=0.2, fused=fused)(model, batch)
    torch.testing.assert_close(out.task_loss, expected.detach())


@pytest.mark.parametrize(
    ("build", "batch"), [(bert, classification_batch), (t5, generation_batch), (tiny.gpt2, causal_batch)]
)
@pytest.mark.parametrize("fused", [True, False])
def test_one_doubled_pass_is_two_passes_where_nothing_drops(build, batch, fused):
    two, doubled = (
        run(R3F(sigma=0.1, passes=passes, fused=fused), build(dropout=0.0), batch())
        for passes in ("two", "doubled")
    )
    assert_same_step(doubled, two)


def test_decoder_inputs_of_the_batch_are_used():
    batch = generation_batch()
    shifted = t5().prepare_decoder_input_ids_from_labels(batch["labels"])
    expected = run(R3F(sigma=0.1), t5(), batch)
    assert_same_step(run(R3F(sigma=0.1), t5(), {**batch, "decoder_input_ids": shifted}), expected)
    other = run(R3F(sigma=0.1), t5(), {**batch, "decoder_input_ids": shifted.flip(0)})
    assert other[0].loss != expected[0].loss


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("build", "batch"), [(t5, generation_batch), (tiny.gemma2, causal_batch)])
def test_a_sixteen_bit_model_gets_gradients_near_those_of_its_logits(build, batch, dtype):
    fused, slow = (
        run(R3F(preset="relative", sigma=0.5, fused=fused), build(dropout=0.0).to(dtype), batch())
        for fused in (True, False)
    )
    assert_same_step(fused, slow, tolerance=0.1)
    assert all(gradient.dtype == dtype for gradient in fused[1].values())


def test_autocast_reaches_the_fused_loss_and_leaves_the_gradients_in_fp32():
    exact = run(R3F(preset="relative", sigma=0.5), t5(dropout=0.0), generation_batch())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = run(R3F(preset="relative", sigma=0.5), t5(dropout=0.0), generation_batch())
    assert found[0].loss.dtype == torch.float32
    assert found[0].loss != exact[0].loss
    assert_same_step(found, exact, tolerance=0.1)


@pytest.mark.parametrize("fused", [True, False])
def test_gradients_accumulate_over_steps_and_scale_with_the_loss(fused):
    model, objective = t5(dropout=0.0), R3F(sigma=0.1, fused=fused)
    _, once = run(objective, model, generation_batch())
    objective.step = 0
    model.zero_grad()
    for factor in (0.5, 3.0):
        (factor * objective(model, generation_batch()).loss).backward()
        objective.step = 0
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, 3.5 * once[name], rtol=1e-4, atol=1e-7)


def test_a_graph_that_is_kept_gives_the_same_gradients_twice():
    model = tiny.gemma2(dropout=0.0)
    loss = R3F(sigma=0.1)(model, causal_batch()).loss
    parameters = list(model.parameters())
    first = torch.autograd.grad(loss, parameters, retain_graph=True)
    second = torch.autograd.grad(loss, parameters, grad_outputs=torch.tensor(2.0))
    torch.testing.assert_close(second, tuple(2 * gradient for gradient in first))


def test_evaluation_gives_a_loss_without_gradient():
    model = t5().eval()
    with torch.no_grad():
        out = R3F(sigma=0.1)(model, generation_batch())
    assert not out.loss.requires_grad
    assert out.divergence > 0


def allocations(run) -> torch.Tensor:
    """Bytes of every allocation while ``run`` runs, in order, negative where they are given back."""
    cpu = torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[cpu], profile_memory=True) as profile:
        run()
    assert profile.profiler is not None
    events = profile.profiler.kineto_results.events()  # type: ignore[union-attr]
    return torch.tensor([event.nbytes() for event in events if event.name() == "[memory]"])


def widened(build, vocabulary: int):
    model = build(dropout=0.0)
    model.resize_token_embeddings(vocabulary, mean_resizing=False)
    return model


def short(batch, rows: int):
    """Many short rows, so that the proof's two are few among them."""
    return {name: value[:, :6] if value.dim() > 1 else value for name, value in batch(rows=rows).items()}


@pytest.mark.parametrize("options", [{}, {"detach": "noised"}, {"passes": "doubled"}])
@pytest.mark.parametrize(
    ("build", "batch"),
    [
        (t5, generation_batch),
        (tiny.bart, generation_batch),
        (tiny.gpt2, causal_batch),
        (tiny.masked_bert, causal_batch),
    ],
)
def test_no_tensor_as_large_as_the_logits_is_ever_made(build, batch, options, monkeypatch):
    monkeypatch.setattr("swaft.noise.loss.linear._CPU_CHUNK_BYTES", 2**20)
    model, batch = widened(build, 1024), short(batch, rows=400)
    logits = 4 * 1024 * batch["labels"].numel()

    def largest(*, fused: bool) -> int:
        objective = R3F(sigma=0.1, fused=fused, **options)
        return int(allocations(lambda: objective(model, batch).loss.backward()).max())

    # The first call's proof is among what is measured.
    assert largest(fused=True) < logits / 4
    assert largest(fused=False) >= logits


@pytest.mark.parametrize("build", [t5, tiny.biased_bart])
def test_a_step_peaks_below_what_the_logits_of_one_pass_would_take(build):
    model, batch = widened(build, 32768), short(generation_batch, rows=400)
    objective = R3F(sigma=0.1)
    changes = allocations(lambda: objective(model, batch).loss.backward())
    logits = 4 * 32768 * batch["labels"].numel()
    assert changes.cumsum(0).max() < logits


def trained_and_back(build, batch):
    model = build()
    before = {"names": list(model.state_dict()), "forward": find_head(model).linear.forward}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for objective in (R3F(sigma=0.1), RDrop()):
        objective(model, batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, before


@pytest.mark.parametrize("build", [t5, tiny.biased_bart])
def test_a_trained_model_is_named_saved_resized_and_used_like_any_other(build, tmp_path):
    batch = generation_batch()
    model, before = trained_and_back(build, batch)
    assert list(model.state_dict()) == before["names"]
    assert "forward" not in vars(model.lm_head)
    model.eval()
    model.save_pretrained(tmp_path)
    again = AutoModelForSeq2SeqLM.from_pretrained(tmp_path)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    tokens = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    assert torch.equal(tokens, again.generate(**inputs, max_new_tokens=4, do_sample=False))
    model.resize_token_embeddings(VOCABULARY + 4, mean_resizing=False)
    assert model(**batch).logits.shape[-1] == VOCABULARY + 4
    assert torch.isfinite(R3F(sigma=0.1)(model.train(), batch).loss)


@pytest.mark.parametrize("failing", ["encoder", "lm_head"])
def test_an_error_inside_a_pass_leaves_the_head_as_it_was(failing):
    model, objective, batch = t5(), R3F(sigma=0.1), generation_batch()
    objective(model, batch)

    def fail(*_args):
        raise RuntimeError("boom")

    handle = model.get_submodule(failing).register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="boom"):
        objective(model, batch)
    handle.remove()
    assert "forward" not in vars(model.lm_head)
    assert model(**batch).logits.shape == (3, 6, VOCABULARY)


def test_labels_that_do_not_fit_are_found_inside_the_head_which_stays_as_it_was():
    model, objective, batch = t5(), R3F(sigma=0.1), generation_batch()
    objective(model, batch)
    batch |= {"decoder_input_ids": torch.zeros(3, 6, dtype=torch.int64), "labels": batch["labels"][:, :-1]}
    with pytest.raises(NoiseError, match=r"Labels of shape \(3, 5\) do not fit the model's rows, \(3, 6\)"):
        objective(model, batch)
    assert "forward" not in vars(model.lm_head)


@pytest.mark.parametrize("in_place", [True, False])
def test_a_model_that_is_compiled_whole_is_refused_and_one_with_compiled_layers_trains(in_place):
    model, expected = t5(), run(R3F(sigma=0.1), t5(), generation_batch())
    model.decoder.block[0].compile(backend="eager")
    assert_same_step(run(R3F(sigma=0.1), model, generation_batch()), expected)
    whole = t5()
    if in_place:
        whole.compile(backend="eager")
    with pytest.raises(NoiseError, match=r"compiled whole.*head.*fused=False"):
        RDrop().prepare_model(whole if in_place else torch.compile(whole, backend="eager"))  # type: ignore[arg-type]


def test_a_copy_of_the_head_that_an_adapter_trains_is_the_one_used():
    fused, slow = (
        run(
            R3F(sigma=0.1, fused=fused),
            tiny.t5_with_adapters(modules_to_save=["lm_head"]),
            generation_batch(),
        )
        for fused in (True, False)
    )
    assert_same_step(fused, slow)
    assert any("modules_to_save" in name for name in fused[1])


def test_a_bias_of_the_head_itself_is_trained():
    def build():
        model = tiny.untied_t5()
        bias = torch.nn.Parameter(torch.linspace(-1, 1, VOCABULARY))
        model.lm_head.register_parameter("bias", bias)
        return model

    fused, slow = (run(R3F(sigma=0.1, fused=fused), build(), generation_batch()) for fused in (True, False))
    assert_same_step(fused, slow)
    assert fused[1]["lm_head.bias"].any()


@pytest.mark.parametrize("build", [t5, tiny.biased_bart])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_training_follows_the_same_curve_fused_and_from_logits(build, dtype):
    start = build(dropout=0.0).to(dtype)
    curves = {}
    for fused in (True, False):
        model, objective = copy.deepcopy(start), R3F(preset="relative", sigma=0.3, fused=fused)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        losses = []
        for step in range(25):
            out = objective(model, generation_batch(seed=step % 3))
            out.loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(out.task_loss.float())
        curves[fused] = torch.stack(losses)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(curves[True], curves[False], rtol=tolerance, atol=tolerance)
    assert curves[True][-3:].mean() < 0.9 * curves[True][:3].mean()


@pytest.mark.parametrize("build", [bert, t5, tiny.bart, tiny.gpt2, tiny.llama])
def test_a_doubled_pass_cannot_share_masks_that_it_draws_anew(build):
    objective, batch = R3F(sigma=0.1, passes="doubled"), BATCHES.get(build, generation_batch)()
    with pytest.raises(NoiseError, match=r"masks='shared': \S+ is 0\.1, .*masks='independent'"):
        objective.prepare_model(build())
    with pytest.raises(NoiseError, match=r"passes='doubled' with masks='shared'"):
        objective(build(), batch)
    assert objective(build().eval(), batch).divergence > 0
    objective.prepare_model(build(dropout=0.0))
    assert objective(build(dropout=0.0), batch).divergence > 0


def test_a_doubled_pass_is_one_pass():
    model, batch, seen = bert(dropout=0.0), classification_batch(), []
    objective = R3F(sigma=0.1, passes="doubled")
    objective(model, batch)
    model.register_forward_hook(lambda _module, _args, output: seen.append(output.logits.shape))
    assert objective(model, batch).logits.shape == (4, 3)
    assert seen == [(8, 3)]

"""Batches that scripts of one's own come with: packed texts, padding, labels of other types, logits left out."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from tiny_models import bert, causal_batch, classification_batch, generation_batch, gpt2, llama, t5
from transformers import BatchEncoding, GPT2LMHeadModel, XLNetConfig, XLNetLMHeadModel

from swaft.errors import NoiseError
from swaft.noise import R3F, RDrop, TaskLoss
from swaft.noise.embedding import root_mean_square
from swaft.noise.inputs import real_tokens
from swaft.noise.passes import random_state_kept

pytestmark = pytest.mark.unit


def packed_batch(**arguments):
    """Two texts of four tokens in a row, told apart by their positions alone."""
    ids = torch.randint(3, 40, (1, 8), generator=torch.Generator().manual_seed(3))
    positions = torch.arange(4).repeat(2).unsqueeze(0)
    return {"input_ids": ids, "position_ids": positions, "labels": ids.clone(), **arguments}


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("arguments", [{}, {"use_cache": True}, {"use_cache": False}], ids=str)
def test_packed_texts_have_one_task_loss_under_every_objective(arguments, fused):
    model, batch = llama(dropout=0.0), packed_batch(**arguments)
    plain = TaskLoss()(model, batch)
    r3f = R3F(sigma=1e-3, fused=fused)(model, batch)
    smoothed = TaskLoss(1e-9)(model, batch)
    assert r3f.task_loss.item() == pytest.approx(plain.task_loss.item(), rel=1e-6)
    assert smoothed.task_loss.item() == pytest.approx(plain.task_loss.item(), rel=1e-6)


def test_packed_texts_are_kept_apart_unless_a_cache_is_asked_for():
    model, batch = llama(dropout=0.0), packed_batch()
    apart = model(**batch, use_cache=False).loss.item()
    assert TaskLoss()(model, batch).task_loss.item() == pytest.approx(apart, rel=1e-6)
    given = packed_batch(use_cache=True)
    assert TaskLoss()(model, given).task_loss.item() == pytest.approx(model(**given).loss.item(), rel=1e-6)


@pytest.mark.parametrize(("build", "make"), [(bert, classification_batch), (t5, generation_batch)])
def test_the_noise_of_preset_relative_does_not_depend_on_padding(build, make):
    sizes = []

    class Seen(R3F):
        def _draw(self, embedding, *, sigma, **how):
            sizes.append(float(sigma))
            return super()._draw(embedding, sigma=sigma, **how)

    model, batch = build(dropout=0.0), make()
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    longer = {
        name: torch.nn.functional.pad(batch[name], (0, 20), value=0)
        for name in ("input_ids", "attention_mask")
    }
    trained_with = []
    for each in (batch, batch | longer):
        Seen(preset="relative", sigma=0.5)(model, each)
        trained_with.append(sizes[-1])  # those before are of the proof, which is made on some of the rows
    assert trained_with[1] == pytest.approx(trained_with[0], rel=1e-6)


def test_the_size_of_embeddings_is_that_of_real_tokens():
    embedded = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    taken = embedded[mask.bool()]
    real = real_tokens({"attention_mask": mask})
    torch.testing.assert_close(root_mean_square(embedded, real), taken.square().mean().sqrt())
    everything = torch.ones(2, 3, dtype=torch.bool)
    assert torch.equal(root_mean_square(embedded, everything), root_mean_square(embedded))
    assert torch.equal(
        root_mean_square(embedded, everything[:1]), root_mean_square(embedded)
    )  # another shape
    assert root_mean_square(embedded, torch.zeros_like(everything)) == 0


def test_the_choices_of_a_text_have_padding_of_their_own():
    mask = torch.tensor([[[1, 1, 0], [1, 0, 0]], [[1, 1, 1], [1, 1, 0]]])  # two texts of two choices
    assert torch.equal(real_tokens({"attention_mask": mask}), mask.view(4, 3).bool())
    assert real_tokens({"attention_mask": mask.unsqueeze(1)}) is None  # (B, heads, T, T)


@pytest.mark.parametrize("objective", [R3F(sigma=0.1), RDrop(), TaskLoss(0.1)])
@pytest.mark.parametrize(
    ("build", "batch", "found"),
    [
        (bert, classification_batch() | {"labels": torch.zeros(4, dtype=torch.int32)}, "torch.int32"),
        (bert, classification_batch() | {"labels": torch.zeros(4)}, "torch.float32"),
        (gpt2, causal_batch() | {"labels": causal_batch()["labels"].int()}, "torch.int32"),
    ],
    ids=["int32 classes", "floating classes", "int32 tokens"],
)
def test_labels_that_are_no_class_indices_are_refused_by_their_type(build, batch, found, objective):
    with pytest.raises(NoiseError, match=rf"labels are {found}; expected class indices, torch\.int64"):
        objective(build(), batch)


@pytest.mark.parametrize("kept", [1, torch.tensor([0, 2])], ids=["a number", "positions"])
def test_a_batch_that_asks_for_some_logits_alone_is_refused(kept):
    with pytest.raises(NoiseError, match=r"has logits_to_keep.*expected logits of every position"):
        R3F(sigma=0.1)(llama(), causal_batch() | {"logits_to_keep": kept})


def test_masks_are_shared_on_the_device_of_the_batch_where_parameters_are_offloaded(monkeypatch):
    restored = []

    class Generators:
        def get_rng_state(self, device):
            return f"state of {device}"

        def set_rng_state(self, state, device):
            restored.append((state, device))

    class OnDevice(torch.Tensor):
        device = torch.device("cuda:1")

    monkeypatch.setattr(torch, "get_device_module", lambda device: Generators())
    offloaded = torch.nn.Linear(2, 2)
    with random_state_kept(offloaded, {"input_ids": torch.zeros(2).as_subclass(OnDevice), "flag": True}):
        assert not restored
    assert restored == [("state of cuda:1", torch.device("cuda:1"))]


@pytest.mark.parametrize(
    "objective", [TaskLoss(), TaskLoss(0.1), R3F(sigma=0.1)], ids=["plain", "smoothed", "r3f"]
)
@pytest.mark.parametrize(("build", "make"), [(bert, classification_batch), (gpt2, causal_batch)])
def test_a_batch_in_which_no_label_counts_has_loss_zero_and_no_gradient(build, make, objective):
    model, batch = build(), make()
    batch["labels"] = torch.full_like(batch["labels"], -100)
    out = objective(model, batch)
    out.loss.backward()
    assert (out.loss.item(), out.num_items.item()) == (0.0, 0)
    assert not any(p.grad.any() for p in model.parameters() if p.grad is not None)


def test_a_model_that_does_not_shift_its_labels_counts_them_where_they_are():
    config = XLNetConfig(vocab_size=100, d_model=16, n_layer=1, n_head=2, d_inner=16)
    model, batch = XLNetLMHeadModel(config).eval(), causal_batch()
    out = TaskLoss()(model, batch)
    logits = model(**batch).logits
    counted = batch["labels"] != -100
    expected = torch.nn.functional.cross_entropy(logits[counted], batch["labels"][counted])
    assert out.num_items == counted.sum()
    torch.testing.assert_close(out.loss, expected)


class Own(Mapping):
    """A batch that is a mapping, and no dictionary."""

    def __init__(self, items):
        self._items = items

    def __getitem__(self, name):
        return self._items[name]

    def __iter__(self):
        return iter(self._items)

    def __len__(self):
        return len(self._items)


OBJECTIVES = [TaskLoss(), TaskLoss(0.1), R3F(sigma=0.1), RDrop(passes="doubled")]


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("kind", [BatchEncoding, Own])
@pytest.mark.parametrize(("build", "make"), [(bert, classification_batch), (gpt2, causal_batch)])
def test_any_mapping_is_a_batch(build, make, kind, objective):
    losses = []
    for batch in (make(), kind(make())):
        torch.manual_seed(1)
        objective.load_state_dict({"step": 0})
        losses.append(objective(build(), batch).loss)
    assert torch.equal(*losses)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_batch_that_is_no_mapping_is_refused(objective):
    with pytest.raises(
        NoiseError, match="batch is a tuple; expected the arguments of the model's forward by name"
    ):
        objective(bert(), tuple(classification_batch().values()))


class Contrastive(torch.nn.Linear):
    """Has a loss and no labels, as CLIP."""

    def forward(self, pixels, return_loss=True, temperature=None, task=None):
        return {"loss": super().forward(pixels).square().mean()}


@pytest.mark.parametrize(
    "first", [{"return_loss": True}, {"temperature": torch.ones(())}, {"task": "images"}]
)
def test_rows_without_labels_are_counted_by_what_has_rows(first):
    assert TaskLoss()(Contrastive(3, 2), first | {"pixels": torch.ones(5, 3)}).num_items == 5


class SeesImages(GPT2LMHeadModel):
    """Wants two images per text."""

    def forward(self, input_ids, images, **others):
        assert len(images) == 2 * len(input_ids)
        return super().forward(input_ids, **others)


def test_several_images_a_text_are_proved_whole_and_not_doubled():
    model, batch = gpt2(SeesImages), causal_batch()
    assert len(batch["labels"]) > 2
    batch["images"] = torch.ones(2 * len(batch["labels"]), 3)
    assert R3F(sigma=0.1)(model, batch).divergence > 0
    with pytest.raises(NoiseError, match=r"images has shape .* Set passes='two'"):
        RDrop(passes="doubled")(model, batch)

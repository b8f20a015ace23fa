"""Models that point at the first and last token of an answer train under every objective."""

from __future__ import annotations

import pytest
import tiny_models as tiny
import torch
from tiny_models import VOCABULARY, gradients_of, run
from torch.nn.functional import cross_entropy, log_softmax
from transformers import (
    BartForQuestionAnswering,
    BertForQuestionAnswering,
    DistilBertConfig,
    DistilBertForQuestionAnswering,
    RobertaForQuestionAnswering,
)

from swaft.errors import NoiseError
from swaft.noise import R3F, R4F, RDrop, TaskLoss
from swaft.noise.embedding import embedding_hook, find_site
from swaft.noise.generator import add_noise
from swaft.noise.spectral import normalised_layers

pytestmark = pytest.mark.unit

LENGTH = 8


def bert(dropout: float = 0.1, kind: type = BertForQuestionAnswering):
    return tiny.bert(kind, dropout=dropout, num_labels=2)


def roberta():
    return tiny.roberta(RobertaForQuestionAnswering, num_labels=2)


def distilbert():
    torch.manual_seed(0)
    body = {"dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 32}
    return DistilBertForQuestionAnswering(DistilBertConfig(vocab_size=VOCABULARY, **body)).train()


def bart():
    return tiny.bart(BartForQuestionAnswering)


MODELS = [bert, roberta, distilbert, bart]


def batch(*, starts=(3, 1, 0), ends=(4, 1, 0)) -> dict[str, torch.Tensor]:
    """Three windows, the second padded, the third without an answer."""
    ids = torch.randint(4, VOCABULARY, (3, LENGTH), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    ids[1, 5:], mask[1, 5:] = 1, 0
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "start_positions": torch.tensor(starts),
        "end_positions": torch.tensor(ends),
    }


def inputs_of(rows):
    return {name: value for name, value in rows.items() if "positions" not in name}


def divergences(first, second):
    """J of each text by its definition, the mean over first and last tokens."""
    total = 0.0
    for name in ("start_logits", "end_logits"):
        p, q = log_softmax(first[name], -1), log_softmax(second[name], -1)
        total = total + ((p.exp() - q.exp()) * (p - q)).sum(-1)
    return total / 2


@pytest.mark.parametrize("build", MODELS)
def test_a_weight_of_zero_trains_the_models_own_loss(build):
    out, gradients = run(R3F(weight=0.0, sigma=0.1), build(), batch())
    plain, expected = run(TaskLoss(), build(), batch())
    assert out.divergence > 0
    torch.testing.assert_close(out.loss, plain.loss)
    torch.testing.assert_close(gradients, expected)
    assert out.logits.shape == plain.logits.shape == (3, 2, LENGTH)
    assert torch.equal(out.logits, plain.logits)


def test_the_divergence_is_that_of_both_distributions_padding_included():
    model, rows = bert(dropout=0.0).double(), batch()
    out, gradients = run(R3F(weight=0.7, sigma=0.1), model, rows)

    def noise(clean):
        return add_noise(clean, noise="uniform", sigma=0.1, seed=0, rank=0, step=0)

    model.zero_grad()
    clean = model(**inputs_of(rows))
    with embedding_hook(find_site(model), noise):
        noised = model(**inputs_of(rows))
    starts = cross_entropy(clean.start_logits, rows["start_positions"])
    ends = cross_entropy(clean.end_logits, rows["end_positions"])
    divergence = divergences(clean, noised).mean()
    loss = (starts + ends) / 2 + 0.7 * divergence
    loss.backward()

    assert out.loss.dtype == torch.float64
    assert abs(out.loss - loss) < 1e-14
    assert abs(out.divergence - divergence) < 1e-14 < divergence
    torch.testing.assert_close(gradients, gradients_of(model), rtol=1e-11, atol=1e-15)


def test_rdrop_averages_the_loss_of_both_passes():
    model, rows = bert(), batch()
    out, gradients = run(RDrop(weight=0.7), model, rows)
    torch.manual_seed(7)
    first, second = model(**rows), model(**rows)
    model.zero_grad()
    loss = (first.loss + second.loss) / 2 + 0.7 * divergences(first, second).mean() / 2
    loss.backward()
    torch.testing.assert_close(out.loss, loss.detach())
    torch.testing.assert_close(gradients, gradients_of(model))


def test_the_fairseq_preset_counts_two_rows_a_text():
    model, rows = bert(), batch()
    out, _ = run(R3F(preset="fairseq", sigma=0.1), model, rows)
    mean, _ = run(R3F(preset="fairseq", sigma=0.1, reduction="mean"), model, rows)
    torch.testing.assert_close(out.divergence, 2 * mean.divergence)


def test_one_doubled_pass_gives_the_loss_of_two():
    found = [run(R3F(sigma=0.1, passes=passes), bert(dropout=0.0), batch()) for passes in ("two", "doubled")]
    torch.testing.assert_close(found[0][0].loss, found[1][0].loss)
    torch.testing.assert_close(found[0][1], found[1][1])


@pytest.mark.parametrize("starts", [(3, LENGTH, 0), (3, 1, 0), (LENGTH, LENGTH, 0), (3, -1, 0)])
def test_positions_past_the_text_do_not_count_as_in_the_models_own_loss(starts):
    rows = batch(starts=starts, ends=(4, LENGTH + 2, 0))
    out, gradients = run(R3F(weight=0.0, sigma=0.1), bert(), rows)
    plain, expected = run(TaskLoss(), bert(), rows)
    torch.testing.assert_close(out.loss, plain.loss)
    torch.testing.assert_close(gradients, expected)
    assert out.divergence != run(R3F(sigma=0.1), bert(), batch())[0].divergence


def test_a_batch_in_which_only_last_tokens_count_has_their_mean():
    model = bert(dropout=0.0)
    out, _ = run(R3F(sigma=0.1), model, batch(starts=(LENGTH,) * 3))
    expected = cross_entropy(model(**inputs_of(batch())).end_logits, batch()["end_positions"])
    torch.testing.assert_close(out.task_loss, expected.detach())
    assert 0 < out.divergence < torch.inf


def test_a_smoothed_batch_in_which_no_position_counts_has_loss_zero_and_no_gradient():
    out, gradients = run(TaskLoss(0.1), bert(), batch(starts=(LENGTH,) * 3, ends=(LENGTH,) * 3))
    assert out.loss == 0
    assert not any(gradient.any() for gradient in gradients.values())


def test_r4f_normalises_the_layer_that_points():
    model, objective = bert(dropout=0.0), R4F(sigma=0.1)
    objective.prepare_model(model)
    assert normalised_layers(model) == ["qa_outputs"]
    out, gradients = run(objective, model, batch())
    assert torch.linalg.matrix_norm(model.qa_outputs.weight, ord=2).item() == pytest.approx(1, rel=1e-3)
    assert out.loss.isfinite()
    assert len(gradients) == len(list(model.parameters()))


@pytest.mark.parametrize("ends", [(4, 1, 0), (4, LENGTH, 0)])
def test_smoothed_labels_are_spread_over_the_tokens_of_the_text(ends):
    model, rows = bert(dropout=0.0), batch(ends=ends)
    out = TaskLoss(0.2)(model, rows)
    clean = model(**rows)
    counted = {"start": slice(None), "end": rows["end_positions"] < LENGTH}
    spread = -sum(log_softmax(clean[f"{end}_logits"][at], -1).mean() for end, at in counted.items()) / 2
    torch.testing.assert_close(out.loss, 0.8 * clean.loss + 0.2 * spread)


class Weighted(BertForQuestionAnswering):
    """Counts the last token for more than the first."""

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        if output.loss is not None:
            output.loss = output.loss + cross_entropy(output.end_logits, kwargs["end_positions"])
        return output


def test_a_model_that_trains_another_loss_is_refused():
    with pytest.raises(NoiseError, match=r"own loss is another one.*swaft\.TaskLoss"):
        R3F(sigma=0.1)(bert(kind=Weighted), batch())


@pytest.mark.parametrize("missing", ["start_positions", "end_positions"])
def test_a_batch_with_half_an_answer_is_refused(missing):
    rows = batch()
    del rows[missing]
    with pytest.raises(
        NoiseError, match="or positions of answers under 'start_positions' and 'end_positions'"
    ):
        R3F(sigma=0.1)(bert(), rows)

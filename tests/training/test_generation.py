from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from torch.utils.data import DataLoader

from swaft.errors import TrainingError
from swaft.training.data.seq2seq import (
    Seq2SeqConfig,
    Seq2SeqDataConfig,
    Seq2SeqEvalConfig,
    Seq2SeqModelConfig,
    Seq2SeqTrainConfig,
    tokenize_pairs,
)
from swaft.training.data.texts import Collator
from swaft.training.evaluation import generation
from swaft.training.evaluation.evaluate import Evaluation, write_samples
from swaft.training.evaluation.generation import (
    evaluate_texts,
    generation_arguments,
    get_generation_metric,
)
from swaft.training.models.text_generation import (
    encoder_decoder_config,
    load_text_model,
    new_tokenizer,
)
from swaft.training.run.folder import RunFolder

pytestmark = pytest.mark.unit

TARGETS = ["a", "a b c d e f", "a b", "b c d e", "f"]
PAIRS = Dataset.from_dict(
    {
        "source": ["one", "two", "three", "four", "five"],
        "target": TARGETS,
        "references": [[t] for t in TARGETS],
    }
)


@pytest.fixture
def evaluated(make_accelerator):
    """Evaluate a small random model with some batch size, and give what it needs."""
    accelerator = make_accelerator()
    section = Seq2SeqModelConfig(
        config={"model_type": "t5", "d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2},
        vocab_size=300,
    )
    tokenizer = new_tokenizer(section, accelerator, lambda: TARGETS)
    config = encoder_decoder_config(section)
    settings = Seq2SeqConfig(model=section, train=Seq2SeqTrainConfig(output_dir="unused", seed=0))
    model = load_text_model(settings, config, tokenizer)
    rows = tokenize_pairs(PAIRS, tokenizer, Seq2SeqDataConfig(max_source_length=16, max_target_length=16))

    def evaluate(batch_size: int, *, generates: bool = True, references=PAIRS["references"]) -> Evaluation:
        loader = accelerator.prepare_data_loader(
            DataLoader(
                rows,  # type: ignore[arg-type]
                batch_size=batch_size,
                collate_fn=Collator(tokenizer),
                generator=torch.Generator(),
            )
        )
        return evaluate_texts(
            model,
            loader,
            accelerator,
            references=references,
            tokenizer=tokenizer,
            metric=get_generation_metric("chrf") if generates else None,
            generation={"max_new_tokens": 4, "num_beams": 2},
        )

    return SimpleNamespace(evaluate=evaluate, model=model, rows=rows)


def test_the_loss_is_the_mean_over_tokens_whatever_the_batch_size(evaluated):
    model = evaluated.model.eval()
    losses, counts = [], []
    with torch.no_grad():
        for row in evaluated.rows:
            ids, labels = torch.tensor([row["input_ids"]]), torch.tensor([row["labels"]])
            losses.append(model(input_ids=ids, labels=labels).loss.item())
            counts.append(labels.numel())
    expected = sum(loss * count for loss, count in zip(losses, counts, strict=True)) / sum(counts)
    assert max(counts) > 2 * min(counts)
    for batch_size in (1, 2, 5):
        found = evaluated.evaluate(batch_size, generates=False)
        assert found.scores == {"loss": pytest.approx(expected, rel=1e-6)}
        assert found.outputs == ()


def test_what_the_checkpoint_says_of_generation_is_among_the_details(evaluated):
    evaluated.model.generation_config.update(min_length=2, num_beams=5)
    found = json.loads(json.dumps(evaluated.evaluate(2).details["generation"]))
    assert found.items() >= {"min_length": 2, "max_new_tokens": 4, "num_beams": 2}.items()


def test_texts_are_those_of_generate_in_the_order_of_the_rows(evaluated):
    found = evaluated.evaluate(2)
    assert list(found.outputs) == list(evaluated.evaluate(5).outputs)
    assert len(found.outputs) == len(PAIRS)
    assert set(found.scores) == {"chrf", "loss", "gen_len"}
    assert found.scores["gen_len"] <= 4
    assert "chrf" in found.details["signatures"]


def test_the_length_of_texts_counts_no_padding(evaluated, monkeypatch):
    def texts(model, batch, accelerator, settings):
        lengths = batch["idx"] % 3 + 1  # 1, 2, 3, 1, 2
        return torch.where(torch.arange(3) < lengths[:, None], 7, settings["pad_token_id"])

    monkeypatch.setattr(generation, "generate_tokens", texts)
    assert evaluated.evaluate(2).scores["gen_len"] == pytest.approx(9 / 5)


def test_nothing_is_drawn_for_a_text_and_the_decoders_start_token_is_no_part_of_it(make_accelerator):
    network, asked = torch.nn.Linear(1, 1), {}
    network.generate = lambda **given: asked.update(given) or torch.tensor([[9, 5, 1]])
    batch = {"input_ids": "ids", "labels": "labels", "idx": "rows"}
    tokens = generation.generate_tokens(network, batch, make_accelerator(), {"max_new_tokens": 2})
    assert tokens.tolist() == [[5, 1]]
    assert asked == {"input_ids": "ids", "do_sample": False, "use_cache": True, "max_new_tokens": 2}


def test_evaluation_leaves_the_mode_and_the_random_state_it_found(evaluated):
    evaluated.model.train()
    before = torch.get_rng_state()
    assert evaluated.evaluate(2).scores == evaluated.evaluate(2).scores
    assert evaluated.model.training
    assert torch.equal(torch.get_rng_state(), before)


def test_a_missing_row_is_an_error(evaluated):
    with pytest.raises(TrainingError, match="5 different rows of 6"):
        evaluated.evaluate(2, references=[["a"]] * 6)


def test_a_loss_that_is_not_finite_is_an_error(evaluated):
    evaluated.model.shared.weight.data[:] = float("nan")
    with pytest.raises(TrainingError, match="evaluation loss is nan"):
        evaluated.evaluate(2, generates=False)


def test_what_the_settings_leave_open_the_model_decides():
    data = Seq2SeqDataConfig(max_target_length=50)
    assert generation_arguments(Seq2SeqEvalConfig(), data) == {"max_new_tokens": 50}
    settings = Seq2SeqEvalConfig(max_new_tokens=7, num_beams=3)
    assert generation_arguments(settings, data) == {"max_new_tokens": 7, "num_beams": 3}


def test_samples_show_what_both_weights_wrote(tmp_path):
    generated = {
        kind: Evaluation(scores={}, outputs=[f"{kind} {row}" for row in range(5)])
        for kind in ("last", "averaged")
    }
    evaluations = {"validation": generated, "test": {"last": Evaluation(scores={})}}
    pairs = {"validation": PAIRS, "test": PAIRS}
    write_samples(RunFolder(tmp_path, is_main=True), evaluations, pairs, 2)
    lines = [json.loads(line) for line in (tmp_path / "samples-validation.jsonl").read_text().splitlines()]
    assert [(line["last"], line["averaged"]) for line in lines] == [
        ("last 0", "averaged 0"),
        ("last 1", "averaged 1"),
    ]
    assert (lines[1]["source"], lines[1]["references"]) == ("two", ["a b c d e f"])
    assert not (tmp_path / "samples-test.jsonl").exists()

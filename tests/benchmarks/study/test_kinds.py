"""Question answering and text generation in the study: labels, predictions and scores, on a few rows."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from benchmarks.study import answers, fitting, pack, tasks, texts
from benchmarks.study import model as encoder
from benchmarks.study.cell import parse_cell, run_cell
from benchmarks.study.rows import Rows

pytestmark = pytest.mark.unit

TEXT = "The quick brown fox jumps over the lazy dog near the old river bank."
WORDS = TEXT[:-1].split()


@pytest.fixture
def general_tasks(tmp_path, monkeypatch):
    """The tasks `squad` and `e2e-...` with 8 rows a split, small encoders, and a budget of a few steps."""
    import pyarrow as pa
    import pyarrow.parquet as parquet

    for split in ("train", "validation", "test"):
        spans = [(TEXT.index(word), word) for word in WORDS[1:9]]
        questions = {
            "question": [f"Which word is number {number}?" for number in range(8)],
            "context": [TEXT] * 8,
            "answers": [{"text": [word], "answer_start": [start]} for start, word in spans],
        }
        pairs = {
            "meaning_representation": [f"name[{word}]" for word in WORDS[:4]] * 2,
            "human_reference": [f"It is called {word}." for word in WORDS[:4]]
            + [f"{word} is its name." for word in WORDS[:4]],
        }
        for name, columns in (("squad", questions), ("e2e", pairs)):
            (tmp_path / name).mkdir(exist_ok=True)
            parquet.write_table(pa.table(columns), tmp_path / name / f"{split}.parquet")
    monkeypatch.setenv("SWAFT_DATA", str(tmp_path))
    monkeypatch.setitem(fitting.REGIMES, "main", fitting.Regime(rows=8, epochs=1, batch=4))
    monkeypatch.setattr(encoder, "from_pack", _small)
    monkeypatch.setattr(texts, "MAX_LENGTH", 12)
    _forget()
    yield tmp_path
    _forget()


def _small(kind, seed, device, **options):
    from transformers import BertConfig

    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=30522, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        num_labels=2,
    )  # fmt: skip
    return kind.from_config(config).to(device)


def _forget():
    tasks.read.cache_clear()
    tasks.vocabulary.cache_clear()


def test_labels_of_a_question_are_the_tokens_of_its_answer(general_tasks):
    rows = tasks.read("squad", "train")
    assert len(rows) == 8
    for row, (start, last) in enumerate(rows.labels.tolist()):
        begin, end = rows.offsets[row][start][0], rows.offsets[row][last][1]
        assert rows.texts[row][begin:end] == rows.answers[row][0]
    batch = rows.batch(np.arange(2))
    assert torch.equal(batch["start_positions"], rows.labels[:2, 0])


def test_an_answer_beyond_the_length_is_left_out(general_tasks, monkeypatch):
    monkeypatch.setattr(answers, "MAX_LENGTH", 14)
    tasks.read.cache_clear()
    assert 0 < len(tasks.read("squad", "train")) < 8


def test_the_best_answer_is_that_of_the_highest_sum_among_spans_of_the_text(general_tasks):
    rows, generator = tasks.read("squad", "train"), torch.Generator().manual_seed(0)
    ends = torch.randn(2, len(rows.ids[0]) + 3, generator=generator)
    spans = rows.offsets[0]
    best = max(
        (float(ends[0, i] + ends[1, j]), TEXT[spans[i][0] : spans[j][1]])
        for i in range(len(spans))
        for j in range(i, len(spans))
        if spans[i][1] and spans[j][1]
    )
    assert answers.best_answer(rows, 0, ends) == best[1]


@pytest.mark.parametrize("task", ["squad", "e2e-new", "e2e-encoder"])
def test_the_loss_of_a_prediction_is_the_models_own_without_padding(general_tasks, task):
    splits = tasks.load(task, rows=8, seed=0)
    model = tasks.new_model(tasks.TASKS[task], splits, 0, torch.device("cpu")).eval()
    rows = splits.test
    found = tasks.predict(tasks.TASKS[task], model, rows).outcomes()
    with torch.no_grad():
        batches = [rows.batch(np.array([row])) for row in range(len(rows))]
        losses = torch.stack([model(**batch).loss for batch in batches])
    weights = torch.tensor([1 if task == "squad" else len(row) for row in getattr(rows, "targets", rows.ids)])
    assert found["nll"] == pytest.approx(float((losses * weights).sum() / weights.sum()), rel=1e-5)
    assert 0 <= found[tasks.TASKS[task].score] <= 1


def test_rows_to_be_generated_have_all_references_of_their_source(general_tasks):
    train, test = tasks.read("e2e-new", "train"), tasks.read("e2e-new", "test")
    assert (len(train), len(test)) == (8, 4)
    assert test.references[0] == ("It is called The.", "The is its name.")
    vocabulary = tasks.vocabulary("e2e-new")
    assert vocabulary.decode(test.targets[0][:-1]) == test.references[0][0]
    assert test.targets[0][-1] == texts.END


def test_sources_of_the_encoder_are_cut_and_unpadded_whatever_was_read_before(general_tasks, monkeypatch):
    tasks._tokenizer.cache_clear()  # as in a new process, the tokenizer pads as its file says
    first = tasks.read("e2e-encoder", "test").ids
    tasks.read("squad", "test")
    tasks.read.cache_clear()
    assert tasks.read("e2e-encoder", "test").ids == first
    assert {len(row) for row in first} == {6}  # name [ word ] between the special tokens
    monkeypatch.setattr(texts, "MAX_LENGTH", 4)
    tasks.read.cache_clear()
    cut = tasks.read("e2e-encoder", "test").ids
    assert cut == tuple((*row[:3], row[-1]) for row in first)


def test_every_part_of_a_generating_model_has_the_attention_of_its_device(general_tasks, monkeypatch):
    monkeypatch.setattr(encoder, "attention_on", {"cpu": "eager"}.get)
    new, around = (texts.new_model(0, torch.device("cpu"), pretrained=each) for each in (False, True))
    assert new.config._attn_implementation == around.decoder.config._attn_implementation == "eager"


@pytest.mark.parametrize("task", ["e2e-new", "e2e-encoder"])
def test_a_model_generates_from_the_logits_it_was_trained_on(general_tasks, task):
    splits = tasks.load(task, rows=8, seed=0)
    model = tasks.new_model(tasks.TASKS[task], splits, 0, torch.device("cpu")).eval()
    batch = splits.test.batch(np.array([0]))
    labels = batch.pop("labels")
    with torch.no_grad():
        trained = model(**batch, labels=labels).logits[:, 0]
        found = model.generate(**batch, max_new_tokens=1, output_logits=True, return_dict_in_generate=True)
    assert torch.allclose(found.logits[0], trained, atol=1e-5)


def test_bleu_of_the_right_texts_is_one(general_tasks):
    rows, vocabulary = tasks.read("e2e-new", "test"), tasks.vocabulary("e2e-new")

    class Knowing(torch.nn.Linear):
        def generate(self, input_ids, **_):
            found = [rows.ids.index(tuple(row[row != 0].tolist())) for row in input_ids]
            return texts.padded([rows.targets[place] for place in found])

    assert texts.bleu(Knowing(1, 1), rows, vocabulary) == pytest.approx(1)


@pytest.mark.parametrize(
    "cell", ["squad/r3f-relative-1.0-decayed", "e2e-encoder/rdrop-constant", "e2e-new/decayed"]
)
def test_cells_of_other_kinds_have_their_readouts_and_score(general_tasks, cell):
    task = tasks.TASKS[cell.split("/")[0]]
    rows = run_cell(parse_cell(f"{cell}/main/0.0002/1/test"))
    named = {row["readout"]: row for row in rows}
    assert task.score in named["last"]["outcomes"]
    assert task.score in named["chosen"]["outcomes"]
    assert ("nll_scaled" in named["last"]["outcomes"]) is (task.kind == "answers")
    assert named["last"]["rounded"].keys() == {"bf16", "int8", "int4"}
    assert len({row["outcomes"]["nll"] for row in rows if row["readout"] != "chosen"}) >= 3


@pytest.mark.parametrize("task", ["squad", "e2e-new"])
def test_a_pack_holds_rows_of_every_kind(general_tasks, monkeypatch, task):
    source = general_tasks / "encoder"
    from transformers import AutoModel

    _small(AutoModel, 0, torch.device("cpu")).save_pretrained(source)
    monkeypatch.setattr(tasks, "TASKS", {task: tasks.TASKS[task]})
    before = tasks.read(task, "test")
    monkeypatch.setattr(pack, "model_folder", lambda: str(source))
    pack.write(general_tasks / "pack")
    monkeypatch.setenv("SWAFT_STUDY_PACK", str(general_tasks / "pack"))
    _forget()
    after = tasks.read(task, "test")
    assert isinstance(after, Rows)
    assert torch.equal(after.labels, before.labels)
    assert vars(after) | {"labels": 0} == vars(before) | {"labels": 0}

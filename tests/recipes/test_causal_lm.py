from __future__ import annotations

import json
from pathlib import Path

import pytest
from launching import ROOT, launch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoTokenizer

from swaft.cli.main import main
from swaft.training.checks import Problems, read_recipe
from swaft.training.config import load_config
from swaft.training.data.causal_lm import CausalConfig
from swaft.training.models.pretrained import demo_model_path

SMOKE = ["recipes/causal_lm.py", "--config", "recipes/configs/causal_lm/smoke.yaml"]
SHORT = [
    "train.max_steps=4",
    "data.max_train_samples=64",
    "data.max_eval_samples=16",
    "data.max_predict_samples=8",
]


@pytest.mark.unit
@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.packing=true", "set train.max_steps"),
        ("model.config={model_type: t5}", "not a decoder that continues a text"),
        ("model.config={model_type: bert}", "not a decoder that continues a text"),
        (
            "model.config={model_type: gpt2, n_embd: 32, n_layer: 1, n_head: 2, n_positions: 64}",
            "data.max_length is 256, but the model reads at most 64 tokens",
        ),
        ("data.answer_column=none", "no column 'none'"),
        ("eval.metric=f1", "eval.metric"),
    ],
)
def test_validate_knows_what_a_launch_refuses(override, message, capsys, tmp_path):
    assert main(["validate", *SMOKE, f"train.output_dir={tmp_path}/x", override]) == 1
    assert message in capsys.readouterr().out


@pytest.mark.unit
def test_a_decoder_reads_more_than_the_models_that_its_tokenizer_was_made_for(capsys, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(demo_model_path())
    assert tokenizer.model_max_length == 512
    tokenizer.save_pretrained(tmp_path)
    longer = [f"model.tokenizer_name={tmp_path}", "model.vocab_size=null", "data.max_length=1024"]
    main(["validate", "--num_processes=1", *SMOKE, f"train.output_dir={tmp_path}/x", *longer])
    assert "problem    none" in capsys.readouterr().out


@pytest.mark.unit
def test_a_score_other_than_the_loss_may_decide(tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"prompt": "a cat", "completion": "sleeps"}) + "\n")
    given = [f"data.{split}_file={rows}" for split in ("train", "validation")]
    given += ["data.prompt_column=prompt", "data.answer_column=completion", "eval.keep_best=last"]
    given += ["eval.eval_steps=2", "eval.metric_for_best_model=token_accuracy"]
    problems = Problems()
    ready = read_recipe(ROOT / "recipes/causal_lm.py").prepare(
        load_config(CausalConfig, [*SMOKE[1:], *given]), problems
    )
    assert (problems.found, ready.target.chosen, ready.target.better) == ([], "token_accuracy", max)


@pytest.mark.unit
def test_the_recipe_is_planned(capsys, tmp_path):
    assert main(["plan", "--on_cpu", "--num_processes", "1", *SMOKE, f"train.output_dir={tmp_path}/x"]) == 0
    assert "activations" in capsys.readouterr().out


@pytest.mark.recipe
def test_packed_rows_train_on_two_ranks_under_zero2_with_noise_and_averaging(tmp_path):
    run = tmp_path / "run"
    done = launch(
        "zero2_cpu.yaml",
        *SMOKE,
        *SHORT,
        "data.packing=true",
        "track.report_to=tensorboard",
        f"train.output_dir={run}",
    )
    assert done.code == 0, done.err[-3000:]
    scores = json.loads((run / "summary.json").read_text())["scores"]["test"]
    assert set(scores["averaged"]) == {"loss", "perplexity", "token_accuracy"}
    for kind in ("final", "final-averaged"):
        assert (Path(run) / kind / "model.safetensors").is_file()
    samples = [json.loads(line) for line in (run / "samples-test.jsonl").read_text().splitlines()]
    assert len(samples) == 8
    assert all(row.keys() == {"prompt", "answer", "last", "averaged"} for row in samples)
    assert all(row["prompt"].endswith("->") and row["answer"] for row in samples)
    events = EventAccumulator(str(next(run.rglob("events.out.tfevents*")).parent)).Reload()
    logged = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [record["loss"] for record in logged if record["kind"] == "train"]
    tag = next(tag for tag in events.Tags()["scalars"] if tag.endswith("train/loss"))
    assert [event.value for event in events.Scalars(tag)] == pytest.approx(losses)

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_inputs import save_model, save_rows
from tiny_questions import save_questions, save_reader
from tiny_texts import NEW_MODEL, save_pairs

NEW_DECODER = "{model_type: gpt2, n_embd: 16, n_layer: 1, n_head: 2, n_positions: 64}"


@pytest.fixture(autouse=True)
def at_the_root(launched_by_nothing) -> None:
    """Commands are called there, and make the environment of a launch themselves."""


@pytest.fixture(scope="session")
def configs(tmp_path_factory) -> dict[str, Path]:
    """A configuration for every recipe, that names data and a model of a folder."""
    folder = tmp_path_factory.mktemp("preflight")
    save_model(folder / "encoder")
    save_reader(folder / "reader")
    for split, count, seed in (("train", 70, 1), ("validation", 23, 2)):
        save_rows(folder / f"{split}.csv", count, seed=seed)
        save_pairs(folder / f"{split}-pairs.csv", count, seed=seed)
        save_questions(folder / f"{split}.jsonl", count, seed=seed)
    settings = {
        "classification": (f"model_name_or_path: {folder / 'encoder'}", ".csv", "max_seq_length: 16"),
        "seq2seq": (f"config: {NEW_MODEL}", "-pairs.csv", "max_source_length: 32"),
        "causal_lm": (f"config: {NEW_DECODER}", "-pairs.csv", "max_length: 32"),
        "question_answering": (
            f"model_name_or_path: {folder / 'reader'}",
            ".jsonl",
            "max_seq_length: 20, doc_stride: 6",
        ),
    }
    paths = {}
    for recipe, (model, ending, lengths) in settings.items():
        paths[recipe] = folder / f"{recipe}.yaml"
        paths[recipe].write_text(
            f"""\
model: {{{model}}}
data: {{train_file: {folder}/train{ending}, validation_file: {folder}/validation{ending}, {lengths}}}
train: {{output_dir: {folder}/unused, per_device_train_batch_size: 4, gradient_accumulation_steps: 2}}
averaging: {{rule: swa, start: 0.25}}
noise: {{kind: r3f}}
"""
        )
    return paths

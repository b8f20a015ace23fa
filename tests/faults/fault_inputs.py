"""Model, data and configuration of the runs that are killed."""

from __future__ import annotations

from pathlib import Path

from tiny_inputs import save_model, save_rows


def save_inputs(folder: Path) -> Path:
    """Write them into a folder that is there, as run.yaml and what it names; returns the folder."""
    save_model(folder / "model")
    save_rows(folder / "train.csv", 70, seed=1)  # passes of 9 micro-batches a rank, cut by steps of 2
    save_rows(folder / "validation.csv", 23, seed=2)
    (folder / "run.yaml").write_text(
        f"""\
model: {{model_name_or_path: {folder / "model"}}}
data: {{train_file: {folder / "train.csv"}, validation_file: {folder / "validation.csv"}, max_seq_length: 16}}
train: {{output_dir: unused, per_device_train_batch_size: 4, gradient_accumulation_steps: 2, learning_rate: 5.0e-3}}
eval: {{per_device_eval_batch_size: 4}}
"""
    )
    return folder

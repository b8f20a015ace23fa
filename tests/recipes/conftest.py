from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
from launching import forget_accelerate, load_recipe
from tiny_inputs import save_model, save_rows
from tiny_questions import save_questions, save_reader
from tiny_texts import NEW_MODEL, save_decoder, save_pairs


def save_splits(save: Callable[..., object], folder: Path, ending: str, *, train: int) -> str:
    """Write the rows of each split into a file, and return the settings that name the files."""
    counts = {"train": train, "validation": 23, "test": 11}  # no multiples of any batch
    for seed, (split, count) in enumerate(counts.items(), start=1):
        save(folder / f"{split}.{ending}", count, seed=seed)
    return "\n".join(f"  {split}_file: {folder / split}.{ending}" for split in counts)


@pytest.fixture(scope="session")
def inputs(tmp_path_factory) -> Path:
    """A folder with a model, data, and a configuration that names them."""
    folder = tmp_path_factory.mktemp("inputs")
    save_model(folder / "model")
    files = save_splits(save_rows, folder, "csv", train=70)
    (folder / "run.yaml").write_text(
        f"""\
model: {{model_name_or_path: {folder / "model"}}}
data:
{files}
  max_seq_length: 16
train:
  output_dir: {folder / "unused"}
  per_device_train_batch_size: 4
  gradient_accumulation_steps: 2
  num_train_epochs: 6
  learning_rate: 5.0e-3
  logging_steps: 3
averaging: {{rule: swa}}
eval: {{per_device_eval_batch_size: 4, eval_steps: 10}}
"""
    )
    return folder


@pytest.fixture(scope="session")
def text_inputs(tmp_path_factory) -> Path:
    """A folder with pairs of texts, and a configuration that names them and a new model."""
    folder = tmp_path_factory.mktemp("text-inputs")
    files = save_splits(save_pairs, folder, "csv", train=90)
    (folder / "run.yaml").write_text(
        f"""\
model: {{config: {NEW_MODEL}, vocab_size: 320}}
data:
{files}
  max_source_length: 32
  max_target_length: 32
train:
  output_dir: {folder / "unused"}
  per_device_train_batch_size: 8
  max_steps: 50
  learning_rate: 2.0e-2
  logging_steps: 5
  group_by_length: true
averaging: {{rule: swa}}
noise: {{kind: r3f}}
eval:
  per_device_eval_batch_size: 8
  metric: chrf
  num_beams: 2
  max_new_tokens: 12
  num_samples: 50
"""
    )
    return folder


@pytest.fixture(scope="session")
def answer_inputs(tmp_path_factory) -> Path:
    """A folder with a decoder, prompts with answers, and a configuration that names them."""
    folder = tmp_path_factory.mktemp("answer-inputs")
    save_decoder(folder / "model")
    files = save_splits(save_pairs, folder, "csv", train=90)
    (folder / "run.yaml").write_text(
        f"""\
model: {{model_name_or_path: {folder / "model"}}}
data:
{files}
  prompt_column: source
  answer_column: target
  max_length: 16
train:
  output_dir: {folder / "unused"}
  per_device_train_batch_size: 8
  max_steps: 50
  learning_rate: 2.0e-2
  group_by_length: true
averaging: {{rule: swa}}
noise: {{kind: r3f}}
eval: {{num_samples: 4, max_new_tokens: 4}}
"""
    )
    return folder


@pytest.fixture(scope="session")
def question_inputs(tmp_path_factory) -> Path:
    """A folder with a model, questions about texts, and a configuration that names them."""
    folder = tmp_path_factory.mktemp("question-inputs")
    save_reader(folder / "model")
    files = save_splits(save_questions, folder, "jsonl", train=90)
    (folder / "run.yaml").write_text(
        f"""\
model: {{model_name_or_path: {folder / "model"}}}
data:
{files}
  max_seq_length: 20
  doc_stride: 6
train:
  output_dir: {folder / "unused"}
  per_device_train_batch_size: 8
  max_steps: 60
  learning_rate: 5.0e-3
  logging_steps: 5
  group_by_length: true
averaging: {{rule: swa}}
noise: {{kind: r3f}}
eval: {{per_device_eval_batch_size: 8, num_samples: 5}}
"""
    )
    return folder


@pytest.fixture(scope="session")
def classification() -> ModuleType:
    """The recipe as a module, to call its `main` in this process."""
    return load_recipe("classification")


@pytest.fixture(scope="session")
def seq2seq() -> ModuleType:
    """The recipe as a module, to call its `main` in this process."""
    return load_recipe("seq2seq")


@pytest.fixture(scope="session")
def question_answering() -> ModuleType:
    """The recipe as a module, to call its `main` in this process."""
    return load_recipe("question_answering")


@pytest.fixture
def fresh_accelerate(monkeypatch) -> None:
    """Let a recipe start in this process as if none had before it."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    forget_accelerate()


@pytest.fixture
def refusal(tmp_path, capsys) -> Callable[..., str]:
    """Call a recipe with overrides, see it fail in words, and return the words."""

    def call(recipe: ModuleType, inputs: Path, *overrides: str) -> str:
        output = tmp_path / "run"
        arguments = ["--config", str(inputs / "run.yaml"), f"train.output_dir={output}", *overrides]
        code = recipe.main(arguments)
        said = capsys.readouterr()
        assert code == 1
        assert said.err.count("error: ") == 1
        assert "Traceback" not in said.err
        assert "step 1/" not in said.out
        assert not (output / "final").exists()
        return said.err

    return call

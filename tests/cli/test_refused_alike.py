"""What `swaft validate` refuses, a launch refuses before it starts anything, in the same words, and vice versa."""

from __future__ import annotations

import ast
import hashlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, fields
from pathlib import Path
from types import FrameType

import pytest
from launching import forget_accelerate, load_recipe
from tiny_inputs import save_rows

import swaft
from swaft.averaging.rules import Rule
from swaft.averaging.state import AverageState, RuleState
from swaft.errors import ConfigError
from swaft.storage import Manifest, seal
from swaft.training.checks import Problems
from swaft.training.config import load_config
from swaft.training.launch import deepspeed_extension
from swaft.training.launch.launcher import read_launch
from swaft.training.planning.plan import plan_recipe
from swaft.training.planning.preflight import check_run
from swaft.training.run.record import RunRecord

pytestmark = pytest.mark.unit

ROOT = Path(__file__).parents[2]
RECIPES = ("classification", "seq2seq", "question_answering", "causal_lm")


@pytest.fixture
def launched(monkeypatch, configs) -> Callable[..., list[str]]:
    """Start a recipe as one rank of a launch line would; returns what it refuses before it starts an engine."""

    def call(recipe: str, words: list[str], *, starts: bool = False) -> list[str]:
        for name, value in read_launch(words).environ.items():
            monkeypatch.setenv(name, value)
        module = load_recipe(recipe)
        if starts:
            monkeypatch.delenv("WORLD_SIZE")
            forget_accelerate()
        else:
            monkeypatch.setattr(module, "build_accelerator", lambda *_: pytest.fail("an engine was started"))
        with (problems := Problems()):
            module.train(load_config(module.Config, words[words.index(f"recipes/{recipe}.py") + 1 :]))
        return problems.found

    return call


@pytest.fixture
def line(configs) -> Callable[..., list[str]]:
    """The words of a launch line of a recipe."""

    def words(
        recipe: str, *overrides: str, launch: str = "zero3", options: tuple[str, ...] = ()
    ) -> list[str]:
        file = ("--config_file", str(ROOT / "launch" / "accelerate" / f"{launch}.yaml"))
        return [*file, *options, f"recipes/{recipe}.py", "--config", str(configs[recipe]), *overrides]

    return words


OF_A_LAUNCH = {
    "checks.py: refuse": "raises what both have found",
    "config/load.py: load_config": "raises what both have read",
    "launch/accelerator.py: refuse_fp16_on_cpu": "the launch may be meant for another machine",
    "run/folder.py: _claim": "another run may have come in between",
    "run/folder.py: _locked": "another run may be at work there",
    "data/texts.py: __init__": "a new tokenizer, which there is only then, has a token for padding",
    "data/texts.py: encode": "report_special_tokens has asked it about every text that it may refuse",
    "data/texts.py: refuse_split_settings": "a new tokenizer is there only then; prepare asks it about the model's",
    "models/text_generation.py: require_saving": "training changes the settings that are loaded with the weights",
    "models/checks.py: require_order": "it is measured on weights, and there are none on paper",
    "models/build.py: require_called": "what the loop of a copied recipe calls is seen once it runs",
    "models/build.py: require_own_parameters": "the optimizer may be a copied recipe's, made from weights",
    "run/state.py: _require_plain": "a copied recipe's parts are made after its model",
}
"""What a launch asks besides `swaft validate`, and why that cannot be known before."""


def refusing_functions() -> dict[tuple[str, int], str]:
    """Functions of the recipe kit that refuse settings or data, by file and first line."""
    found = {}
    for path in (ROOT / "swaft" / "training").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and any(map(refuses, statements(node))):
                first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
                found[str(path), first] = f"{path.relative_to(ROOT / 'swaft' / 'training')}: {node.name}"
    return found


def statements(function: ast.FunctionDef) -> Iterator[ast.AST]:
    """What a function does itself, without the functions inside it."""
    waiting: list[ast.AST] = [*function.body]
    while waiting:
        node = waiting.pop()
        yield node
        if not isinstance(node, ast.FunctionDef):
            waiting += ast.iter_child_nodes(node)


def refuses(node: ast.AST) -> bool:
    raised = node.exc if isinstance(node, ast.Raise) else None
    called = raised.func if isinstance(raised, ast.Call) else raised
    return isinstance(called, ast.Name) and called.id in ("ConfigError", "DataError")


@contextmanager
def noting(names: Mapping[tuple[str, int], str]) -> Iterator[set[str]]:
    """Context that notes which of these functions are called."""
    called = set[str]()

    def note(frame: FrameType, event: str, _: object) -> None:
        name = names.get((frame.f_code.co_filename, frame.f_code.co_firstlineno)) if event == "call" else None
        if name is not None:
            called.add(name)

    sys.setprofile(note)
    try:
        yield called
    finally:
        sys.setprofile(None)


@pytest.mark.parametrize("recipe", RECIPES)
def test_validate_asks_everything_that_may_refuse_a_launch(recipe, line, launched, tmp_path):
    words, names = line(recipe, f"train.output_dir={tmp_path / 'run'}", launch="single"), refusing_functions()
    with noting(names) as validated:
        assert check_run(words).problems == []
    with noting(names) as asked:
        assert launched(recipe, words, starts=True) == []
    assert len(asked & validated) > 20
    unknown = sorted(asked - validated - {*OF_A_LAUNCH})
    assert not unknown, "\n".join(unknown)


@pytest.mark.parametrize(
    ("recipe", "override", "expected"),
    [
        ("classification", "train.learning_rte=1", "train.learning_rte: no such setting"),
        ("classification", "train.learning_rate=fast", "train.learning_rate: expected"),
        ("classification", "data.train_file=/nowhere.csv", "there is no file /nowhere.csv"),
        ("classification", "data.text_column=txet", "there is no column 'txet'"),
        ("classification", "eval.metric=pearson_spearman", "does not fit a classification"),
        ("classification", "data.positive_label=1", "which eval.metric=accuracy does not use"),
        ("classification", "data.max_seq_length=512", "the model reads at most 32 tokens"),
        ("classification", "model.model_name_or_path=/nowhere", "/nowhere cannot be loaded"),
        ("classification", "model.tokenizer_name=/nowhere", "cannot be loaded"),
        ("classification", "averaging.start=99999", "0 weights would be averaged"),
        ("classification", "averaging.decay=0.9", "averaging.rule=swa does not use"),
        ("classification", "noise.layers=all", "noise.layers: is all, which noise.kind=r3f does not use"),
        ("classification", "noise.sigma=0", "section noise: sigma=0 with masks='shared': nothing differs"),
        ("classification", "train.warmup_steps=9999", "so the rate never reaches train.learning_rate"),
        ("classification", "train.mixed_precision=fp16", "the launcher's mixed_precision is bf16"),
        ("seq2seq", "eval.metric=accuracy", "accuracy does not fit a generation task"),
        ("seq2seq", "model.config={model_type: t5, num_layer: 1}", "Did you mean 'num_layers'?"),
        (
            "seq2seq",
            "model.config={model_type: bart, max_position_embeddings: 16}",
            "data.max_source_length is 32, but the model reads at most 16 tokens",
        ),
        ("seq2seq", "data.source_lang=en", "data.target_lang: is not set"),
        ("question_answering", "eval.metric=rouge", "rouge does not fit"),
        ("question_answering", "data.doc_stride=14", "expected more than data.doc_stride=14"),
        ("classification", "data.delimiter=ab", "data.delimiter: 'ab' is not one character"),
        ("question_answering", "data.delimiter=tab", "data.delimiter: is about csv and tsv files"),
        ("seq2seq", "data.validation_fraction=1.5", "data.validation_fraction: is 1.5, expected"),
        ("seq2seq", "data.validation_fraction=0.5", "data.validation_file names the validation rows already"),
        ("classification", "track.report_to=aim", "track.report_to is aim, which is not installed"),
        ("classification", "train.seed=20240615123", "train.seed: is 20240615123, expected"),
        ("classification", "data.text_column=${", "data.text_column: '${' cannot be filled in"),
    ],
)
def test_what_is_wrong_with_a_setting_is_refused_alike(recipe, override, expected, line, launched):
    words = line(recipe, override)
    problems = check_run(words).problems
    [problem] = [problem for problem in problems if expected in problem]
    assert problem
    assert launched(recipe, words) == problems


@pytest.mark.parametrize(
    ("recipe", "overrides", "expected"),
    [
        ("seq2seq", ["noise.kind=r4f"], "has no classification head with weights of its own"),
        (
            "seq2seq",
            ["noise.kind=rdrop", "model.config={model_type: t5, dropout_rate: 0.0}"],
            "section noise: RDrop without noise compares",
        ),
        ("classification", ["data.do_regression=true"], "section noise: R3F needs at least two classes"),
        ("classification", ["model.use_peft=true", "model.lora_target_modules=none_such"], "none_such"),
    ],
)
def test_what_does_not_fit_the_model_is_refused_alike(recipe, overrides, expected, line, launched, tmp_path):
    words = line(recipe, *overrides, f"train.output_dir={tmp_path / 'run'}", launch="single")
    [problem] = check_run(words).problems
    assert expected in problem
    assert launched(recipe, words, starts=True) == [problem]


NO_CHECKPOINTING = "model.config={model_type: openai-gpt, n_embd: 16, n_layer: 1, n_head: 2, n_positions: 64}"


def test_activations_that_a_model_cannot_recompute_are_refused_alike(line, launched, tmp_path):
    overrides = (
        "train.gradient_checkpointing=true",
        NO_CHECKPOINTING,
        f"train.output_dir={tmp_path / 'run'}",
    )
    words = line("causal_lm", *overrides, launch="single")
    [problem] = check_run(words).problems
    assert problem.startswith(
        "train.gradient_checkpointing: is true, but OpenAIGPTLMHeadModel does not support"
    )
    with pytest.raises(ConfigError) as planned:
        plan_recipe(words)
    assert planned.value.problems == launched("causal_lm", words, starts=True) == [problem]


def test_activations_that_a_launch_file_wants_recomputed_are_refused_too(line, tmp_path):
    file = tmp_path / "launch.yaml"
    file.write_text(FSDP + "{fsdp_version: 2, fsdp_activation_checkpointing: true}")
    [problem] = check_run(line("causal_lm", NO_CHECKPOINTING, options=("--config_file", str(file)))).problems
    assert problem.startswith("train.gradient_checkpointing: is true, but")


BATCH = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "train_batch_size")


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ({"zero_optimization": {"stage": 2, "overlap_com": True}}, "Did you mean 'overlap_comm'?"),
        ({"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 2}}, "zero_hpz_partition_size > 1"),
        (
            {"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme", "nvme_path": "/nowhere"}}},
            "offload_param.device=nvme",
        ),
        ({"zero_optimization": {"stage": 1}, "tensor_parallel": {"autotp_size": 2}}, "autotp_size > 1"),
        ({"zero_optimization": {"stage": 1}, "gradient_cliping": 1.0}, "Did you mean 'gradient_clipping'?"),
        ({"zero_optimization": {"stage": 1}, "gradient_clipping": 0.3}, "says gradient_clipping = 0.3"),
        (
            {"zero_optimization": {"stage": 1}, "scheduler": {"type": "OneCycle"}},
            "has a scheduler (OneCycle)",
        ),
        ({"zero_optimization": {"stage": 1}, "optimizer": {"type": "Lamb"}}, "asks for the optimizer Lamb"),
        ({"zero_optimization": {"stage": 1}, "optimizer": {"type": None}}, "asks for the optimizer None"),
        (
            {"zero_optimization": {"stage": 1}, "tensorboard": {"enabled": False, "jobname": "x"}},
            "sets tensorboard.jobname",
        ),
    ],
)
def test_a_deepspeed_file_is_refused_alike(content, expected, line, launched, tmp_path):
    file = tmp_path / "mine.json"
    file.write_text(json.dumps(dict.fromkeys(BATCH, "auto") | content))
    # Also where nothing is averaged: then the way out that is named may not be to average nothing.
    words = line("classification", "averaging.rule=none", options=("--deepspeed_config_file", str(file)))
    [problem] = check_run(words).problems
    assert expected in problem
    assert "without averaging" not in problem
    assert "averaging.rule" not in problem
    assert launched("classification", words) == [problem]


FSDP = "distributed_type: FSDP\nnum_processes: 2\nmixed_precision: bf16\nfsdp_config: "


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (FSDP + "{fsdp_version: 1}", "the launcher asks for FSDP version 1"),
        (
            FSDP + "{fsdp_version: 2}\nparallelism_config: {parallelism_config_cp_size: 2}",
            "the launcher asks for parallelism_config",
        ),
        (
            "distributed_type: 'NO'\nnum_processes: 1\ndynamo_config: {dynamo_backend: INDUCTOR}",
            "the launcher asks for dynamo_backend INDUCTOR",
        ),
        (
            "distributed_type: DEEPSPEED\nnum_processes: 2\n"
            "deepspeed_config: {zero_stage: 2, gradient_clipping: 0.3}",
            "says gradient_clipping = 0.3",
        ),
    ],
)
def test_a_launch_file_is_refused_alike(content, expected, line, launched, tmp_path):
    file = tmp_path / "launch.yaml"
    file.write_text(content)
    words = line("classification", options=("--config_file", str(file)))
    [problem] = check_run(words).problems
    assert expected in problem
    assert launched("classification", words) == [problem]


@pytest.mark.parametrize(
    ("recipe", "override"),
    [
        ("classification", "noise.kind=r4f"),
        ("classification", "model.use_peft=true"),
        ("causal_lm", "data.packing=true"),
    ],
)
def test_what_needs_a_whole_model_is_refused_alike_where_zero3_loads_it_in_parts(
    recipe, override, line, launched
):
    words = line(recipe, override, "train.max_steps=4", options=("--zero3_init_flag", "true"))
    [problem] = check_run(words).problems
    assert override in problem
    assert "set zero3_init_flag: false" in problem
    assert launched(recipe, words) == [problem]


def test_a_folder_that_holds_a_run_is_refused_alike(line, launched, tmp_path):
    saved(tmp_path / "checkpoint-1")  # of another run, which does not matter where nothing can resume
    (tmp_path / "summary.json").touch()
    words = line("classification", f"train.output_dir={tmp_path}")
    [problem] = check_run(words).problems
    assert "holds a run that has finished" in problem
    assert launched("classification", words) == [problem]


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    """A checkpoint of a run of four steps under DDP on two ranks."""
    return saved(tmp_path / "run" / "checkpoint-1")


def saved(path: Path, **averages: Rule) -> Path:
    """Write such a checkpoint, with the state of these averages."""
    setup = {"stage": None, "world_size": 2, "per_device_train_batch_size": 4, "rows_per_step": 16}
    digests = dict.fromkeys(("rows_sha256", "architecture_sha256", "frozen_sha256"), "a" * 64)
    setup |= {"grouped_by": None, "total_steps": 4, "rows": 70, "seed": 42, **digests}
    content = dict.fromkeys((field.name for field in fields(RunRecord)), None)
    content |= {"setup": setup, "parts": {"position": {"batches": 2}}, "settings": {"averaging.rule": "none"}}
    path.mkdir(parents=True)
    state = {"total_steps": 4, "precision": "compensated", "applied_steps": 1, "moved": False, "weights": "0"}
    sealed = {}
    if averages:
        rules = [RuleState(name, repr(rule), 0, lanes={}, readout={}) for name, rule in averages.items()]
        inner = AverageState(rules, parameters={}, aliases={}, **state)
        (path / "average").mkdir()
        seal(path / "average", Manifest(kind="average", files={}, content=asdict(inner)))
        manifest = (path / "average" / "manifest.json").read_bytes()
        sealed["average"] = hashlib.sha256(manifest).hexdigest()
    seal(path, Manifest(kind="run", files={}, content=content, sealed=sealed))
    return path


@pytest.mark.parametrize(
    ("overrides", "launch", "expected"),
    [
        ([], "ddp", None),
        (["averaging.rule=swa"], "ddp", "is of a run that averaged nothing (averaging.rule=none)"),
        (["train.seed=7"], "ddp", "is of a run with seed = 42, this one has 7"),
        (["train.max_steps=5"], "ddp", "is of a run with total_steps = 4, this one has 5"),
        ([], "zero2", "was written under torch alone by 2 ranks, but this run is DeepSpeed stage 2"),
        (["train.group_by_length=true"], "ddp", "grouped by None, but this run groups them by 8"),
        (
            ["train.resume_from_checkpoint=/nowhere/checkpoint-3"],
            "ddp",
            "/nowhere/checkpoint-3 is not a folder",
        ),
    ],
)
def test_a_checkpoint_that_a_run_cannot_go_on_from_is_refused_alike(
    overrides, launch, expected, checkpoint, line, launched
):
    same = (
        "train.max_steps=4",
        "train.seed=42",
        f"train.output_dir={checkpoint.parent}",
        "train.warmup_steps=0",
        "averaging.rule=none",
    )
    words = line("classification", *same, *overrides, launch=launch)
    problems = check_run(words).problems
    if expected is None:
        assert problems == []
        return
    [problem] = problems
    assert expected in problem
    assert launched("classification", words) == [problem]


@pytest.mark.parametrize(
    ("settings", "name", "expected"),
    [
        (["start=0.5"], "average", None),
        (["start=0.75"], "mine", None),  # of a script that names its rules; it compares them itself
        (["start=0.75"], "average", "this run averages by average: SWA(start=0.75"),
        (["start=0.5", "precision=plain"], "average", "set averaging.precision as it was"),
    ],
)
def test_averages_that_a_run_cannot_continue_are_refused_alike(
    settings, name, expected, line, launched, tmp_path
):
    folder = saved(tmp_path / "run" / "checkpoint-1", **{name: swaft.SWA(start=0.5)}).parent
    same = ("train.max_steps=4", "train.seed=42", f"train.output_dir={folder}", "train.warmup_steps=0")
    words = line(
        "classification", *same, *(f"averaging.{each}" for each in ["rule=swa", *settings]), launch="ddp"
    )
    problems = check_run(words).problems
    assert (problems == []) if expected is None else (expected in problems[0])
    if expected is not None:
        assert launched("classification", words) == problems


@pytest.mark.parametrize("offloads", [False, True])
def test_a_lock_that_deepspeed_would_wait_for_is_refused_alike(
    offloads, line, launched, tmp_path, monkeypatch
):
    lock = tmp_path / "lock"
    lock.touch()
    os.utime(lock, (time.time() - 3600, time.time() - 3600))
    held = "cpu_adam" if offloads else deepspeed_extension.EXTENSION

    def folder(extension: str = deepspeed_extension.EXTENSION) -> Path:
        return tmp_path if extension == held else tmp_path / "other"

    monkeypatch.setattr(deepspeed_extension, "build_folder", folder)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    file = ROOT / "ds_configs" / ("zero2_offload.json" if offloads else "zero2.json")
    words = line("classification", launch="zero2", options=("--deepspeed_config_file", str(file)))
    [problem] = check_run(words).problems
    assert str(lock) in problem
    assert launched("classification", words) == [problem]


def test_a_first_column_of_scores_is_a_regression(line, launched, tmp_path):
    save_rows(tmp_path / "rows.csv", 40, seed=1, label=lambda positive: 0.5 + positive)
    rows = (f"data.train_file={tmp_path / 'rows.csv'}", f"data.validation_file={tmp_path / 'rows.csv'}")
    words = line("classification", *rows, f"train.output_dir={tmp_path / 'run'}", launch="single")
    [problem] = check_run(words).problems
    assert "the model has one output (regression)" in problem
    assert launched("classification", words, starts=True) == [problem]

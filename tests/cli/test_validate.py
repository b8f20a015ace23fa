"""`swaft validate` finds everything that is wrong with a run without starting it, and tells what it comes to."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from itertools import product
from pathlib import Path

import pytest
import torch
from accelerate.data_loader import BatchSamplerShard
from torch.utils.data import BatchSampler, SequentialSampler

from swaft.cli.main import main
from swaft.training.launch import deepspeed_extension
from swaft.training.models.build import count_micro_batches
from swaft.training.planning.preflight import check_run

pytestmark = pytest.mark.unit

ROOT = Path(__file__).parents[2]
FILES = {path.stem: path for path in sorted((ROOT / "launch" / "accelerate").glob("*.yaml"))}
OTHERS = ("seq2seq", "question_answering", "causal_lm")


@pytest.fixture
def validate(configs, capsys):
    """Call the command for a recipe; returns its exit code and what it printed."""

    def call(recipe: str, *overrides: str, launch: str = "zero3", options: tuple[str, ...] = ()):
        if launch.endswith("_multinode"):
            options = ("--num_machines", "2", "--num_processes", "16", *options)
        words = ["--config_file", str(FILES[launch]), *options, f"recipes/{recipe}.py"]
        code = main(["validate", *words, "--config", str(configs[recipe]), *overrides])
        return code, capsys.readouterr().out

    return call


@pytest.fixture
def told(validate):
    """The problems of a run, as JSON has them."""

    def call(recipe: str, *overrides: str, **settings) -> list[str]:
        code, printed = validate(recipe, *overrides, "--json", **settings)
        problems = json.loads(printed)["problems"]
        assert code == (1 if problems else 0)
        return problems

    return call


@pytest.mark.parametrize(
    ("recipe", "launch"),
    [
        *(("classification", launch) for launch in FILES),
        *product(OTHERS, ("single", "ddp", "fsdp2", "zero3")),  # a file of each engine
    ],
)
def test_a_right_run_has_no_problems_under_any_launch_file(validate, configs, recipe, launch):
    code, printed = validate(recipe, launch=launch)
    assert (code, printed.splitlines()[-1]) == (0, "problem    none")
    assert not (configs[recipe].parent / "unused").exists()


def test_the_table_tells_what_the_run_comes_to(validate):
    code, printed = validate("classification", "train.num_train_epochs=8", launch="zero3_multinode")
    assert code == 0
    lines = printed.splitlines()
    assert lines[:6] == [
        "launch     2 machines x 8 = 16 ranks, DeepSpeed ZeRO-3, bf16",
        "batch      4 per device x 2 accumulation x 16 ranks = 128",
        "model      19,874 parameters",
        "steps      8 epochs = 8 optimizer steps, warmup 1, constant_with_warmup at 2e-05",
        "averaging  swa, steps 2 to 8, every 1 -> 7 weights; 0.0 MiB of host memory per rank",
        "noise      r3f, uniform 1e-05 on the embeddings, weight 1 -> 2 forwards per micro-batch",
    ]
    assert any(line.split() == [
        "ds", "gradient_clipping", "1.0", "(auto", "->", "train.max_grad_norm)"
    ] for line in lines)  # fmt: skip
    assert lines[-2:] == [
        "data       train 70 rows, validation 23 rows; text -> label, 2 classes: 0, 1",
        "problem    none",
    ]


def test_long_questions_are_several_rows_to_train_on_so_the_steps_are_the_least(validate):
    assert "3 epochs = at least 27 optimizer steps" in validate("question_answering", launch="single")[1]
    assert " 40 optimizer steps" in validate("question_answering", "train.max_steps=40")[1]
    assert "least" not in validate("question_answering", "train.max_steps=40")[1]


@pytest.mark.parametrize("recipe", ["classification", "question_answering"])
def test_adapters_are_told_apart_from_what_they_are_put_on(validate, recipe):
    code, printed = validate(recipe, "model.use_peft=true", "train.max_steps=40")
    assert code == 0, printed
    assert " of them trained" in printed


def test_the_rule_that_a_copied_recipe_takes_instead_of_the_settings_is_named(configs, tmp_path, capsys):
    recipe, mine = Path("recipes/classification.py").read_text(), tmp_path / "mine.py"
    assert recipe.count("build_rule(config.averaging)") == 1
    mine.write_text(recipe.replace("build_rule(config.averaging)", "swaft.EMA()"))
    words = ["--config_file", str(FILES["ddp"]), str(mine), "--config", str(configs["classification"])]
    assert main(["validate", *words, "train.max_steps=40", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["facts"]["averaging"]["rule"] == "ema"


def test_json_holds_the_same(validate):
    code, printed = validate("seq2seq", "--json", "train.max_steps=40", launch="ddp")
    found = json.loads(printed)
    assert (code, found["problems"], found["unchecked"]) == (0, [], [])
    facts = found["facts"]
    assert facts["launch"] == {"engine": "DDP", "machines": 1, "ranks": 2, "mixed_precision": "bf16"}
    assert (facts["steps"]["total"], facts["steps"]["is_least"]) == (40, False)
    assert (facts["averaging"]["first_step"], facts["averaging"]["members"]) == (10, 31)
    assert facts["noise"]["kind"] == "r3f"
    assert facts["averaging"]["host_bytes_a_rank"] == 6 * -(-facts["model"]["trained"] // 2)
    assert (facts["data"], facts["columns"]) == ({"train": 70, "validation": 23}, "source -> target")
    assert "ds" not in facts


@pytest.mark.parametrize("world_size", [1, 3, 4])
def test_the_batches_of_an_epoch_are_as_many_as_accelerate_makes(world_size):
    for num_rows in range(1, 34):
        batches = BatchSampler(SequentialSampler(range(num_rows)), batch_size=4, drop_last=False)
        shard = BatchSamplerShard(batches, num_processes=world_size, process_index=0)
        assert count_micro_batches(num_rows=num_rows, batch_size=4, world_size=world_size) == len(shard)


def test_everything_that_is_wrong_is_told_at_once_each_thing_once(validate, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "summary.json").touch()
    file = tmp_path / "mine.json"
    file.write_text(
        '{"zero_optimization": {"stage": 2}, "gradient_clipping": 0.3, "scheduler": {"type": "X"}}'
    )
    expected = [
        "train.adam_beta3: no such setting",
        "there is no column 'txet'",
        "/nowhere cannot be loaded",
        "section noise: sigma=0 with masks='shared': nothing differs",
        "section averaging: start=99 with every=1",
        f"{file} has a scheduler (X)",
        f"{file} says gradient_clipping = 0.3",
        "holds a run that has finished",
        "makes 60 of the run's 50 steps a warmup",
    ]
    code, printed = validate(
        "classification",
        "train.adam_beta3=1",
        "data.text_column=txet",
        "model.model_name_or_path=/nowhere",
        "noise.sigma=0",
        "averaging.start=99",
        "train.max_steps=50",
        "train.warmup_steps=60",
        f"train.output_dir={tmp_path / 'out'}",
        options=("--deepspeed_config_file", str(file)),
    )
    problems = [line for line in printed.splitlines() if line.startswith("problem ")]
    assert code == 1
    for part in expected:
        assert sum(part in problem for problem in problems) == 1, part
    assert len(problems) == len(expected)


def test_a_wrong_launch_file_does_not_hide_what_is_wrong_with_the_settings(told, tmp_path):
    path = tmp_path / "launch.yaml"
    path.write_text("distributed_type: DEEPSPED\n")
    problems = told("classification", "data.text_column=txet", options=("--config_file", str(path)))
    assert len(problems) == 2
    assert "Did you mean 'DEEPSPEED'?" in problems[0]
    assert "there is no column 'txet'" in problems[1]


def test_a_faulty_setting_is_one_problem_and_the_rest_is_checked(told):
    problems = told("seq2seq", "data.train_file=null", "model.vocab_size=some", "eval.num_beams=0")
    assert sorted(problem.split(":")[0] for problem in problems) == [
        "data.task_name",
        "eval.num_beams",
        "model.vocab_size",
    ]


def test_a_run_for_gpus_is_not_judged_by_a_machine_without(told, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert told("classification", options=("--mixed_precision", "fp16")) == []
    assert told("classification", "train.mixed_precision=fp16", options=("--mixed_precision", "fp16")) == []


def test_a_single_value_of_the_launch_file_that_the_deepspeed_file_would_silence_is_told(told, tmp_path):
    path = tmp_path / "launch.yaml"
    path.write_text(
        """\
distributed_type: DEEPSPEED
num_processes: 2
deepspeed_config:
  deepspeed_config_file: ds_configs/zero3.json
  zero_stage: 2
  offload_param_device: cpu
  gradient_accumulation_steps: 7
"""
    )
    problems = "\n".join(told("classification", options=("--config_file", str(path))))
    assert "zero_stage = 2, but ds_configs/zero3.json says zero_optimization.stage = 3" in problems
    assert "offload_param_device = cpu" in problems
    assert "gradient_accumulation_steps = 7" in problems


def test_a_script_of_ones_own_is_not_run_and_said_to_be_looked_at_from_outside(capsys, tmp_path):
    script = tmp_path / "mine.py"
    script.write_text("raise SystemExit('ran')\n")
    words = ["--config_file", str(FILES["zero2"]), str(script), "--lr", "1"]
    assert main(["validate", "--mixed_precision", "bf16", *words]) == 0
    printed = capsys.readouterr().out
    assert "launch     2 ranks, DeepSpeed ZeRO-2" in printed
    assert f"unchecked  settings, data and model: {script} is not written as swaft's recipes are" in printed


@pytest.mark.parametrize("launch", [name for name in FILES if name.startswith("zero")])
def test_a_launch_file_says_in_its_first_line_what_a_script_of_ones_own_needs(capsys, tmp_path, launch):
    script = tmp_path / "mine.py"
    script.touch()
    ranks = ("--num_machines", "2", "--num_processes", "16") if launch.endswith("_multinode") else ()
    words = ["--config_file", str(FILES[launch]), *ranks, str(script)]
    assert main(["validate", *words]) == 1
    printed = capsys.readouterr().out
    assert "mixed_precision next to deepspeed_config_file ds_configs/zero" in printed
    [needed] = re.findall(
        r"In a script of your own.*?(--mixed_precision \w+)", FILES[launch].read_text().split("\n")[0]
    )
    assert main(["validate", *needed.split(), *words]) == 0


@pytest.mark.parametrize("command", ["validate", "plan"])
def test_a_recipe_that_is_not_python_is_a_problem_with_its_line(command, capsys, tmp_path):
    script = tmp_path / "mine.py"
    script.write_text(
        "from swaft.training.config import ClassificationConfig as Config\n\ndef prepare(config, problems:\n"
    )
    assert main([command, "--config_file", str(FILES["zero2"]), str(script)]) == 1
    said = capsys.readouterr()
    assert f"{script}: line 3 is not Python: '(' was never closed; fix that line" in said.out + said.err
    assert "is not written as" not in said.out


def test_a_model_folder_without_weights_is_refused_and_a_new_model_needs_none(told, configs, tmp_path):
    for recipe, model in (("classification", "encoder"), ("question_answering", "reader")):
        folder = tmp_path / recipe
        shutil.copytree(
            configs[recipe].parent / model, folder, ignore=shutil.ignore_patterns("*.safetensors")
        )
        [problem] = told(recipe, f"model.model_name_or_path={folder}")
        assert f"{folder} has a configuration but no weights; expected model.safetensors" in problem
    assert told("seq2seq") == []


def test_how_rows_and_classes_are_taken_is_told(validate, tmp_path):
    rows = tmp_path / "stars.csv"
    rows.write_text("text;label\n" + "".join(f"the film was fine;{1 + i % 6}\n" for i in range(40)) + ";3\n")
    settings = ("data.delimiter=;", "data.validation_fraction=0.25", "data.skip_bad_rows=true")
    code, printed = validate("classification", f"data.train_file={rows}", *settings)
    assert code == 0, printed
    assert (
        "data       train 30 rows, validation 10 rows; text -> label, 6 classes: 1, 2, 3, 4, 5, 6" in printed
    )
    assert "notes      validation rows: 10 of 41, taken from train at random" in printed
    assert "notes      1 of 31 rows of train are left out: 31 (row 31 has nothing in column 'text'" in printed
    assert "notes      label: whole numbers without 0 are names of 6 classes: 1, 2, 3, 4, 5, 6" in printed


def test_what_a_problem_keeps_from_being_checked_is_told(validate, tmp_path):
    rows = tmp_path / "rows.csv"
    rows.write_text("text,label\na film,1\n,0\n")
    wrong = (
        "averaging.start=5000",
        "eval.metric_for_best_model=f2",
        "eval.keep_best=last",
        "eval.eval_steps=2",
    )
    files = (f"data.train_file={rows}", f"data.validation_file={rows}")
    code, printed = validate("classification", *files, *wrong)
    assert code == 1
    [problem] = [line for line in printed.splitlines() if line.startswith("problem")]
    assert "row 2 of train has nothing in column 'text'" in problem
    [unchecked] = [line for line in printed.splitlines() if line.startswith("unchecked")]
    assert unchecked.endswith("whatever depends on the problems; validate again once they are solved")


@pytest.mark.parametrize("command", ["validate", "plan"])
def test_a_part_that_prepare_does_not_set_is_named(command, configs, capsys, tmp_path):
    recipe = (
        Path("recipes/classification.py")
        .read_text()
        .replace("return ready\n", "del ready.model_config\n    return ready\n", 1)
    )
    (script := tmp_path / "mine.py").write_text(recipe)
    words = [
        command,
        "--config_file",
        str(FILES["zero3"]),
        str(script),
        "--config",
        str(configs["classification"]),
    ]
    code, printed = main(words), capsys.readouterr()
    if command == "plan":
        assert (
            code,
            f"{script}: a plan needs model_config, which its prepare does not set" in printed.err,
        ) == (1, True)
    else:
        assert (code, "problem    none" in printed.out) == (0, True)
        assert "unchecked  whatever needs what the recipe's prepare does not set: model_config" in printed.out


def test_columns_are_not_told_beside_one_that_is_missing(validate):
    code, printed = validate("classification", "data.label_column=lable")
    assert code == 1
    assert "there is no column 'lable'" in printed
    assert "\ndata " not in printed


def test_rows_in_the_place_of_others_are_told(validate, configs):
    rows = configs["classification"].parent / "validation.csv"
    told = validate("classification", f"data.train_file={rows}")[1]
    assert f"rows       data.train_file={rows} (command line) replaces data.train_file=" in told
    assert "rows  " not in validate("classification")[1]


def test_the_launch_is_told_where_its_precision_cannot_be(validate):
    code, printed = validate("classification", "train.mixed_precision=fp16")
    assert code == 1
    assert printed.startswith("launch     2 ranks, DeepSpeed ZeRO-3\n")


def test_a_lock_is_a_problem_only_where_there_is_a_deepspeed_to_wait_for_it(told, monkeypatch, tmp_path):
    lock = tmp_path / "lock"
    lock.touch()
    os.utime(lock, (time.time() - 3600, time.time() - 3600))
    monkeypatch.setattr(deepspeed_extension, "build_folder", lambda *_: tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert told("classification", launch="ddp_cpu") == []
    own = tmp_path / "own.py"
    own.touch()
    assert check_run(["--config_file", str(FILES["ddp_cpu"]), str(own)]).problems == []
    [problem] = check_run(
        ["--config_file", str(FILES["zero2"]), "--mixed_precision", "bf16", str(own)]
    ).problems
    assert str(lock) in problem


@pytest.mark.parametrize("command", ["validate", "env"])
def test_a_command_says_how_it_is_used(command, capsys):
    assert main([command, "--help"]) == 0
    assert f"swaft {command} " in capsys.readouterr().out


def test_env_tells_versions_and_machine(capsys):
    assert main(["env", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["packages"]["torch"] == torch.__version__
    assert facts["cpus"] >= 1
    assert main(["env"]) == 0
    assert f"torch {torch.__version__}" in capsys.readouterr().out
    assert main(["env", "--jsn"]) == 1
    assert "swaft env: unrecognized arguments: --jsn" in capsys.readouterr().err


@pytest.mark.parametrize("words", [["--help"], ["plan", "--help"], ["validate", "--help"], ["env", "--help"]])
def test_help_waits_for_no_library(words):
    code = (
        "import sys, swaft; before = {*sys.modules}; from swaft.cli.main import main; "
        f"main({words}); print({{'omegaconf', 'transformers', 'accelerate'}} & ({{*sys.modules}} - before))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.splitlines()[-1] == "set()"

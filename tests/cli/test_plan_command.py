"""`swaft plan` as a user types it: the launch line, a table or JSON, and what does not fit."""

from __future__ import annotations

import json
import shutil
import time

import pytest
from transformers import ViTConfig

from swaft.cli.main import main

ZERO_2 = ("--config_file", "launch/accelerate/zero2.yaml", "--num_processes", "16")
LLAMA = {
    "model_type": "llama", "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
    "num_attention_heads": 32, "vocab_size": 32000,
}  # fmt: skip


def words(configs, tmp_path, *more, recipe="classification", launcher=ZERO_2):
    run = ("--config", str(configs[recipe]), f"train.output_dir={tmp_path / 'run'}", "averaging.rule=swa")
    return ["plan", *launcher, f"recipes/{recipe}.py", *run, *more]


@pytest.mark.parametrize("recipe", ["classification", "question_answering", "seq2seq"])
def test_every_recipe_has_a_plan(configs, tmp_path, capsys, recipe):
    assert main(words(configs, tmp_path, recipe=recipe)) == 0
    told = capsys.readouterr().out
    for expected in (
        "16 GPU ranks, DeepSpeed ZeRO-2, bf16",
        "forward and backward",
        "events from step",
        "a rank",
    ):
        assert expected in told


def test_adapters_are_planned_as_they_are_trained(configs, tmp_path, capsys):
    assert main(words(configs, tmp_path, "--json", "train.max_steps=40")) == 0
    whole = json.loads(capsys.readouterr().out)
    assert main(words(configs, tmp_path, "--json", "train.max_steps=40", "model.use_peft=true")) == 0
    adapted = json.loads(capsys.readouterr().out)
    assert adapted["parameters"] > whole["parameters"]
    assert adapted["trainable"] < adapted["parameters"] / 2
    assert adapted["averaging"]["elements"] < whole["averaging"]["elements"]


def test_json_has_the_numbers_of_the_table(configs, tmp_path, capsys):
    assert main(words(configs, tmp_path, "--json", "--step_seconds", "0.5", "train.max_steps=40")) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["world_size"] == 16
    assert plan["ranks_a_machine"] == 16
    assert plan["averaging"]["events"] == 31  # from step 10 of 40
    assert plan["averaging"]["elements"] * 16 >= plan["trainable"]
    assert plan["averaging"]["copied_bytes"] == 4 * plan["averaging"]["elements"]
    assert plan["waits_for_averaging"] is False
    assert plan["device_bytes"] == max(sum(phase["device"].values()) for phase in plan["phases"])


def test_a_model_that_the_objective_refuses_is_not_planned(configs, tmp_path, capsys):
    assert main(words(configs, tmp_path, "noise.kind=r3f", "data.do_regression=true")) == 1
    assert "section noise: R3F needs at least two classes" in capsys.readouterr().err


def test_a_type_of_model_without_a_form_for_the_task_is_told_in_a_sentence(configs, tmp_path, capsys):
    ViTConfig().save_pretrained(tmp_path / "vit")
    assert main(words(configs, tmp_path, f"model.model_name_or_path={tmp_path / 'vit'}")) == 1
    told = capsys.readouterr().err
    assert "a vit has no form for sequence classification in transformers; use an encoder" in told
    assert "Unrecognized configuration class" not in told


def test_what_does_not_fit_is_named_and_fails(configs, tmp_path, capsys):
    assert main(words(configs, tmp_path, "--host_memory", "0.00001")) == 1
    assert "the 16 ranks of a machine would take" in capsys.readouterr().out


def test_what_would_help_where_a_run_does_not_fit_is_named(configs, tmp_path, capsys):
    assert main(words(configs, tmp_path, "--device_memory", "0.00001")) == 1
    [problem] = [line for line in capsys.readouterr().out.splitlines() if line.startswith("problem")]
    for remedy in (
        "train.per_device_train_batch_size below 4 with train.gradient_accumulation_steps above 2",
        "train.gradient_checkpointing=true",
        "a higher ZeRO stage (launch/accelerate/zero3.yaml)",
        "offloading (--deepspeed_config_file ds_configs/zero2_offload.json)",
    ):
        assert remedy in problem


def test_what_the_run_would_refuse_is_told_beside_its_plan(configs, tmp_path, capsys):
    bare = tmp_path / "bare"
    shutil.copytree(
        configs["classification"].parent / "encoder", bare, ignore=shutil.ignore_patterns("*.safetensors")
    )
    lacking = (f"model.model_name_or_path={bare}", "train.max_steps=40", "data.text_column=txet")
    assert main(words(configs, tmp_path, *lacking)) == 0
    told = [line for line in capsys.readouterr().out.splitlines() if line.startswith("refused")]
    assert len(told) == 2
    assert "there is no column 'txet'" in told[0]
    assert "no weights" in told[1]
    assert main(words(configs, tmp_path, *lacking, "--json")) == 0
    assert len(json.loads(capsys.readouterr().out)["refused"]) == 2


def test_many_ranks_on_one_machine_are_questioned(configs, tmp_path, capsys):
    launcher = ("--config_file", "launch/accelerate/zero3.yaml", "--num_processes", "64")
    assert main(words(configs, tmp_path, launcher=launcher)) == 0
    [note] = [line for line in capsys.readouterr().out.splitlines() if line.startswith("note")]
    assert "all 64 ranks are taken to be on one machine" in note
    assert "take launch/accelerate/zero3_multinode.yaml and --num_machines" in note


def test_several_machines_are_taken_as_they_are(configs, tmp_path, capsys):
    launcher = ("--config_file", "launch/accelerate/zero3_multinode.yaml", "--num_machines", "8")
    assert main(words(configs, tmp_path, launcher=(*launcher, "--num_processes", "64"))) == 0
    told = capsys.readouterr().out
    assert told.startswith("launch     8 machines x 8 = 64 GPU ranks")
    assert "note " not in told


@pytest.mark.slow
def test_seven_billion_weights_on_thousands_of_ranks_are_planned_on_a_laptop(configs, tmp_path, capsys):
    folder = tmp_path / "llama"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(LLAMA))
    launcher = ("--config_file", "launch/accelerate/zero3_multinode.yaml", "--num_machines", "512")
    begun = time.process_time()
    line = words(
        configs,
        tmp_path,
        f"model.model_name_or_path={folder}",
        "train.max_steps=1000",
        "train.gradient_checkpointing=true",
        "--json",
        launcher=(*launcher, "--num_processes", "4096"),
    )
    assert main(line) == 0
    assert time.process_time() - begun < 90  # of the processor; 20 on one that nobody else uses
    plan = json.loads(capsys.readouterr().out)
    assert plan["parameters"] > 6.6e9
    assert plan["averaging"]["elements"] == pytest.approx(plan["trainable"] / 4096, rel=0.01)


def test_a_script_that_is_no_recipe_is_refused_with_what_it_lacks(tmp_path, capsys):
    script = tmp_path / "train.py"
    script.write_text("print('my own loop')\n")
    assert main(["plan", *ZERO_2, str(script)]) == 1
    assert "with Config and prepare" in capsys.readouterr().err


@pytest.mark.parametrize("word", ["0", "-1", "much", "nan", "inf"])
def test_a_memory_that_is_no_size_is_refused(word, capsys):
    assert main(["plan", "--device_memory", word, *ZERO_2, "recipes/classification.py"]) == 1
    assert "device_memory" in capsys.readouterr().err

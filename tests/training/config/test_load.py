"""Layers, overrides, types and messages of `load_config`."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from swaft.errors import ConfigError
from swaft.training.config import flatten, load_config, to_yaml
from swaft.training.data.classification import ClassificationConfig
from swaft.training.data.seq2seq import Seq2SeqConfig

pytestmark = pytest.mark.unit

REQUIRED = ["model.model_name_or_path=demo", "data.task_name=mrpc", "train.output_dir=runs/x"]


def load(*overrides: str) -> ClassificationConfig:
    return load_config(ClassificationConfig, [*REQUIRED, *overrides])


def problems(*argv: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load_config(ClassificationConfig, list(argv))
    return caught.value.problems


def write(folder: Path, name: str, text: str) -> str:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_later_config_wins_over_earlier_and_command_line_over_both(tmp_path):
    first = write(tmp_path, "a.yaml", "train:\n  learning_rate: 1e-5\n  seed: 1\n  weight_decay: 0.1\n")
    second = write(tmp_path, "b.yaml", "train:\n  learning_rate: 2e-5\n  seed: 2\n")
    train = load("--config", first, f"--config={second}", "train.seed=3").train
    assert (train.learning_rate, train.seed, train.weight_decay) == (2e-5, 3, 0.1)
    assert train.adam_beta2 == 0.999


@pytest.mark.parametrize("form", [["train.seed=7"], ["--train.seed=7"], ["--train.seed", "7"]])
def test_all_three_forms_of_an_override_mean_the_same(form):
    assert load(*form) == load("train.seed=7")
    assert load(*form).train.seed == 7


def test_negative_value_after_a_flag_is_a_value():
    assert load("--train.max_steps", "-1").train.max_steps == -1


@pytest.mark.parametrize("text", ["1e-5", "1.0e-5", "0.00001"])
def test_scientific_notation_is_a_float_in_files_and_on_the_command_line(tmp_path, text):
    path = write(tmp_path, "a.yaml", f"train:\n  learning_rate: {text}\n")
    assert load("--config", path).train.learning_rate == 1e-5
    assert load(f"train.learning_rate={text}").train.learning_rate == 1e-5


@pytest.mark.parametrize("setting", ["averaging.start", "train.warmup_steps"])
@pytest.mark.parametrize("text", ["0.5", "100", "1", "0.0", "0"])
def test_steps_and_fractions_stay_apart(tmp_path, setting, text):
    section, leaf = setting.split(".")
    path = write(tmp_path, "a.yaml", f"{section}:\n  {leaf}: {text}\n")
    for config in (
        load(f"{setting}={text}", "averaging.rule=swa"),
        load("--config", path, "averaging.rule=swa"),
    ):
        value = getattr(getattr(config, section), leaf)
        assert type(value) is (float if "." in text else int)
        assert value == float(text)


def test_one_is_a_step_and_one_point_zero_a_fraction():
    step, fraction = (load("averaging.rule=swa", f"averaging.start={text}") for text in ("1", "1.0"))
    assert type(step.averaging.start) is int
    assert type(fraction.averaging.start) is float


@pytest.mark.parametrize("word", ["no", "off", "No", "false"])
def test_unquoted_yaml_false_means_no_where_no_is_a_choice(tmp_path, word):
    text = f"train:\n  mixed_precision: {word}\ntrack:\n  report_to: {word}\naveraging:\n  rule: {word}\n"
    config = load("--config", write(tmp_path, "a.yaml", text))
    assert config.train.mixed_precision == "no"
    assert config.track.report_to == "none"
    assert config.averaging.rule == "none"


def test_yaml_booleans_in_other_text_settings_are_refused_not_turned_into_words(tmp_path):
    path = write(tmp_path, "a.yaml", "track:\n  run_name: no\n  project_name: on\n  report_to: yes\n")
    found = problems(*REQUIRED, "--config", path)
    assert [problem.split(":")[0] for problem in found] == [
        "track.run_name",
        "track.project_name",
        "track.report_to",
    ]
    assert all("quotes" in problem for problem in found)


def test_a_list_of_names_is_refused_with_how_to_write_it(tmp_path):
    path = write(tmp_path, "a.yaml", "model:\n  use_peft: true\n  lora_target_modules: [query, value]\n")
    [problem] = problems(*REQUIRED, "--config", path)
    assert "got the list ['query', 'value']; write names in one text, with commas between them" in problem


def test_text_on_the_command_line_is_kept_as_typed():
    config = load("track.run_name=1e3", "track.project_name=no", "train.output_dir=a=b: c")
    assert (config.track.run_name, config.track.project_name) == ("1e3", "no")
    assert config.train.output_dir == "a=b: c"


@pytest.mark.parametrize("word", ["null", "None"])
def test_null_clears_an_optional_setting(word):
    assert load(f"eval.eval_steps={word}", f"track.run_name={word}").eval.eval_steps is None
    assert load(f"track.run_name={word}").track.run_name is None


def test_all_problems_are_reported_at_once():
    found = problems(
        "train.lerning_rate=1",
        "train.seed=x",
        "averaging.rule=swaa",
        "noise.sigma=-1",
        "--config=/no/such.yaml",
    )
    leaders = {problem.split(":")[0] for problem in found}
    assert leaders == {
        "--config /no/such.yaml",
        "train.lerning_rate",
        "train.seed",
        "averaging.rule",
        "model.model_name_or_path",
        "train.output_dir",
        "data.task_name",
        "noise.sigma",
    }
    assert len(found) == len(leaders)


@pytest.mark.parametrize(
    ("argument", "meant"),
    [
        ("learning_rate=1e-5", "train.learning_rate"),
        ("train.lerning_rate=1", "train.learning_rate"),
        ("train.start=1", None),
        ("optim.learning_rate=1", "train.learning_rate"),
        ("fp16=true", "train.mixed_precision"),
        ("train.warmup_ratio=0.1", "train.warmup_steps"),
        ("per-device-train-batch-size=4", "train.per_device_train_batch_size"),
        ("averagin.start=3", "averaging.start"),
    ],
)
def test_unknown_setting_names_the_one_that_was_meant(argument, meant):
    [problem] = problems(*REQUIRED, argument)
    assert problem.startswith(f"{argument.split('=')[0]}: no such setting (command line).")
    assert meant is None or f"Did you mean '{meant}'?" in problem


def test_bare_hugging_face_flag_names_the_setting():
    [problem] = problems(*REQUIRED, "--learning_rate", "1e-5")
    assert "Did you mean 'train.learning_rate'?" in problem


@pytest.mark.parametrize(
    ("argument", "said"),
    [
        ("train.seed=1.5", "expected int, got the number 1.5"),
        ("train.seed=true", "expected int, got true"),
        ("train.seed=null", "expected int, got null"),
        ("train.learning_rate=fast", "expected float, got the text 'fast'"),
        ("train.gradient_checkpointing=1", "expected true|false, got the number 1"),
        ("averaging.start=[1]", "expected int or float or null, got the list [1]"),
        (
            "averaging.rule=swaa",
            "is 'swaa', expected one of none, swa, ema, lawa, merge,",
        ),
        ("noise.detach=None", "Did you mean 'none'?"),
    ],
)
def test_wrong_type_says_what_was_found_and_expected(argument, said):
    [problem] = problems(*REQUIRED, argument)
    assert problem.startswith(argument.split("=")[0] + ":")
    assert said in problem


def test_short_form_of_a_whole_number_is_taken():
    assert load("train.max_steps=1e3").train.max_steps == 1000


@pytest.mark.parametrize(
    "argv", [["seed=1=", "foo"], ["--train.seed"], ["--train.seed", "--train.max_steps=3"]]
)
def test_arguments_that_are_no_overrides_are_refused(argv):
    assert problems(*REQUIRED, *argv)


@pytest.mark.parametrize(
    "text",
    [
        "- 1\n- 2\n",
        "just words\n",
        "a: [1\n",
        "train: 5\n",
        "train:\n  seed: 1\n  seed: 2\n",
        "extra:\n  a: 1\n",
    ],
)
def test_file_that_is_no_configuration_is_refused(tmp_path, text):
    assert problems(*REQUIRED, "--config", write(tmp_path, "a.yaml", text))


def test_empty_file_and_empty_section_change_nothing(tmp_path):
    empty = write(tmp_path, "a.yaml", "# nothing\n")
    section = write(tmp_path, "b.yaml", "noise:\n  # kind: r3f\n")
    assert load("--config", empty, "--config", section) == load()


ROWS = """
data:
  train_file: old.csv
  validation_file: old_val.csv
  test_file: old_test.csv
  text_column: t
"""


def test_overriding_the_training_file_drops_the_configs_other_splits(tmp_path):
    argv = [
        "model.model_name_or_path=demo",
        "train.output_dir=r",
        "--config",
        write(tmp_path, "a.yaml", ROWS),
    ]
    data = load_config(ClassificationConfig, [*argv, "data.train_file=new.csv"]).data
    assert (data.train_file, data.validation_file, data.test_file, data.text_column) == (
        "new.csv",
        None,
        None,
        "t",
    )
    data = load_config(
        ClassificationConfig, [*argv, "data.train_file=n.csv", "data.validation_file=v.csv"]
    ).data
    assert (data.train_file, data.validation_file, data.test_file) == ("n.csv", "v.csv", None)
    data = load_config(ClassificationConfig, [*argv, "data.validation_file=v.csv"]).data
    assert (data.train_file, data.validation_file, data.test_file) == ("old.csv", "v.csv", "old_test.csv")


def test_a_later_config_with_a_training_file_drops_an_earlier_task(tmp_path):
    task = write(tmp_path, "a.yaml", "data:\n  task_name: mrpc\n")
    files = write(tmp_path, "b.yaml", "data:\n  train_file: new.csv\n")
    rest = ["model.model_name_or_path=demo", "train.output_dir=r"]
    data = load_config(ClassificationConfig, [*rest, "--config", task, "--config", files]).data
    assert (data.task_name, data.train_file) == (None, "new.csv")
    data = load_config(ClassificationConfig, [*rest, "--config", files, "--config", task]).data
    assert (data.task_name, data.train_file) == ("mrpc", None)


def test_values_may_refer_to_other_settings_and_the_environment(monkeypatch):
    monkeypatch.setenv("SCRATCH_SEED", "11")
    config = load(
        "train.output_dir=runs/${data.task_name}-${train.seed}", "train.seed=${oc.env:SCRATCH_SEED}"
    )
    assert config.train.output_dir == "runs/mrpc-11"
    assert config.train.seed == 11
    for text in ("${nowhere.x}", "${"):
        [problem] = problems(*REQUIRED, f"train.output_dir={text}")
        assert problem.startswith(f"train.output_dir: '{text}' cannot be filled in: ")


def test_references_inside_a_mapping_are_filled_in_from_files_and_the_command_line(tmp_path):
    seed = write(tmp_path, "seed.yaml", "train:\n  seed: 3\n")
    rest = ["data.train_file=a.csv", "train.output_dir=r", "--config", seed]
    path = write(tmp_path, "a.yaml", "model:\n  config: {model_type: t5, vocab_size: '${train.seed}'}\n")
    for words in (["--config", path], ["model.config={model_type: t5, vocab_size: ${train.seed}}"]):
        config = load_config(Seq2SeqConfig, [*rest, *words])
        assert config.model.config == {"model_type": "t5", "vocab_size": 3}
    config.model.config |= {"name_or_path": "${a}", "architectures": ["${b}"]}
    again = load_config(Seq2SeqConfig, ["--config", write(tmp_path, "b.yaml", to_yaml(config))])
    assert again == config


def test_a_tilde_is_the_users_home_in_settings_that_name_files(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    config = load("train.output_dir=~/runs", "data.task_name=~", "model.tokenizer_name=~/mine")
    assert (config.train.output_dir, config.model.tokenizer_name) == ("/home/me/runs", "/home/me/mine")
    assert config.data.task_name == "~"


@pytest.mark.parametrize(
    "text",
    ["plain", "no", "null", "1e-5", "a: b # c", "word " * 40, "x\ny", "'q\"", "${a.b}", "\\${a}", "ü", "$"],
)
def test_yaml_reads_back_to_the_same_configuration(tmp_path, text):
    averaging, noise = ("averaging.rule=swa", "averaging.start=1"), ("noise.kind=r3f", "noise.sigma=1e-5")
    config = load(*averaging, "train.warmup_steps=0.25", *noise)
    config.train.output_dir = text
    path = write(tmp_path, "a.yaml", to_yaml(config, {"train.output_dir": "somewhere"}))
    again = load_config(ClassificationConfig, ["--config", path])
    assert again == config
    assert type(again.averaging.start) is int


def test_flatten_holds_every_setting_as_a_scalar():
    flat = flatten(load("train.learning_rate=1e-5"))
    assert flat["train.learning_rate"] == 1e-5
    assert flat["eval.eval_steps"] == "null"
    assert all(isinstance(value, str | int | float | bool) for value in flat.values())
    assert [name.split(".")[0] for name in flat][:: len(flat) - 1] == [
        "model",
        "track",
    ]  # in the order of sections


def test_print_config_shows_origins_and_exits_0(tmp_path, capsys):
    path = write(tmp_path, "task.yaml", "train:\n  seed: 5\n")
    with pytest.raises(SystemExit) as left:
        load("--config", path, "averaging.rule=swa", "--print_config")
    lines = {line.strip() for line in capsys.readouterr().out.splitlines()}
    assert left.value.code == 0
    assert f"seed: 5  # {path}" in lines
    assert "rule: swa  # command line" in lines
    assert "weight_decay: 0.01" in lines


def test_print_config_of_a_faulty_configuration_fails():
    assert problems(*REQUIRED, "--print_config", "train.seed=x")


def test_help_lists_every_setting_with_default_and_doc(capsys):
    with pytest.raises(SystemExit) as left:
        load_config(ClassificationConfig, ["--help"])
    page = capsys.readouterr().out
    assert left.value.code == 0
    for name in flatten(load()):
        assert f"\n  {name}  <" in page
    assert "train.learning_rate  <float>  [default 2e-05]\n      Peak learning rate of AdamW." in page
    assert "model.model_name_or_path  <text>  [required]" in page
    assert max(len(line) for line in page.splitlines()) <= 110


def test_a_setting_may_be_a_mapping_in_a_file_and_on_the_command_line(tmp_path):
    path = write(tmp_path, "a.yaml", "model:\n  config:\n    model_type: t5\n    d_model: 64\n")
    rest = ["data.task_name=e2e", "train.output_dir=runs/x"]
    from_file = load_config(Seq2SeqConfig, ["--config", path, *rest])
    assert from_file.model.config == {"model_type": "t5", "d_model": 64}
    typed = load_config(Seq2SeqConfig, ["model.config={model_type: t5, d_model: 64}", *rest])
    assert typed == from_file
    copy = write(tmp_path, "b.yaml", to_yaml(from_file, {"model.config": path}))
    assert load_config(Seq2SeqConfig, ["--config", copy]) == from_file
    assert flatten(from_file)["model.config"] == '{"model_type": "t5", "d_model": 64}'
    with pytest.raises(ConfigError, match=r"model\.config: expected mapping or null, got the text 't5'"):
        load_config(Seq2SeqConfig, ["model.config=t5", *rest])


def test_help_of_a_section_that_extends_another_has_the_docs_of_both(capsys):
    with pytest.raises(SystemExit):
        load_config(Seq2SeqConfig, ["--help"])
    page = capsys.readouterr().out
    assert "train.learning_rate  <float>  [default 2e-05]\n      Peak learning rate of AdamW." in page
    assert "train.label_smoothing_factor  <float>  [default 0.0]\n      Share of each target" in page
    assert "eval.metric  <text>  [default auto]\n      What to measure on generated texts:" in page


def test_only_the_first_of_several_processes_prints(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(SystemExit):
        load_config(ClassificationConfig, ["--help"])
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("recipe", "name", "meant"),
    [
        (ClassificationConfig, "train.evaluation_strategy", "eval.eval_steps"),
        (ClassificationConfig, "eval.eval_strategy", "eval.eval_steps"),
        (ClassificationConfig, "train.text_column", "data.text_column"),
        (ClassificationConfig, "train.lr", "train.learning_rate"),
        (ClassificationConfig, "train.epochs", "train.num_train_epochs"),
        (Seq2SeqConfig, "data.text_column", "data.source_column"),
        (Seq2SeqConfig, "data.summary_column", "data.target_column"),
    ],
)
def test_a_name_of_hugging_faces_examples_or_a_short_one_leads_to_the_setting(recipe, name, meant):
    with pytest.raises(ConfigError) as caught:
        load_config(recipe, [*REQUIRED, f"{name}=steps"])
    assert caught.value.problems == [f"{name}: no such setting (command line). Did you mean '{meant}'?"]


def test_rows_that_take_the_place_of_others_are_told(tmp_path, caplog):
    task = write(tmp_path, "a.yaml", "data:\n  task_name: mrpc\n")
    rest = ["model.model_name_or_path=demo", "train.output_dir=r", "--config", task]
    caplog.set_level("INFO", "swaft")
    load_config(ClassificationConfig, rest)
    load_config(ClassificationConfig, [*rest, "data.task_name=mrpc"])
    assert caplog.messages == []
    load_config(ClassificationConfig, [*rest, "data.train_file=new.csv"])
    said = f"data.train_file=new.csv (command line) replaces data.task_name=mrpc ({task})"
    assert caplog.messages == [said]


def test_splits_that_go_with_their_training_file_are_told(tmp_path, caplog):
    path = write(tmp_path, "a.yaml", ROWS)
    caplog.set_level("INFO", "swaft")
    argv = [
        "model.model_name_or_path=demo",
        "train.output_dir=r",
        "--config",
        path,
        "data.train_file=new.csv",
    ]
    load_config(ClassificationConfig, argv)
    [said] = caplog.messages
    for dropped in ("train_file=old.csv", "validation_file=old_val.csv", "test_file=old_test.csv"):
        assert f"data.{dropped} ({path})" in said


def test_the_printed_configuration_holds_nothing_else(tmp_path, capsys, caplog):
    path = write(tmp_path, "a.yaml", ROWS)
    caplog.set_level("INFO", "swaft")
    with pytest.raises(SystemExit):
        load("--config", path, "--print_config")
    assert caplog.messages == []
    assert capsys.readouterr().out.startswith("model:")


@pytest.mark.parametrize("flag", ["--help", "--print_config"])
def test_a_reader_that_closes_the_pipe_ends_the_help_without_a_traceback(flag):
    reader, writer = os.pipe()
    os.close(reader)
    imports = "from swaft.training.data.classification import *; from swaft.training.config import *; "
    script = f"{imports}load_config(ClassificationConfig, {[flag, *REQUIRED]})"
    program = subprocess.run(
        [sys.executable, "-c", script], stdout=writer, stderr=subprocess.PIPE, text=True, check=True
    )
    os.close(writer)
    assert not program.stderr

from __future__ import annotations

import math
import sys

import pytest
from soup_folders import folder_of, folders, golden, loaded, random_tensors, same_bits

from swaft.errors import ConfigError, StateError
from swaft.soup import average, average_greedily, choose_greedily, score_by_command
from swaft.soup.soup import command_words

pytestmark = pytest.mark.unit


def test_candidates_are_tried_from_the_best_down_and_stay_if_the_score_gets_no_worse():
    scores = {(0,): 0.5, (1,): 0.9, (2,): 0.7, (3,): 0.8, (1, 3): 0.85, (1, 2): 0.9, (1, 2, 0): 0.95}
    choice = choose_greedily(4, lambda chosen: scores[tuple(chosen)], higher_is_better=True)
    assert choice.chosen == [1, 2, 0]
    assert choice.score == 0.95
    assert choice.alone == [0.5, 0.9, 0.7, 0.8]
    assert choice.trials == [(3, 0.85, False), (2, 0.9, True), (0, 0.95, True)]


def test_lower_scores_are_better_where_that_is_said():
    scores = {(0,): 1.0, (1,): 2.0, (0, 1): 0.5}
    assert choose_greedily(2, lambda c: scores[tuple(c)], higher_is_better=False).chosen == [0, 1]
    scores[(0, 1)] = 1.5
    assert choose_greedily(2, lambda c: scores[tuple(c)], higher_is_better=False).chosen == [0]


@pytest.mark.parametrize("scores", [[math.nan, 0.5, 0.9], [0.5, math.nan, 0.9], [0.5, 0.9, 0.7, math.nan]])
def test_a_score_that_is_no_number_is_refused(scores):
    scores = iter([*scores, 0.0])
    with pytest.raises(StateError, match=r"the score of candidates \[.*\] is not a number"):
        choose_greedily(3, lambda chosen: next(scores), higher_is_better=True)


def test_a_rule_of_checkpoints_that_are_no_averages_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="rule is 'swa', and no checkpoint is a saved state"):
        average(folders(tmp_path, 2), tmp_path / "out", rule="swa")
    assert not (tmp_path / "out").exists()


def test_equal_candidates_are_tried_in_the_order_they_were_named():
    seen = []
    choose_greedily(3, lambda c: seen.append(tuple(c)) or 1.0, higher_is_better=True)
    assert seen == [(0,), (1,), (2,), (0, 1), (0, 1, 2)]


@pytest.mark.parametrize("score", [None, {"accuracy": 1.0}, "high"])
def test_a_score_that_is_not_one_number_is_refused(score):
    with pytest.raises(ConfigError, match=rf"score returned {type(score).__name__}, expected one number"):
        choose_greedily(2, lambda _: score, higher_is_better=True)


def test_a_single_path_is_no_list_of_checkpoints(tmp_path):
    path, *_ = folders(tmp_path, 1)
    for given in (path, str(path)):
        with pytest.raises(ConfigError, match=r"checkpoints is .*in0'; expected a list of folders"):
            average(given, tmp_path / "out")


def test_the_written_folder_is_the_mean_of_the_chosen(tmp_path):
    paths, scored = folders(tmp_path, 3), []

    def score(folder):
        scored.append(folder.name)
        return {"in0": 0.1, "in1": 0.3, "in2": 0.2}.get(folder.name, 0.4 if len(scored) == 4 else 0.0)

    soup, choice = average_greedily(paths, tmp_path / "out", score=score, higher_is_better=True)
    assert scored == ["in0", "in1", "in2", "trial", "trial"]
    assert choice.chosen == [1, 2]
    assert same_bits(loaded(tmp_path / "out"), golden([random_tensors(1), random_tensors(2)]))
    assert soup.sha256 == average([paths[1], paths[2]], tmp_path / "again").sha256
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again", "in0", "in1", "in2", "out"]


def test_a_checkpoint_of_weights_alone_is_scored_with_the_configuration_of_the_base(tmp_path):
    base, *paths = folders(tmp_path, 3)
    for path in paths:  # as accelerate's save_state leaves them
        (path / "config.json").unlink()

    def score(folder):
        assert (folder / "config.json").exists()
        return 1.0

    average_greedily(paths, tmp_path / "out", score=score, higher_is_better=True, base=base)


MISFITS = {
    "a base that is not there": ({"base": "nowhere"}, "nowhere"),
    "a rank for whole models": ({"lora_rank": 4}, "lora_rank is set"),
    "a rule without averages": ({"rule": "swa"}, "rule is 'swa'"),
    "weights for uniform means": ({"weights": [1, 2]}, "expected no weights"),
    "a checkpoint of another model": ({}, "only in the first"),
}


@pytest.mark.parametrize("what", MISFITS)
def test_what_cannot_be_averaged_is_refused_before_the_first_score(tmp_path, what):
    how, message = MISFITS[what]
    paths = folders(tmp_path, 2)
    if not how:
        tensors = random_tensors(2)
        del tensors["layer.bias"]
        paths.append(folder_of(tmp_path / "other", tensors))
    with pytest.raises((StateError, ConfigError), match=message):
        average_greedily(paths, tmp_path / "out", score=pytest.fail, higher_is_better=True, **how)
    assert not (tmp_path / "out").exists()


def test_a_score_that_fails_leaves_nothing(tmp_path):
    paths = folders(tmp_path, 2)

    def score(folder):
        if folder.name == "trial":
            raise StateError("no score")
        return 1.0

    with pytest.raises(StateError, match="no score"):
        average_greedily(paths, tmp_path / "out", score=score, higher_is_better=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in0", "in1"]


def program(text):
    return f"{sys.executable} -c '{text}' {{folder}}"


def test_the_score_is_the_last_line_that_the_command_prints(tmp_path):
    folder = folder_of(tmp_path / "a b", random_tensors(0))
    text = 'import sys, os; print("hello\\n3"); print(len(os.listdir(sys.argv[1]))); print()'
    assert score_by_command(program(text), folder) == 3.0


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (program("import sys; sys.exit(3)"), "ended with exit code 3"),
        (program("pass"), "printed is nothing; expected a number"),
        (program('print("nan")'), "printed is 'nan'; expected a number"),
        (program('print("accuracy 3")'), "printed is 'accuracy 3'; expected a number"),
        ("/nowhere/at-all {folder}", "could not be started: No such file"),
    ],
)
def test_a_command_that_gives_no_score_is_an_error(tmp_path, command, message):
    with pytest.raises(StateError, match=message):
        score_by_command(command, tmp_path)


@pytest.mark.parametrize("command", ["python score.py", "", "{folder}", "python 'x {folder}"])
def test_a_command_that_does_not_say_what_it_scores_is_refused(command):
    with pytest.raises(ConfigError, match="--evaluate"):
        command_words(command)


def test_no_shell_sees_the_name_of_a_folder(tmp_path):
    folder = tmp_path / "a; touch harmed; $(touch harmed)"
    folder.mkdir()
    assert score_by_command(program("import sys; print(len(sys.argv))"), folder) == 2.0

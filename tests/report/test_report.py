from __future__ import annotations

import errno
import json
import os
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest

from swaft.cli.main import main
from swaft.errors import ConfigError
from swaft.report import figures
from swaft.report.compare import compare, difference
from swaft.report.figures import thinned
from swaft.report.page import render
from swaft.report.runs import RunLog, read_run

pytestmark = pytest.mark.unit
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


def recipe_run(folder: Path, *, steps: int = 40, seed: int = 1, gain: float = 0.02) -> Path:
    """A run folder as a recipe writes it, with windows and samples."""
    folder.mkdir(parents=True)
    lines = []
    for step in range(1, steps + 1):
        lines.append(
            {
                "kind": "train",
                "step": step,
                "loss": 1 / step + 0.01 * (step % 7),
                "task_loss": 1 / step,
                "divergence": 1e-3 / step,
                "learning_rate": 1e-4,
                "grad_norm": 1.0 + step % 3,
                "drift": 0.1 * step,
            }
        )
        if step % (steps // 4) == 0:
            for kind in ("last", "averaged"):
                score = 0.8 + gain * (kind == "averaged") + 0.01 * seed
                lines.append(
                    {"kind": f"validation/{kind}", "step": step, "accuracy": score, "loss": 1 - score}
                )
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    scores = {
        kind: {k: v for k, v in lines[-2 + place].items() if k not in ("kind", "step")}
        for place, kind in enumerate(("last", "averaged"))
    }
    tried = [
        {"start": start, "end": end, "members": end - start, "score": 0.8 + start / 1000}
        for start in (10, 20, 30)
        for end in (30, 40)
    ]
    summary = {"metric": "accuracy", "scores": {"validation": scores}, "steps": steps, "windows_tried": tried}
    (folder / "summary.json").write_text(json.dumps(summary))
    (folder / "config.yaml").write_text(f"train:\n  seed: {seed}\n  learning_rate: 0.0001\n")
    (folder / "command.txt").write_text(f"accelerate launch recipe.py train.seed={seed}\n")
    (folder / "samples-test.jsonl").write_text(
        json.dumps({"source": "<b>", "last": "one", "averaged": "two"}) + "\n"
    )
    return folder


def trainer_run(folder: Path) -> Path:
    history = [{"loss": 1.0, "grad_norm": 1.0, "learning_rate": 1e-3, "epoch": 0.5, "step": 2}]
    for step in (2, 4):
        history += [
            {"eval_averaged_loss": 0.5 / step, "eval_averaged_runtime": 1.0, "epoch": 0.5, "step": step},
            {"eval_loss": 0.6 / step, "eval_runtime": 1.0, "eval_samples_per_second": 9.0, "step": step},
        ]
    (folder / "checkpoint-4").mkdir(parents=True)
    state = {"global_step": 4, "max_steps": 4, "log_history": history}
    (folder / "checkpoint-4" / "trainer_state.json").write_text(json.dumps(state))
    return folder


class Page(HTMLParser):
    """Counts tags, and collects whatever would be fetched."""

    def __init__(self, page: str):
        super().__init__()
        self.tags: list[str] = []
        self.fetched: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.fetched += [value or "" for name, value in attributes if name in ("src", "href", "xlink:href")]


def test_the_page_of_a_recipes_run_has_every_figure_and_fetches_nothing(tmp_path):
    page = render([read_run(recipe_run(tmp_path / "run"))])
    found = Page(page)
    assert found.tags.count("svg") == 6 + 2 + 1  # training, evaluations, windows
    assert all(link.startswith(("#", "data:image/png")) for link in found.fetched)
    assert "http" not in re.sub(r'xmlns(:\w+)?="[^"]*"', "", page)
    assert "&lt;b&gt;" in page
    assert "$" not in page  # matplotlib writes the numbers of a logarithmic axis in TeX
    assert "<td>train.seed</td><td>1</td><td>command line</td>" in page
    assert "<td>accuracy *</td><td>0.81</td><td>0.83</td><td>+0.02</td>" in page


def test_the_page_of_a_trainers_run_sets_averaged_scores_beside_the_last(tmp_path):
    run = read_run(trainer_run(tmp_path / "out"))
    assert run.evaluations == {
        "validation": {"loss": {"averaged": [(2, 0.25), (4, 0.125)], "last": [(2, 0.3), (4, 0.15)]}}
    }
    assert run.final == {"validation": {"averaged": {"loss": 0.125}, "last": {"loss": 0.15}}}
    assert Page(render([run])).tags.count("svg") == 1


def test_seeds_are_compared_as_pairs_and_arms_by_the_setting_that_sets_them_apart(tmp_path):
    runs = [read_run(recipe_run(tmp_path / f"a{seed}", seed=seed)) for seed in range(4)]
    other = [recipe_run(tmp_path / f"b{seed}", seed=seed, gain=0.05) for seed in range(4)]
    for folder in other:
        file = folder / "config.yaml"
        file.write_text(file.read_text().replace("0.0001", "0.001"))
    page = render([*runs, *map(read_run, other)])
    assert "train.learning_rate=0.001, averaged − train.learning_rate=0.0001, averaged" in page
    assert "<td>4</td><td>+0.03</td><td>+0.03 to +0.03</td>" in page


def test_a_paired_difference_ignores_what_seeds_share():
    pairs = [(seed + 0.1, seed) for seed in (1.0, 5.0, 9.0)]
    found = difference("a − b", pairs)
    assert found.mean == pytest.approx(0.1)
    assert found.interval == pytest.approx((0.1, 0.1))
    assert difference("a − b", pairs[:2]).interval is None


def test_an_arm_without_averages_is_compared_by_its_last_weights():
    def run(arm: str, **scores: float) -> RunLog:
        final = {"test": {kind: {"loss": value} for kind, value in scores.items()}}
        return RunLog(path=Path(arm), final=final, settings={"train.seed": (1, ""), "arm": (arm, "")})

    found = compare({"a": [run("a", last=2.0)], "b": [run("b", last=3.0, averaged=1.0)]}, "test", "loss")
    assert {each.what: each.mean for each in found} == {
        "averaged − last (b)": -2.0,
        "b, averaged − a, last": -1.0,
    }


@pytest.mark.filterwarnings("error")
def test_a_long_label_leaves_its_figure_room():
    long = difference("data.train_file=rows.csv, " * 20, [(1.0, 2.0)])
    assert "…" in figures.differences("test: loss", [long])


def test_a_long_curve_keeps_its_extremes_as_a_band_around_means_and_its_order():
    points = [(float(step), float(step % 2)) for step in range(10_000)]
    points[4321] = (4321.0, 9.0)
    steps, means, lows, highs = thinned(points)
    assert len(steps) <= 300
    assert max(highs) == 9.0
    assert min(lows) == 0.0
    assert means[0] == pytest.approx(0.5, abs=0.05)
    assert steps == sorted(steps)
    assert thinned(points[:3]) == ([0.0, 1.0, 2.0], [0.0, 1.0, 0.0], [0.0, 1.0, 0.0], [0.0, 1.0, 0.0])


def test_a_run_that_was_killed_is_read_and_says_so(tmp_path):
    folder = recipe_run(tmp_path / "run")
    (folder / "summary.json").unlink()
    lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)[:12]  # one evaluation
    (folder / "metrics.jsonl").write_text("".join(lines) + '{"kind": "train", "st')
    page = render([read_run(folder)])
    assert Page(page).tags.count("svg") == 6 + 2
    assert "<h2>Run</h2>" not in page
    assert "The run has not ended" in page
    assert "The last line of metrics.jsonl is cut off" in page


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (shutil.rmtree, "no folder; expected a run"),
        (lambda folder: (folder / "metrics.jsonl").unlink(), "the run has logged nothing yet"),
        (lambda folder: [each.unlink() for each in folder.iterdir()], "holds neither; expected a run"),
        (lambda folder: (folder / "metrics.jsonl").write_text("3\n{}\n"), "line 1 is not an object"),
        (
            lambda folder: (folder / "summary.json").write_text('{"scores": {"test": {"accuracy": 1}}}'),
            "scores are not by split.*another version",
        ),
        (
            lambda folder: (folder / "summary.json").write_text('{"windows_tried": [{"window": 1}]}'),
            "windows_tried lacks.*another version",
        ),
        (
            lambda folder: (folder / "surface.json").write_text('{"line": {"position": [0, 1]}}'),
            "surface.json: line lacks one of loss, position",
        ),
        (lambda folder: (folder / "config.yaml").write_text("- 1\n"), "holds no sections of settings"),
        (lambda folder: (folder / "summary.json").write_text("[1]"), "holds a list; expected an object"),
        (lambda folder: (folder / "metrics.jsonl").write_text("x\n{}\n"), "line 1 is not JSON"),
    ],
)
def test_what_is_no_run_is_refused_by_name_and_left_alone(tmp_path, damage, message, capsys):
    folder = recipe_run(tmp_path / "run")
    damage(folder)
    before = {each: each.read_bytes() for each in folder.iterdir()} if folder.exists() else {}
    with pytest.raises(ConfigError, match=message):
        read_run(folder)
    assert main(["report", str(folder), "--output", str(tmp_path / "report.html")]) == 1
    assert not (tmp_path / "report.html").exists()
    assert ({each: each.read_bytes() for each in folder.iterdir()} if folder.exists() else {}) == before


def test_settings_of_an_older_version_are_shown_with_the_origins_that_can_be_known(tmp_path):
    folder = recipe_run(tmp_path / "run")
    (folder / "config.yaml").write_text(
        "data:\n  max_seq_length: 128\n  text_column: a\n  of_old: 3\ntrain:\n  seed: 7\n"
    )
    assert read_run(folder).settings == {
        "data.max_seq_length": (128, "default"),
        "data.text_column": ("a", "config file"),
        "data.of_old": (3, "config file"),
        "train.seed": (7, "command line"),
    }


def test_runs_of_one_name_are_told_apart_by_their_folders(tmp_path):
    runs = [read_run(recipe_run(tmp_path / arm / "seed-1")) for arm in ("swa", "none")]
    page = render(runs)
    assert "<summary>swa/seed-1</summary>" in page
    assert "<td>none/seed-1</td>" in page


def test_the_command_writes_the_page_beside_the_run_and_prints_where(tmp_path, capsys):
    folder = recipe_run(tmp_path / "run")
    assert main(["report", str(folder)]) == 0
    assert Path(capsys.readouterr().out.strip()) == folder / "report.html"
    assert main(["report", str(tmp_path / "none")]) == 1
    assert "expected a run" in capsys.readouterr().err


def test_rows_without_a_surface_to_use_them_are_refused(tmp_path, capsys):
    folder = recipe_run(tmp_path / "run")
    assert main(["report", str(folder), "--rows", "8"]) == 1
    assert "--rows 8 is for --surface" in capsys.readouterr().err
    assert not (folder / "report.html").exists()


def test_the_page_of_a_run_of_ten_thousand_steps_is_under_3_megabytes(tmp_path):
    assert len(render([read_run(recipe_run(tmp_path / "run", steps=10_000))])) < 3_000_000


@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed (apt-get install chromium)")
@pytest.mark.parametrize(
    ("size", "dark"), [((1200, 2000), False), ((400, 2000), True)], ids=["desk", "dark phone"]
)
def test_a_browser_draws_a_run_of_ten_thousand_steps_within_a_second(tmp_path, size, dark):
    page = tmp_path / "report.html"
    page.write_text(render([read_run(recipe_run(tmp_path / "run", steps=10_000))]))
    script = tmp_path / "measured.html"
    # What the page needs until it is laid out, and what is wider than it, as the browser itself says.
    script.write_text(
        page.read_text()
        + "<script>addEventListener('load', () => { const [nav] = performance.getEntriesByType('navigation');"
        "document.title = JSON.stringify({ms: nav.domComplete, figures: document.querySelectorAll('svg').length,"
        "drawn: [...document.querySelectorAll('svg')].filter(s => s.getBoundingClientRect().width > 50).length,"
        "ground: getComputedStyle(document.body).backgroundColor,"
        "wide: document.documentElement.scrollWidth - innerWidth}) })</script>"
    )
    options = ["--headless", "--no-sandbox", "--disable-gpu", f"--window-size={size[0]},{size[1]}"]
    options += ["--blink-settings=preferredColorScheme=0"] if dark else []
    done = subprocess.run(
        [str(CHROMIUM), *options, "--enable-logging=stderr", "--dump-dom", script.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert "CONSOLE" not in done.stderr
    title = re.search(r"<title>(\{.*?\})</title>", done.stdout)
    assert title, done.stdout[:500]
    found = json.loads(title[1])
    assert found["figures"] == found["drawn"] == 9
    assert found["ms"] < 1000
    assert found["ground"] == ("rgb(21, 24, 27)" if dark else "rgb(255, 255, 255)")
    assert found["wide"] <= 0


def test_a_run_without_scores_yet_is_named_and_the_others_are_compared(tmp_path):
    unfinished = recipe_run(tmp_path / "waiting")
    (unfinished / "summary.json").unlink()
    runs = [
        read_run(each)
        for each in (unfinished, recipe_run(tmp_path / "a"), recipe_run(tmp_path / "b", seed=2))
    ]
    comparison = render(runs).split("</section>")[0]
    assert "without scores yet: waiting" in comparison
    assert comparison.count("<td>accuracy</td>") == 2
    assert "nothing to compare" in render(runs[:2])


def test_metrics_of_the_trainer_that_are_no_numbers_are_left_out(tmp_path):
    run = trainer_run(tmp_path / "out")
    file = run / "checkpoint-4" / "trainer_state.json"
    state = json.loads(file.read_text())
    state["log_history"][-1] |= {
        "eval_each": [0.5, 0.25], "eval_words": "good", "eval_none": None, "eval_ok": True,
    }  # fmt: skip
    file.write_text(json.dumps(state))
    read = read_run(file)  # named by the file itself
    assert read.path == file.parent
    assert read.final == {"validation": {"averaged": {"loss": 0.125}, "last": {"loss": 0.15}}}
    render([read])


def test_lines_of_samples_end_at_their_end_alone(tmp_path):
    run = recipe_run(tmp_path / "run")
    text = json.dumps({"source": "a\u2028b\u0085c"}, ensure_ascii=False) + "\n"
    (run / "samples-test.jsonl").write_text(text, encoding="utf-8")
    assert read_run(run).samples == {"test": [{"source": "a\u2028b\u0085c"}]}


def test_a_trainers_latest_state_is_that_of_the_latest_step(tmp_path):
    run = trainer_run(tmp_path / "out")
    late = run / "checkpoint-4" / "trainer_state.json"
    early = run / "checkpoint-2" / "trainer_state.json"
    early.parent.mkdir()
    early.write_text(
        json.dumps(json.loads(late.read_text()) | {"global_step": 2})
    )  # written last, as by a copy
    assert read_run(run).facts["global_step"] == 4


def test_an_evaluation_after_a_trainers_last_checkpoint_is_read(tmp_path):
    run = trainer_run(tmp_path / "out")
    state = json.loads((run / "checkpoint-4" / "trainer_state.json").read_text())
    state["log_history"].append({"eval_loss": 0.125, "step": 4})
    (run / "trainer_state.json").write_text(json.dumps(state))  # by trainer.save_state(), at the same step
    assert read_run(run).final["validation"]["last"] == {"loss": 0.125}


def test_a_run_of_somebody_else_is_an_error_that_says_so(tmp_path, monkeypatch):
    run = recipe_run(tmp_path / "run")

    def refuse(path):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr(Path, "is_file", refuse)
    with pytest.raises(ConfigError, match=r"run cannot be read: .*Permission denied"):
        read_run(run)


def test_scores_of_a_recipe_that_are_no_numbers_are_left_out(tmp_path):
    runs = [recipe_run(tmp_path / name) for name in ("a", "b")]
    summary = json.loads((runs[0] / "summary.json").read_text())
    summary["scores"]["validation"]["last"]["own"] = "nan"
    (runs[0] / "summary.json").write_text(json.dumps(summary))
    assert "own" not in read_run(runs[0]).final["validation"]["last"]
    render([read_run(run) for run in runs])


def test_blends_of_one_window_are_drawn_beside_the_windows_and_not_over_them(tmp_path, monkeypatch):
    run = recipe_run(tmp_path / "run")
    summary = json.loads((run / "summary.json").read_text())
    windows = [{**each, "blend": 1.0} for each in summary["windows_tried"]]
    blends = [{**windows[0], "blend": blend, "score": blend} for blend in (0.3, 1.5)]
    summary["windows_tried"] = [*windows, *blends]
    (run / "summary.json").write_text(json.dumps(summary))
    drawn = {}
    monkeypatch.setattr(figures, "heat_map", lambda title, rows, *_: drawn.update({title: rows}) or "")
    render([read_run(run)])
    assert drawn == {
        "Score of every window tried": windows,
        "Score of every blend tried": [windows[0], *blends],
    }


def test_runs_of_the_trainer_in_folders_of_one_name_are_told_apart(tmp_path):
    page = render([read_run(trainer_run(tmp_path / name)) for name in ("a/out", "b/out", "c/1/s", "d/1/s")])
    for name in ("a/out", "b/out", "c/1/s", "d/1/s"):
        assert f"<td>run={name}</td>" in page


def test_names_in_figures_are_text(tmp_path):
    run = RunLog(path=tmp_path, evaluations={'"><i>$x_{': {"f": {"last": [(1, 0.5), (2, 0.25)]}}})
    page = render([run])
    assert "<i>" not in page
    assert "$x_{" in page

"""The one call for a card, with stand-ins: one too small, one of another kind, a machine without packages."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
import zipfile
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch

from benchmarks import command
from benchmarks.deadline import within
from benchmarks.environment import environment
from benchmarks.gpu import __main__ as gpu
from benchmarks.gpu import flagship
from benchmarks.gpu.__main__ import Part, importable, parts, run_part, side_by_side
from benchmarks.gpu.prediction import predictions
from benchmarks.gpu.wheels import pinned, unpack

pytestmark = pytest.mark.unit
ROOT = Path(__file__).parents[2]
THERE = dict.fromkeys(gpu.NEEDED, "1.0")

WITHOUT_KIT = """
import sys
class Without:
    def __init__(self, finder):
        self.finder = finder
    def __getattr__(self, name):
        return getattr(self.finder, name)
    def find_spec(self, name, path=None, target=None):
        absent = name.partition(".")[0] in ABSENT
        return None if absent else self.finder.find_spec(name, path, target)
ABSENT = ("datasets", "omegaconf", "deepspeed", "peft", "trl", "pyarrow", "setuptools", "liger_kernel")
sys.meta_path[:] = map(Without, sys.meta_path)
import pytest, runpy
import benchmarks.averaging_gpu, benchmarks.fused_loss
for name, out in (("probes", sys.argv[1]), ("flagship", sys.argv[2])):
    sys.argv = [name, out, "--quick"]
    runpy.run_module(f"benchmarks.gpu.{name}", run_name="__main__")
sys.exit(pytest.main(["--collect-only", "-q", "-p", "no:cacheprovider", "tests/gpu"]))
"""


def test_all_parts_begin_from_a_source_tree_without_what_recipes_need(tmp_path):
    out = [str(tmp_path / f"{name}.json") for name in ("probes", "flagship")]
    subprocess.run([sys.executable, "-c", WITHOUT_KIT, *out], cwd=ROOT, check=True)
    probes, found = (json.loads(Path(path).read_text()) for path in out)
    assert probes["averaging 100,000"]["event ms"] > 0
    assert probes["loss (32, 16, 200)"]["ms"] > 0
    assert set(found["averaging"]["ratio to a bare step"]) >= {"without", "every 1", "every 10"}
    assert found["averaging"]["bytes copied an event"] == 0  # on a CPU the weights lie on the host
    assert all(found[name]["seconds a step"] > 0 for name in flagship.RUNS)


def quiet(part: Part, out: Path, *, until: float = float("inf"), packages=THERE):
    return run_part("x", part, out, dict(os.environ), packages, until=until, dry=False)


def test_a_part_whose_package_is_missing_or_broken_is_skipped_by_name(tmp_path):
    (tmp_path / "broken.py").write_text("raise ImportError('numpy 2.5 is too new')")
    path = os.environ | {"PYTHONPATH": str(tmp_path)}
    packages = importable(("json", "no_such_package", "broken"), path)
    assert packages == {
        "json": "2.0.9",
        "no_such_package": "missing",
        "broken": "does not import: ImportError: numpy 2.5 is too new",
    }
    part = Part(10, ("-c", "raise SystemExit(1)"), needs=("no_such_package", "broken", "json"))
    found = quiet(part, tmp_path, packages=THERE | packages)
    assert found == {"skipped": f"no_such_package: missing; broken: {packages['broken']}"}


def test_a_part_past_its_limit_is_ended_and_what_it_had_found_is_kept(tmp_path, monkeypatch):
    found_one = "from benchmarks.deadline import within; within('first', 0, lambda: {'a': 1})"
    endless = f"{found_one}; import time; time.sleep(99)"
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    assert quiet(Part(10, ("-c", endless)), tmp_path, until=0.0)["skipped"].startswith("out of time")
    found = quiet(Part(15, ("-c", endless)), tmp_path)
    assert (found["exit code"], found["ended"]) == (-9, "at its limit of 15 s")
    assert json.loads((tmp_path / "partial.jsonl").read_text()) == {"name": "first", "found": {"a": 1}}


def test_every_part_names_files_that_exist_and_all_of_them_fit_into_eight_minutes(tmp_path):
    known = parts(tmp_path)
    for part in known.values():
        for word in part.words:
            assert not word.startswith("tests/") or (ROOT / word.partition("::")[0]).is_file()
    tested_files = {word for part in known.values() for word in part.words if word.startswith("tests/gpu")}
    there = {f"tests/gpu/{path.name}" for path in (ROOT / "tests" / "gpu").glob("test_*.py")}
    assert there <= tested_files
    groups = side_by_side([name for name in known if name != "sanitizer"], known)
    assert groups[0] == ["tests of averaging", "tests of the loss", "tests of DeepSpeed"]
    assert sum(max(known[name].limit_s for name in group) for group in groups) <= 480
    assert side_by_side(["tests of DeepSpeed", "probes"], known) == [["tests of DeepSpeed"], ["probes"]]


def test_the_call_runs_the_parts_lists_the_packages_and_says_whether_one_failed(
    tmp_path, monkeypatch, capsys
):
    known = {
        "good": Part(30, ("-c", ""), ("-c", "import os; print(os.environ['CUDA_VISIBLE_DEVICES'] == '')")),
        "beside": Part(30, ("-c", ""), ("-c", "raise SystemExit(3)"), beside=True),
        "of a card": Part(30, ("-c", "")),
    }
    monkeypatch.setattr(gpu, "parts", lambda out: known)
    monkeypatch.setattr(gpu, "USED", gpu.NEEDED)
    monkeypatch.setattr(sys, "argv", ["gpu", "--dry", "--out", str(tmp_path)])
    assert gpu.main() == 1
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["card"] == "none"
    assert summary["packages"]["torch"] == torch.__version__
    assert [summary["parts"][name].get("exit code") for name in known] == [0, 3, None]
    assert summary["parts"]["of a card"] == {"skipped": "needs a card"}
    assert (tmp_path / "good.log").read_text() == "True\n"
    assert "torch" in capsys.readouterr().out


def called(monkeypatch, out: Path, known: dict[str, Part], *words: str, **packages: str) -> int:
    """Run the call with these parts, and packages in this state."""
    monkeypatch.setattr(gpu, "parts", lambda _: known)
    monkeypatch.setattr(gpu, "importable", lambda *_: THERE | packages)
    monkeypatch.setattr(sys, "argv", ["gpu", "--out", str(out), *words])
    return gpu.main()


def test_without_a_card_the_call_says_so_and_runs_nothing(tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        called(monkeypatch, tmp_path, {"x": Part(30, ("-c", ""))}, card="none")
    assert "torch sees no CUDA device here; expected one, or --dry" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_call_of_which_no_part_ran_has_failed(tmp_path, monkeypatch, capsys):
    assert called(monkeypatch, tmp_path, {"x": Part(30, ("-c", ""))}, torch="missing") == 1
    assert "{'skipped': 'torch: missing'}" in capsys.readouterr().out


def test_a_call_that_is_ended_leaves_nothing_running(tmp_path, monkeypatch):
    begun = tmp_path / "begun"
    forking = f"import os, pathlib, time; os.fork(); pathlib.Path({str(begun)!r}).touch(); time.sleep(60)"
    part = Part(60, ("-c", forking))

    def end() -> None:
        while not begun.exists():
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    before = {each: signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)}
    threading.Thread(target=end, daemon=True).start()
    began = time.monotonic()
    try:
        with pytest.raises(SystemExit) as ended:
            called(monkeypatch, tmp_path / "out", {"first": Part(30, ("-c", "")), "x": part}, card="one")
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert ended.value.code == 128 + signal.SIGTERM
    assert time.monotonic() - began < 30
    assert not psutil.Process().children(recursive=True)
    assert list(json.loads((tmp_path / "out" / "summary.json").read_text())["parts"]) == ["first"]


def test_wheels_are_unpacked_where_there_is_no_pip(tmp_path):
    with zipfile.ZipFile(tmp_path / "carried-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("carried/__init__.py", "__version__ = '1.0'")
    assert unpack(tmp_path, tmp_path / "site") == ["carried-1.0-py3-none-any.whl"]
    assert importable(("carried",), os.environ | {"PYTHONPATH": str(tmp_path / "site")}) == {"carried": "1.0"}
    assert pinned("pydantic_core").startswith("pydantic_core==")
    with pytest.raises(FileNotFoundError, match=r"holds no wheel; expected those of python -m"):
        unpack(tmp_path / "site", tmp_path)


def test_what_is_out_of_time_is_recorded_as_skipped(monkeypatch):
    monkeypatch.setenv("SWAFT_BENCH_UNTIL", "0")
    assert "out of time" in str(within("x", 1.0, dict)["skipped"])


def too_large(*_, **__):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB.\nmore about it")


SMALL_CARD = {"skipped": "does not fit on this card: CUDA out of memory. Tried to allocate 20 GiB."}


def test_a_card_too_small_for_a_section_skips_it_and_the_others_run(tmp_path, capsys):
    sections = {
        "large": SimpleNamespace(measure=too_large, rows=None),
        "small": SimpleNamespace(measure=lambda **_: {"ms": 1.0}, rows=lambda found: [("ms", found["ms"])]),
    }
    words = ["--quick", "--out", str(tmp_path / "found.json")]
    command.run("x", sections, words, about="")
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["large"]["skipped"] == SMALL_CARD["skipped"]
    assert found["small"]["ms"] == 1.0
    assert "does not fit on this card" in capsys.readouterr().out


def test_a_card_too_small_for_whole_logits_still_has_the_other_runs(tmp_path, monkeypatch):
    whole = flagship.peak_and_time
    calls = iter([whole, whole, too_large])
    monkeypatch.setattr(flagship, "peak_and_time", lambda *a: next(calls)(*a))
    flagship.main(tmp_path / "found.json", quick=True)
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["R3F on whole logits"] == SMALL_CARD
    assert found["R3F, fused"]["seconds a step"] > 0


def test_a_batch_grows_until_it_does_not_fit_or_no_time_is_left(monkeypatch):
    def stepping(sentences):
        return too_large if sentences > 16 else lambda: None

    monkeypatch.setattr(flagship, "peak_of", lambda step, device: step())
    found = flagship.sentences_that_fit(stepping, 4, "a card")
    assert found == {"peak bytes by sentences": {"4": None, "8": None, "16": None}, "do not fit": 32}
    monkeypatch.setattr(flagship, "seconds_left", lambda: 5.0)
    assert flagship.sentences_that_fit(stepping, 4, "a card")["not tried"] == 8


def test_a_card_too_small_for_the_flagship_model_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(flagship, "make_model", too_large)
    flagship.main(tmp_path / "found.json", quick=True)
    assert "do not fit on this card" in json.loads((tmp_path / "found.json").read_text())["skipped"]


def test_what_was_predicted_is_printed_beside_what_was_measured():
    plan = json.loads(flagship.PLAN.read_text())
    assert (plan["model"], tuple(plan["batch"])) == (flagship.T5_3B, flagship.BATCH)
    found = {name: {"peak bytes on the device": 5e10} for name in flagship.RUNS}
    found["R3F on whole logits"] = SMALL_CARD
    found |= {"predicted by swaft plan": plan["runs"], "averaging": {"host bytes": 1.7e10}}
    table = flagship.beside(found)
    predicted = plan["runs"]["plain step"]["bytes on the device"] / 1e9
    assert table[1].split() == ["plain", "step", f"{predicted:.1f}", "50.0"]
    assert "does not fit" in table[3]
    assert table[4].split()[-1] == "17.0"
    assert 45 < predicted < 80  # 4 fp32 numbers a weight, and less than the smallest card it is meant for


def test_every_run_of_the_flagship_is_planned_and_the_averages_are_the_same_in_all():
    runs = predictions(flagship.TINY, flagship.TINY_BATCH)["runs"]
    assert list(runs) == list(flagship.RUNS)
    assert all(
        run["bytes on the device"] == max(sum(p.values()) for p in run["by phase"].values())
        for run in runs.values()
    )
    assert len({run["host bytes of averages"] for run in runs.values()}) == 1


@pytest.mark.slow
def test_the_prediction_on_file_is_that_of_the_planner_as_it_is():
    planned = json.dumps(predictions(flagship.T5_3B, flagship.BATCH))
    assert json.loads(planned) == json.loads(flagship.PLAN.read_text())


def test_a_card_of_another_kind_is_named_with_its_memory_and_capability(monkeypatch):
    card = SimpleNamespace(name="NVIDIA L4", total_memory=24e9, major=8, minor=9)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda: card)
    assert environment()["gpu"] == "NVIDIA L4, 24 GB, capability 8.9"

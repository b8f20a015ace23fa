"""Records what the recipes come to, to the bit, so that rebuilt code can be held to what the code before came to.

    python tests/golden/golden.py record before.json              30 runs; 10 minutes on 2 quiet cores
    ...
    python tests/golden/golden.py record after.json zero3         only those whose names hold one of the words
    python tests/golden/golden.py compare before.json after.json  "the same", or which run and which file differ

Every recipe is launched as a user does under every engine on CPU ranks, once straight through, and once killed with
SIGKILL after its first checkpoint and started again. Of each run the SHA-256 of every file of weights is recorded,
and all of metrics.jsonl but times. A run that was killed has to come to what the unbroken one comes to.

What is recorded depends on the launch line and the run folder alone; of swaft nothing is imported, of its tests the
small inputs. Bits hold on one machine with one set of versions, so both recordings of a comparison are made there,
and belong into no repository. A recording that was broken off is continued.

Exit code: 0; 1 where something differs, or a run failed.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests" / "recipes"))

from tiny_inputs import save_model, save_rows  # noqa: E402
from tiny_questions import save_questions, save_reader  # noqa: E402
from tiny_texts import NEW_MODEL, save_pairs  # noqa: E402

ENGINES = {
    "plain": "single.yaml",
    "ddp": "ddp_cpu.yaml",
    "zero2": "zero2_cpu.yaml",
    "zero3": "zero3_cpu.yaml",
    "fsdp2": "fsdp2_cpu.yaml",
}
"""Launch file by the name that the engine has here."""
COMMON = (
    "train.max_steps=12",
    "train.save_steps=4",
    "train.logging_steps=2",
    "train.per_device_train_batch_size=4",
    "train.gradient_accumulation_steps=2",
    "eval.per_device_eval_batch_size=8",
    "eval.eval_steps=6",
    "averaging.start=0.25",
)
SETTINGS = {
    "classification": (
        *("train.learning_rate=5e-3", "averaging.rule=swa", "eval.keep_best=either"),
        *("noise.kind=r4f", "noise.preset=relative", "noise.sigma=0.5", "noise.weight=100"),
    ),
    "question_answering": (
        *("train.learning_rate=5e-3", "averaging.rule=ema", "averaging.decay=0.999"),
        *("noise.kind=rdrop", "noise.weight=10"),
    ),
    "seq2seq": (
        *("train.learning_rate=2e-2", "averaging.rule=swa", "eval.metric=chrf", "eval.max_new_tokens=8"),
        *("noise.kind=r3f", "noise.preset=relative", "noise.sigma=0.5", "noise.weight=10"),
    ),
}
"""What each recipe is set to; the divergence is weighed so that it moves the weights."""
ROWS = {"train": 45, "validation": 11}
"""45 rows fill no whole step at the end of a pass, whatever the number of ranks."""
FOLDERS = ("final", "final-averaged", "best")
WEIGHTS = ("*.safetensors", "*.safetensors.index.json")
MOST_SECONDS = 600
CODE = ("swaft", "recipes", "launch", "ds_configs")
"""Folders of what a launch runs."""
PACKAGES = ("torch", "transformers", "accelerate", "deepspeed", "datasets", "numpy", "numba", "safetensors")


@dataclass(frozen=True)
class Run:
    """One run that is recorded."""

    recipe: str
    engine: str
    is_killed: bool

    @property
    def name(self) -> str:
        return f"{self.recipe}-{self.engine}-{'resumed' if self.is_killed else 'straight'}"


RUNS = [Run(recipe, engine, killed) for engine in ENGINES for recipe in SETTINGS for killed in (False, True)]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True, dest="command")
    recording = commands.add_parser("record")
    recording.add_argument("output", type=Path)
    recording.add_argument("words", nargs="*", help="record runs whose names hold one of these words")
    comparing = commands.add_parser("compare")
    comparing.add_argument("before", type=Path)
    comparing.add_argument("after", type=Path)
    options = parser.parse_args()
    if options.command == "compare":
        return compare(*(json.loads(path.read_text()) for path in (options.before, options.after)))
    wanted = [run for run in RUNS if not options.words or any(word in run.name for word in options.words)]
    return record(options.output, wanted)


def record(output: Path, wanted: Sequence[Run]) -> int:
    """Make those of the runs that the recording lacks, and write it anew after each."""
    folder = Path(tempfile.mkdtemp(prefix="golden-"))
    made_with = conditions() | {"inputs": save_inputs(folder)}
    recording: dict[str, Any] = {"made_with": made_with, "runs": {}}
    if output.exists():
        recording = json.loads(output.read_text())
        for what, then in recording["made_with"].items():
            if what != "commit" and then != (now := made_with.get(what)):
                sys.exit(f"{output} was recorded with {what} {then}, and here it is {now}; name another file")
    runs = recording["runs"]
    for run in wanted:
        if run.name in runs:
            continue
        began = time.monotonic()
        runs[run.name] = outcome(launched(run, folder))
        print(f"{run.name:<36} {time.monotonic() - began:5.1f} s", flush=True)
        written = output.with_name(f"{output.name}.new")
        written.write_text(json.dumps(recording, indent=1) + "\n")
        written.replace(output)
    broken = [
        f"{run.name}: {difference}: not what the unbroken run came to"
        for run in wanted
        if run.is_killed and (unbroken := runs.get(Run(run.recipe, run.engine, False).name))
        for difference in differences(unbroken, runs[run.name])
    ]
    print("\n".join(broken or [f"{output}: {len(runs)} runs"]))
    shutil.rmtree(folder)
    return 1 if broken else 0


def compare(before: Mapping[str, Any], after: Mapping[str, Any]) -> int:
    """Print what differs between two recordings, or that nothing does."""
    for what, then in before["made_with"].items():
        if what not in ("commit", "code") and then != (now := after["made_with"].get(what)):
            print(f"recorded with other {what}, so bits may differ: {then} and {now}")
    both = [name for name in before["runs"] if name in after["runs"]]
    found = [
        f"{name}: {difference}"
        for name in both
        for difference in differences(before["runs"][name], after["runs"][name])
    ]
    alone = len({*before["runs"], *after["runs"]}) - len(both)
    print("\n".join(found or [f"the same: {len(both)} runs"]))
    if alone:
        print(f"not compared: {alone} runs that one of the recordings lacks")
    return 1 if found or not both else 0


def differences(before: Mapping[str, Any], after: Mapping[str, Any]) -> Iterator[str]:
    """Yield the file, and of metrics.jsonl the first line, in which two outcomes differ."""
    for file in sorted({*before["weights"], *after["weights"]}):
        then, now = (each["weights"].get(file) for each in (before, after))
        if then != now:
            yield f"{file} " + (
                "is missing" if now is None else "is new" if then is None else "has other bits"
            )
    lines = zip(before["metrics"], after["metrics"], strict=False)
    for number, (then, now) in enumerate(lines, start=1):
        if then != now:
            # A number that was not logged before is no difference.
            names = [name for name in then if then[name] != now.get(name)]
            if names:
                changed = ", ".join(f"{name} {then[name]} -> {now.get(name)}" for name in names)
                yield f"metrics.jsonl, line {number}: {changed}"
                return
    if len(before["metrics"]) != len(after["metrics"]):
        yield f"metrics.jsonl has {len(after['metrics'])} lines, and had {len(before['metrics'])}"


def launched(run: Run, folder: Path) -> Path:
    """Launch a run, to its end or to its death and then to its end; return its folder."""
    output = folder / run.name
    words = [
        *(sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--main_process_port", "0"),
        *("--config_file", str(ROOT / "launch" / "accelerate" / ENGINES[run.engine])),
        str(ROOT / "recipes" / f"{run.recipe}.py"),
        *("--config", str(folder / f"{run.recipe}.yaml"), f"train.output_dir={output}"),
        *(*COMMON, *SETTINGS[run.recipe]),
    ]
    environ = {name: value for name, value in os.environ.items() if not name.startswith("ACCELERATE_")}
    environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    environ["PYTHONPATH"] = str(ROOT)
    for attempt in ("killed", "finished") if run.is_killed else ("finished",):
        log = folder / f"{run.name}-{attempt}.log"
        with log.open("w") as file:
            process = subprocess.Popen(
                words, cwd=ROOT, env=environ, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
            )
            if attempt == "killed":
                kill_after_checkpoint(process, output)
            try:
                process.wait(MOST_SECONDS)
            except subprocess.TimeoutExpired:
                kill(process)
        if (output / "summary.json").exists() != (attempt == "finished"):
            told = (
                "finished before it was killed"
                if attempt == "killed"
                else f"failed with {process.returncode}"
            )
            sys.exit(f"{run.name} {told}; see {log}")
    return output


def kill_after_checkpoint(process: subprocess.Popen[bytes], output: Path) -> None:
    """Kill a run when its first checkpoint is complete."""
    while process.poll() is None and not any(output.glob("checkpoint-*/COMPLETE")):
        time.sleep(0.005)
    kill(process)


def kill(process: subprocess.Popen[bytes]) -> None:
    """End all processes of a launch with SIGKILL, the ranks first: a launcher that is gone sends them SIGTERM."""
    launcher = psutil.Process(process.pid)
    for each in (*launcher.children(recursive=True), launcher):
        try:
            each.kill()
        except psutil.NoSuchProcess:
            continue


def outcome(output: Path) -> dict[str, Any]:
    """What is recorded of a run."""
    files = sorted(file for folder in FOLDERS for name in WEIGHTS for file in (output / folder).glob(name))
    lines = (output / "metrics.jsonl").read_text().splitlines()
    return {
        "weights": {str(file.relative_to(output)): sha256(file.read_bytes()).hexdigest() for file in files},
        "metrics": [without_times(json.loads(line)) for line in lines],
    }


def without_times(record: Mapping[str, Any]) -> dict[str, Any]:
    """A line of metrics.jsonl but for what depends on how fast the machine is."""
    return {name: value for name, value in record.items() if "second" not in name}


def save_inputs(folder: Path) -> str:
    """Write models, data and a configuration for each recipe; return the hash of models and data."""
    places = {recipe: folder / recipe for recipe in SETTINGS}
    for place in places.values():
        place.mkdir()
    models = {
        "classification": f"model_name_or_path: {save_model(places['classification'] / 'model')}",
        "question_answering": f"model_name_or_path: {save_reader(places['question_answering'] / 'model')}",
        "seq2seq": f"config: {NEW_MODEL}, vocab_size: 320",
    }
    writers = {"classification": save_rows, "question_answering": save_questions, "seq2seq": save_pairs}
    lengths = {
        "classification": "max_seq_length: 16",
        "question_answering": "max_seq_length: 20, doc_stride: 6",
        "seq2seq": "max_source_length: 16, max_target_length: 16",
    }
    for recipe, place in places.items():
        ending = "jsonl" if recipe == "question_answering" else "csv"
        for seed, (split, count) in enumerate(ROWS.items(), start=1):
            writers[recipe](place / f"{split}.{ending}", count, seed=seed)
        files = ", ".join(f"{split}_file: {place / f'{split}.{ending}'}" for split in ROWS)
        settings = f"model: {{{models[recipe]}}}\ndata: {{{files}, {lengths[recipe]}}}\n"
        (folder / f"{recipe}.yaml").write_text(settings)
    return hash_of(*places.values())


def conditions() -> dict[str, Any]:
    """What a recording is made with: the code, the versions, the machine."""
    processor = [
        line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")
    ]
    commit = subprocess.run(["git", "-C", str(ROOT), "rev-parse", "HEAD"], capture_output=True, text=True)
    return {
        "commit": commit.stdout.strip(),
        "code": hash_of(*(ROOT / name for name in CODE)),
        "versions": {"python": platform.python_version()}
        | {name: metadata.version(name) for name in PACKAGES},
        "machine": [platform.node(), platform.platform(), *processor],
        "settings": {recipe: [*COMMON, *settings] for recipe, settings in SETTINGS.items()},
    }


def hash_of(*folders: Path) -> str:
    """One hash of all files in some folders but what Python has compiled."""
    hashed = sha256()
    for folder in folders:
        for file in sorted(folder.rglob("*")):
            if file.is_file() and "__pycache__" not in file.parts:
                name = f"{folder.name}/{file.relative_to(folder)}"
                hashed.update(f"{name} {sha256(file.read_bytes()).hexdigest()}\n".encode())
    return hashed.hexdigest()


if __name__ == "__main__":
    sys.exit(main())

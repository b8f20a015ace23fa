"""Files in the style of other projects: what `validate` passes starts, and what cannot start is refused.

Written anew after launch and DeepSpeed files that axolotl, LLaMA-Factory, ms-swift, FastChat, TRL, accelerate and
the docs of Hugging Face ship; the names say whose style it is.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from launching import launch, launch_several

from swaft.training.launch.deepspeed_extension import use_environment
from swaft.training.launch.launcher import read_launch
from swaft.training.planning.preflight import Preflight, check_run

pytestmark = [pytest.mark.recipe, pytest.mark.usefixtures("launched_by_nothing")]

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
FILES = {path.stem: path for path in sorted((HERE / "files_of_others").iterdir())}
REFUSED = {
    "axolotl_zero1_torch_compile": ["compile.disable, which DeepSpeed", "compile.backend, which DeepSpeed"],
    "llama_factory_z2_autotp": ["tensor_parallel.autotp_size > 1, which swaft does not train with"],
    "llama_factory_z3_alst": ["bf16.auto_cast, which DeepSpeed", "bf16.loss_scale, which DeepSpeed"],
    "llama_factory_fsdp2_layers": [
        "Could not find the transformer layer class Qwen3DecoderLayer in the model. Expected some of"
    ],
    "trl_context_parallel": ["the launcher asks for parallelism_config"],
    "accelerate_fsdp": ["the launcher asks for FSDP version 1"],
}
"""By file, what is said of it."""
NEEDS_GPU = ("accelerate_zero2",)  # fp16
STARTS = [name for name in FILES if name not in (*REFUSED, *NEEDS_GPU)]
SAMPLE = [
    "axolotl_zero3_bf16",
    "hugging_face_docs_zero3",
    "llama_factory_fsdp2_offload",
    "trl_fsdp2",
    "trl_zero3",
]
SAID = {
    "hugging_face_docs_zero3": "WarmupLR: train.lr_scheduler_type and train.warmup_steps set the rate",
    "llama_factory_z0": "DeepSpeed has no setting of that name",
    "trl_fsdp2": "fsdp_cpu_ram_efficient_loading: every rank loads the whole model",
    "axolotl_zero2": "auto -> mixed precision",
}
"""By file, a line of the run that says how it was taken."""
ENGINES = {
    "trl_multi_gpu": "ddp",
    "trl_fsdp2": "fsdp2",
    "llama_factory_fsdp2_offload": "fsdp2",
    "trl_zero3": "deepspeed-zero3",
}
"""What starts by a file that is no DeepSpeed file."""


def words(name: str) -> list[str]:
    """How a launch line names the file, on two ranks."""
    path = FILES[name]
    how = ["--use_deepspeed", "--deepspeed_config_file"] if path.suffix == ".json" else ["--config_file"]
    return [*how, str(path), "--num_processes", "2", "recipes/classification.py"]


def settings(inputs: Path, output: Path) -> list[str]:
    few = (
        "train.max_steps=2",
        "data.max_train_samples=16",
        "data.max_eval_samples=8",
        "data.max_predict_samples=8",
    )
    own = ("noise.kind=r3f", "train.gradient_accumulation_steps=1", "train.warmup_steps=0")
    return ["--config", str(inputs / "run.yaml"), f"train.output_dir={output}", *few, *own]


def validated(name: str, inputs: Path, tmp_path: Path) -> Preflight:
    return check_run([*words(name), *settings(inputs, tmp_path / "unused")])


@pytest.mark.parametrize("name", FILES)
def test_a_file_is_passed_or_refused_in_swafts_words(name, inputs, tmp_path):
    problems = validated(name, inputs, tmp_path).problems
    expected = REFUSED.get(name, [])
    assert len(problems) == len(expected), problems
    for problem, part in zip(problems, expected, strict=True):
        assert part in problem


@pytest.mark.parametrize("name", NEEDS_GPU)
def test_a_file_for_a_gpu_is_what_deepspeed_parses_of_it(name, inputs, tmp_path):
    from deepspeed.runtime.config import DeepSpeedConfig

    found = validated(name, inputs, tmp_path)
    filled = {row["key"]: row["value"] for row in found.facts["ds"]}
    file = json.loads(FILES[name].read_text())
    zero = file["zero_optimization"] | {"reduce_bucket_size": filled["zero_optimization.reduce_bucket_size"]}
    keys = ("train_micro_batch_size_per_gpu", "gradient_clipping")
    parsed = DeepSpeedConfig(
        {key: filled[key] for key in keys}
        | {"gradient_accumulation_steps": 1, "zero_optimization": zero}
        | {"fp16": file["fp16"], "bf16": {"enabled": filled.get("bf16.enabled", False)}}
    )
    assert found.facts["launch"]["mixed_precision"] == "fp16"
    assert (
        parsed.zero_optimization_stage,
        parsed.float16_config.enabled,
        parsed.bfloat16_config.enabled,
    ) == (
        2,
        True,
        False,
    )
    assert parsed.train_micro_batch_size_per_gpu == found.facts["batch"]["per_device"]


def start(names: list[str], inputs: Path, folder: Path) -> None:
    """Start a run a file, one after the other on the same two ranks, and see each come to its end."""
    runs = []
    for name in names:
        environ = read_launch(words(name)).environ
        made = {key: value for key, value in environ.items() if key.startswith(("ACCELERATE_", "FSDP_"))}
        runs.append(("classification", made, settings(inputs, folder / name)))
    finished = launch_several("ddp_cpu.yaml", runs, folder, timeout_s=120 + 30 * len(names))
    for name in names:
        assert (folder / name / "final-averaged" / "model.safetensors").exists()
        engine = json.loads((folder / name / "env.json").read_text())["engine"]
        assert engine == (ENGINES.get(name) or f"deepspeed-zero{stage(name)}")
        assert SAID.get(name, "") in finished.out, finished.out


def stage(name: str) -> int:
    return json.loads(FILES[name].read_text())["zero_optimization"]["stage"]


def test_some_files_that_are_passed_start_on_cpu_ranks(inputs, tmp_path):
    start(SAMPLE, inputs, tmp_path)


@pytest.mark.slow
def test_every_file_that_is_passed_starts_on_cpu_ranks(inputs, tmp_path):
    start([name for name in STARTS if name not in SAMPLE], inputs, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("launch_file", ["zero2_cpu", "zero3_cpu"])
def test_a_script_of_ones_own_starts_under_a_launch_file_as_its_first_line_says(launch_file, tmp_path):
    use_environment()  # as `source .venv/bin/activate` does
    arguments = ("--mixed_precision", "no", str(HERE / "own_script.py"), str(tmp_path / "found.json"))
    finished = launch(f"{launch_file}.yaml", *arguments)
    assert finished.code == 0, finished.err[-4000:]
    assert json.loads((tmp_path / "found.json").read_text()) == {"ranks": 2, "whole": True}

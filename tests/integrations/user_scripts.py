"""Runs the scripts in the form of transformers' examples, with and without the lines of swaft, on two ranks.

As a program it breaks a run of each script off, between two checkpoints, and ends by SIGKILL.
"""

from __future__ import annotations

import contextlib
import json
import os
import runpy
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import transformers.trainer
from accelerate.state import AcceleratorState, GradientState, PartialState
from tiny_trainer import model, numbers_tokenizer
from transformers import (
    DefaultFlowCallback,
    T5Config,
    T5ForConditionalGeneration,
    TrainerCallback,
    set_seed,
)
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

HERE = Path(__file__).parent
SCRIPTS = ("classification", "summarization")
STAGES = (2, 3)
RUNS = [(name, stage) for stage in STAGES for name in SCRIPTS]
"""Stage 2 first: DeepSpeed's stage 3 leaves another linear layer in torch, whose gradients round otherwise."""
IMPORT = "import swaft\n"
AVERAGING = "trainer.add_callback(swaft.WeightAveragingCallback(swaft.SWA(start=0.5)))"
NOISE = 'trainer.add_callback(swaft.NoiseCallback(swaft.R3F(preset="relative", sigma=0.5)))'
VARIANTS = {"plain": (), "averaged": (AVERAGING,), "noised": (AVERAGING, NOISE)}
STEPS, SAVED, KILLED = 8, 4, 6
COMMON = {
    "do_train": True,
    "do_eval": True,
    "do_predict": True,
    "max_steps": STEPS,
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 2,
    "learning_rate": 1e-2,
    "lr_scheduler_type": "constant_with_warmup",
    "warmup_steps": 2,
    "eval_strategy": "steps",
    "eval_steps": 3,
    "save_steps": SAVED,
    "logging_steps": 2,
    "report_to": "none",
    "disable_tqdm": True,
    "use_cpu": True,
    "ddp_backend": "gloo",
}
OF_ONE = {
    "classification": {"bf16": True},
    "summarization": {"predict_with_generate": True, "generation_max_length": 6},
}


def write_inputs(root: Path) -> None:
    """Models of random weights, rows, and the scripts with their added lines."""
    tokenizer = numbers_tokenizer(60)
    set_seed(0)
    texts = T5ForConditionalGeneration(
        T5Config(
            vocab_size=60, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, pad_token_id=0,
            eos_token_id=2, decoder_start_token_id=0,
        )
    )  # fmt: skip
    for name, network in (("classification", model()), ("summarization", texts)):
        folder = root / name
        network.save_pretrained(folder / "model")
        tokenizer.save_pretrained(folder / "model")
        for split, number in (("train", 96), ("validation", 12)):
            ids = torch.randint(3, 60, (number, 6), generator=torch.Generator().manual_seed(number)).tolist()
            rows = [
                row(name, [str(each) for each in text[: 3 + place % 4]]) for place, text in enumerate(ids)
            ]
            (folder / f"{split}.json").write_text("\n".join(map(json.dumps, rows)))
        script = (HERE / f"{name}_script.py").read_text()
        for variant, lines in VARIANTS.items():
            added = "".join(f"    {line}\n" for line in lines)
            before, after = script.split("\n    if training_args.do_train:\n")
            text = f"{before}\n{added}    if training_args.do_train:\n{after}"
            text = text.replace("import numpy as np\n", "import numpy as np\n" + IMPORT * bool(lines), 1)
            (folder / f"{variant}.py").write_text(text)


def row(name: str, words: list[str]) -> dict[str, str]:
    if name == "classification":
        return {"sentence": " ".join(words), "label": "abc"[int(words[0]) % 3]}
    return {"text": " ".join(words), "summary": " ".join(words[1::-1])}


class Recorder(TrainerCallback):
    """Among every Trainer's callbacks: keeps the whole fp32 masters after every step, and stops a run."""

    def __init__(self, stopped: Callable[[], None] | None):
        self.stopped = stopped
        self.masters: dict[int, dict[str, torch.Tensor]] = {}

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        from deepspeed.utils import safe_get_full_fp32_param

        if self.stopped and state.global_step == KILLED:
            self.stopped()
        self.masters[state.global_step] = {
            name: safe_get_full_fp32_param(parameter).clone() for name, parameter in model.named_parameters()
        }


def forget_engine() -> None:
    """Let another engine start in these ranks as if none had before."""
    AcceleratorState._reset_state()
    GradientState._reset_state()
    PartialState._reset_state()
    unset_hf_deepspeed_config()
    os.environ.pop("ACCELERATE_USE_DEEPSPEED", None)


def run_script(
    folder: Path, stage: int, variant: str, output: str = "", stopped: Callable[[], None] | None = None
) -> dict[int, dict[str, torch.Tensor]]:
    """Run a script as `python VARIANT.py settings.json` would; return its masters after every step.

    Args:
        folder: of the script, with its inputs.
        stage: of DeepSpeed's ZeRO.
        variant: which lines were added.
        output: folder of the run, inside the first; by default called as the variant.
        stopped: called in the middle of the run.
    """
    forget_engine()
    settings = folder / f"settings-{os.environ['RANK']}.json"
    paths = {
        "model_name_or_path": folder / "model",
        "cache_dir": folder / "cache",
        "train_file": folder / "train.json",
        "validation_file": folder / "validation.json",
        "output_dir": folder / f"zero{stage}" / (output or variant),
        "deepspeed": HERE.parents[1] / "ds_configs" / f"zero{stage}.json",
    }
    settings.write_text(
        json.dumps(COMMON | OF_ONE[folder.name] | {key: str(path) for key, path in paths.items()})
    )
    recorder = Recorder(stopped)
    with (
        mock.patch.object(sys, "argv", [f"{variant}.py", str(settings)]),
        mock.patch.object(transformers.trainer, "DEFAULT_CALLBACKS", [DefaultFlowCallback, recorder]),
    ):
        runpy.run_path(str(folder / f"{variant}.py"), run_name="__main__")
    return recorder.masters


class Stopped(Exception):
    """Raised in the middle of a run."""


def break_off_all(root: Path) -> None:
    """Break off a run of each script with both lines, the last by SIGKILL."""

    def stop() -> None:
        if (name, stage) == RUNS[-1]:
            os.kill(os.getpid(), signal.SIGKILL)
        raise Stopped

    for name, stage in RUNS:
        with contextlib.suppress(Stopped):
            run_script(root / name, stage, "noised", "broken-off", stop)
    raise AssertionError("the last run was not killed")


if __name__ == "__main__":
    break_off_all(Path(sys.argv[1]))

"""Runs on every rank: the callbacks inside a Trainer, under each engine that a CPU has."""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import FullyShardedDataParallelPlugin
from accelerate.utils import DistributedType
from tiny_trainer import sft_trainer, trainer
from torch.distributed.tensor import DTensor
from transformers import Trainer, TrainerCallback
from user_scripts import RUNS, SAVED, STEPS, VARIANTS, forget_engine, run_script

import swaft
from swaft.integrations.transformers import NoiseCallback, WeightAveragingCallback, averaged_weights

sys.path.append(str(Path(__file__).parents[1] / "distributed"))
from engines import switch_on
from harness import worker_main
from run_on_ranks import mean_in_one_process, same_bits

RULE = swaft.SWA(start=0.5)
NOISE = "a noise objective's loss is the mean over the rows of a step"
STAGES = {"ddp": None, "zero1": 1, "zero2": 2, "zero3": 3, "fsdp2": None}


class Masters(TrainerCallback):
    """Records this rank's master elements after every step that the rule takes in."""

    def __init__(self, averaging: WeightAveragingCallback):
        self.averaging, self.members = averaging, []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        averager = self.averaging.averager
        assert averager is not None
        if averager.plan().takes(state.global_step):
            self.members.append(torch.cat([live.clone() for live in averager.engine.live()]))


def started(
    build: Callable[..., Trainer], engine: str, folder: Path, *callbacks: Any, **settings: Any
) -> Trainer:
    """A Trainer under an engine, nothing left of the one before."""
    forget_engine()
    stage = STAGES[engine]
    if stage is not None:
        settings["deepspeed"] = {
            "train_micro_batch_size_per_gpu": "auto",
            "gradient_accumulation_steps": "auto",
            "gradient_clipping": "auto",
            "zero_force_ds_cpu_optimizer": False,
            "zero_optimization": {"stage": stage, "stage3_gather_16bit_weights_on_model_save": True},
        }
    run = build(folder, *callbacks, ddp_backend="gloo", **settings)
    if engine == "fsdp2":
        # accelerate drops FSDP2 on a CPU without a word, though its preparation runs there: switched on again.
        switch_on(run.accelerator, DistributedType.FSDP)
        run.accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2,
            auto_wrap_policy="transformer_based_wrap",
            transformer_cls_names_to_wrap=["BertLayer"],
            cpu_ram_efficient_loading=False,
        )
        run.is_fsdp_enabled = True
    return run


def shared_folder() -> Path:
    names = [tempfile.mkdtemp() if dist.get_rank() == 0 else ""]
    dist.broadcast_object_list(names)
    return Path(names[0])


def weights(run: Trainer) -> dict[str, torch.Tensor]:
    """The live weights that this rank has (under ZeRO-3 parts of them are elsewhere)."""
    return {name: whole(value).detach().clone() for name, value in run.model.state_dict().items()}


def whole(value: torch.Tensor) -> torch.Tensor:
    return value.full_tensor() if isinstance(value, DTensor) else value


def case(engine: str, build: Callable[..., Trainer] = trainer):
    def checks():
        root = shared_folder()
        plain = started(build, engine, root / "plain")
        plain.train()
        averaging = WeightAveragingCallback(RULE)
        masters = Masters(averaging)
        run = started(build, engine, root / "averaged", averaging, masters)
        run.train()
        averager = averaging.averager
        assert averager is not None

        def average_is_that_of_the_masters():
            assert len(masters.members) == averager.num_averaged == 5
            assert same_bits(averager.shard(), mean_in_one_process(masters.members))

        yield "the average is that of the recorded masters, bit for bit", average_is_that_of_the_masters

        def live_weights_are_the_same():
            before, after = weights(plain), weights(run)
            assert before
            assert all(torch.equal(before[name], after[name]) for name in before)

        yield "the live weights are those of a run without averaging", live_weights_are_the_same

        def both_are_evaluated():
            scores = [entry for entry in run.state.log_history if "eval_averaged_loss" in entry]
            assert [entry["step"] for entry in scores] == [4, 6, 8]
            [drift] = [
                entry["eval_averaged_drift"]
                for entry in run.state.log_history
                if entry["step"] == 8 and "eval_averaged_drift" in entry
            ]
            last = torch.cat([live.clone() for live in averager.engine.live()]).double()
            total = (averager.shard().double() - last).square().sum()
            dist.all_reduce(total)
            assert abs(drift - total.sqrt().item()) <= 1e-12 * drift
            with averaged_weights(run):
                assert run.evaluate()["eval_loss"] == scores[-1]["eval_averaged_loss"]

        yield "every evaluation scores both weights", both_are_evaluated

        def resumes():
            if dist.get_rank() == 0:
                shutil.copytree(root / "averaged" / "checkpoint-4", root / "resumed" / "checkpoint-4")
            dist.barrier()
            again = WeightAveragingCallback(RULE)
            resumed = started(build, engine, root / "resumed", again)
            resumed.train(resume_from_checkpoint=True)
            assert again.averager is not None
            assert same_bits(again.averager.shard(), averager.shard())
            before, after = weights(run), weights(resumed)
            assert all(torch.equal(before[name], after[name]) for name in before)

        yield "a run that resumes has the same average and weights", resumes

        yield NOISE, lambda: noise_weighs_rows(engine, build, root)

    return checks


def noise_weighs_rows(engine: str, build: Callable[..., Trainer], root: Path) -> None:
    # At weight 0 the task loss is left, and 4 rows twice are 8 rows at once. (Of BERT the Trainer itself
    # would count each micro-batch whole, and once a rank: the model passes over num_items_in_batch.)
    settings = {"max_steps": 3, "optim": "sgd", "learning_rate": 0.5, "dropout": 0.0}
    once = {"per_device_train_batch_size": 8, "average_tokens_across_devices": False}
    start = weights(started(build, engine, root / "start", **settings))
    own = started(build, engine, root / "own", **once, **settings)
    own.train()
    objective = swaft.R3F(weight=0.0, sigma=0.01)
    twice = NoiseCallback(objective)
    noisy = started(build, engine, root / "noisy", twice, gradient_accumulation_steps=2, **settings)
    noisy.train()
    before, after = weights(own), weights(noisy)
    moved = sum((before[name] - start[name]).square().sum() for name in before).sqrt()
    apart = sum((after[name] - before[name]).square().sum() for name in before).sqrt()
    assert moved > 0, moved
    assert apart <= 0.02 * moved, (apart, moved)
    assert objective.step == 6


def noise_alone(engine: str):
    """Of an engine whose averages are tried in `user_script`."""

    def checks():
        yield NOISE, lambda: noise_weighs_rows(engine, trainer, shared_folder())

    return checks


def user_script(name: str, stage: int):
    """A script in the form of transformers' examples: without lines of swaft, with one, with two, and resumed."""

    def checks():
        folder = Path(sys.argv[1]).parent / name
        runs = folder / f"zero{stage}"
        masters = {variant: run_script(folder, stage, variant) for variant in VARIANTS}

        def nothing_else_changes():
            assert len(masters["plain"]) == STEPS
            assert same_weights(masters["plain"], masters["averaged"])
            scores = [live_scores(runs / variant) for variant in ("plain", "averaged")]
            assert scores[0] == scores[1]
            texts = [(runs / variant / "predictions.txt").read_text() for variant in ("plain", "averaged")]
            assert texts[0] == texts[1]

        yield "the line for averaging changes no weight, score or prediction", nothing_else_changes

        def both_are_scored():
            state = json.loads((runs / "averaged" / "trainer_state.json").read_text())
            scored = [entry for entry in state["log_history"] if "eval_averaged_loss" in entry]
            assert [entry["step"] for entry in scored] == [6, 8]
            measured = "eval_averaged_accuracy" if name == "classification" else "eval_averaged_rougeL"
            at_the_end = json.loads((runs / "averaged" / "all_results.json").read_text())
            assert measured in scored[0]
            assert measured in at_the_end

        yield "both weights are scored by the script's own metrics", both_are_scored

        def noise_is_trained():
            state = json.loads((runs / "noised" / "trainer_state.json").read_text())
            first = state["log_history"][0]
            assert first["divergence"] > 0
            # Means over the same rows of both ranks, to the digits that the Trainer keeps.
            assert abs(first["loss"] - first["task_loss"] - first["divergence"]) < 1e-4 * first["loss"]
            assert not same_weights(masters["noised"], masters["averaged"])

        yield "the line for noise trains its divergence", noise_is_trained

        def resumes():
            assert not (runs / "broken-off" / f"checkpoint-{STEPS}").exists()
            resumed = run_script(folder, stage, "noised", "broken-off")
            assert list(resumed) == list(range(SAVED + 1, STEPS + 1))
            assert same_weights(resumed, {step: masters["noised"][step] for step in resumed})
            averages = [
                (runs / run / "final-averaged" / "model.safetensors").read_bytes()
                for run in ("noised", "broken-off")
            ]
            assert averages[0] == averages[1]

        yield "a run that was killed has the same weights and average once resumed", resumes
        if dist.get_rank() == 0:
            torch.save(masters, runs / "masters.pt")

    return checks


def live_scores(run: Path) -> list[dict[str, float]]:
    """What a run logged and scored of its live weights, times apart."""
    logged = json.loads((run / "trainer_state.json").read_text())["log_history"]
    entries = [*logged, json.loads((run / "eval_results.json").read_text())]
    others = ("averaged", "runtime", "per_second")
    live = [
        {key: entry[key] for key in entry if not any(part in key for part in others)} for entry in entries
    ]
    return [entry for entry in live if entry.keys() > {"epoch", "step"}]


def same_weights(a: dict[int, dict[str, torch.Tensor]], b: dict[int, dict[str, torch.Tensor]]) -> bool:
    """Whether two runs had the same masters after every step."""
    return a.keys() == b.keys() and all(
        torch.equal(value, b[step][name]) for step in a for name, value in a[step].items()
    )


if __name__ == "__main__":
    scripts = {f"{name} zero{stage}": user_script(name, stage) for name, stage in RUNS}
    # Nothing under stage 3 comes before what is compared with another process at stage 2 (see RUNS).
    cases = {name: check for name, check in scripts.items() if name.endswith("zero2")}
    cases |= {engine: case(engine) for engine in ("ddp", "zero1", "fsdp2")}
    cases["sft zero2"] = case("zero2", sft_trainer)
    cases["zero3"] = noise_alone("zero3")
    worker_main(cases | scripts)

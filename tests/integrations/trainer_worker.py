"""Runs on every rank: the callbacks inside a Trainer, under each engine that a CPU has."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import FullyShardedDataParallelPlugin
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import DistributedType
from tiny_trainer import sft_trainer, trainer
from torch.distributed.tensor import DTensor
from transformers import Trainer, TrainerCallback
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

import swaft
from swaft.integrations.transformers import NoiseCallback, WeightAveragingCallback, averaged_weights

sys.path.append(str(Path(__file__).parents[1] / "distributed"))
from engines import switch_on
from harness import worker_main
from run_on_ranks import mean_in_one_process, same_bits

RULE = swaft.SWA(start=0.5)
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
    AcceleratorState._reset_state()
    GradientState._reset_state()
    PartialState._reset_state()
    unset_hf_deepspeed_config()
    os.environ.pop("ACCELERATE_USE_DEEPSPEED", None)  # left behind by the engine before
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

        def noise_weighs_rows():
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

        yield "a noise objective's loss is the mean over the rows of a step", noise_weighs_rows

    return checks


if __name__ == "__main__":
    cases = {engine: case(engine) for engine in STAGES}
    cases["sft zero2"] = case("zero2", sft_trainer)
    worker_main(cases)

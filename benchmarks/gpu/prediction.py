"""What `swaft plan` predicts for the runs of `benchmarks.gpu.flagship`, computed where the planner's packages are.

    python -m benchmarks.gpu.prediction           # a minute, on any machine; writes results/flagship_plan.json

The machine with the card may lack packages that recipes need, so the prediction is kept in the repository, and
the flagship run prints it next to its measurements.
"""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace
from typing import Any

import torch

from benchmarks.gpu.flagship import BATCH, PLAN, RUNS, SIGMA, T5_3B, make_batch, make_model

LINE = ("--num_processes", "1", "--mixed_precision", "bf16", "benchmarks/gpu/flagship.py")


def predictions(sizes: dict[str, int], batch: tuple[int, int, int]) -> dict[str, Any]:
    """Plan every run of the flagship on one device.

    Args:
        sizes: entries of the T5's configuration.
        batch: sentences, source tokens, target tokens.

    Returns:
        Bytes on the device and on the host by run and phase, and bytes of the averages.
    """
    import swaft
    from swaft.training.config import AveragingConfig, NoiseConfig, TrainConfig
    from swaft.training.launch.accelerator import resolve_engine
    from swaft.training.launch.launcher import read_launch
    from swaft.training.models.build import build_objective
    from swaft.training.planning.memory import PlannedEngine
    from swaft.training.planning.plan import plan_run
    from swaft.training.planning.step import PlannedModel

    train = TrainConfig(output_dir="none", per_device_train_batch_size=batch[0], gradient_checkpointing=True)
    launch = read_launch(list(LINE))
    engine = PlannedEngine(
        launch, resolve_engine(train, launch.environ, hidden_size=sizes["d_model"]), on_cpu=False
    )
    rule = swaft.SWA(start=1).plan(total_steps=100)
    found: dict[str, Any] = {}
    for name, fused in RUNS.items():
        # Most of these fields are R3F's, borrowed when the class is made.
        options: dict[str, Any] = {"kind": "r3f", "preset": "relative", "sigma": SIGMA, "fused": fused}
        noise = NoiseConfig(**(options if fused is not None else {}))
        plan = plan_run(
            engine,
            SimpleNamespace(train=train, averaging=AveragingConfig()),
            PlannedModel(lambda: make_model(sizes), lambda: make_batch(sizes, batch, torch.device("cpu"))),
            build_objective(noise, seed=0),
            rule,
        )
        assert plan.averaging is not None
        found[name] = {
            "bytes on the device": plan.device_bytes,
            "by phase": {phase.name: dict(phase.device) for phase in plan.phases},
            "host bytes of averages": plan.averaging.host_bytes,
            "pinned bytes": plan.averaging.pinned_bytes,
            "bytes copied an event": plan.averaging.copied_bytes,
        }
    return {"model": sizes, "batch": list(batch), "runs": found}


if __name__ == "__main__":
    PLAN.write_text(json.dumps(predictions(T5_3B, BATCH), indent=1) + "\n", encoding="utf-8")
    print(PLAN.read_text(), file=sys.stderr)

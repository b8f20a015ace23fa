"""A run's plan: what the rank that holds most takes, and what that comes to on a machine."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from swaft.averaging.rules import Plan
from swaft.config import AveragingConfig, TrainConfig
from swaft.planning.averaging import AveragingPlan, plan_averaging
from swaft.planning.engines import Engine
from swaft.planning.memory import Phase, Run
from swaft.planning.step import trace_training_step


@dataclass(frozen=True, kw_only=True)
class Target:
    """What the run is planned for."""

    on_cpu: bool = False
    """The ranks compute on the host; else on a GPU each."""
    device_bytes: int | None = None
    """Memory of one device, to compare with."""
    host_bytes: int | None = None
    """Memory of one machine, to compare with."""
    step_seconds: float | None = None
    """Time of a training step, measured, to relate averaging to."""


@dataclass(frozen=True, kw_only=True)
class RunPlan:
    """What a run takes on paper."""

    engine: str
    precision: str
    world_size: int
    machines: int
    on_cpu: bool
    parameters: int
    trainable: int
    phases: list[Phase]
    """Of the rank that holds most; averaging not included."""
    averaging: AveragingPlan | None
    """None: nothing is averaged."""
    shortages: list[str] = field(default_factory=list)
    """What does not fit, and what would help, as sentences."""
    refused: list[str] = field(default_factory=list)
    """What the run itself would refuse to start with, though it can be planned, as sentences."""
    notes: list[str] = field(default_factory=list)
    """What was supposed, and may not be meant, as sentences."""

    @property
    def ranks_a_machine(self) -> int:
        """Ranks that share one machine's host memory."""
        return self.world_size // self.machines

    @property
    def averaging_bytes(self) -> int:
        """Host memory of a rank's averages, pinned memory among it."""
        return self.averaging.host_bytes + self.averaging.pinned_bytes if self.averaging else 0

    @property
    def device_bytes(self) -> int:
        """Most memory of one device; 0 where the ranks compute on the host."""
        return 0 if self.on_cpu else max(phase.device_bytes for phase in self.phases)

    @property
    def host_bytes(self) -> int:
        """Most host memory of a rank: of a phase, and of averaging, which is not there at the start."""
        return self._host_bytes_in(self.fullest_on_host)

    @property
    def fullest_on_host(self) -> Phase:
        """The phase in which a rank takes most host memory."""
        return max(self.phases, key=self._host_bytes_in)

    def _host_bytes_in(self, phase: Phase) -> int:
        own = phase.host_bytes + (phase.device_bytes if self.on_cpu else 0)
        return own if phase.name == "start" else own + self.averaging_bytes

    @property
    def machine_bytes(self) -> int:
        """Most host memory of all ranks of one machine."""
        return self.ranks_a_machine * self.host_bytes


def plan_run(
    engine: Engine,
    train: TrainConfig,
    averaging: AveragingConfig,
    *,
    build_model: Callable[[], Any],
    make_batch: Callable[[], Mapping[str, Tensor]],
    objective: Any,
    rule_plan: Plan | None,
    target: Target,
) -> RunPlan:
    """Return what a run takes.

    Args:
        engine: what the launch line and the settings say of it.
        train: section ``train``.
        averaging: section ``averaging``.
        build_model: makes the model, fp32.
        make_batch: makes a batch of full length.
        objective: from `swaft.training.build.build_objective`.
        rule_plan: the averaging rule's numbers for the run; None: nothing is averaged.
        target: what the run is planned for.
    """
    launch = engine.launch
    step = trace_training_step(
        build_model,
        make_batch,
        objective,
        train,
        casting=engine.casting,
        dtype=engine.dtype,
        on_cpu=target.on_cpu,
        find_blocks=engine.blocks,
    )
    run = Run(
        weights=step.weights,
        world_size=launch.world_size,
        on_cpu=target.on_cpu,
        accumulation_steps=train.gradient_accumulation_steps,
        kept_bytes=step.moments[-1].live_bytes,
    )
    memory = engine.memory(run, step)
    found = None
    if rule_plan is not None:
        found = plan_averaging(
            rule_plan,
            averaging,
            elements=memory.owned,
            masters_on_device=not target.on_cpu and not engine.offloads_masters,
            step_seconds=target.step_seconds,
        )
    return RunPlan(
        engine=launch.engine,
        precision=engine.precision,
        world_size=launch.world_size,
        machines=launch.num_machines,
        on_cpu=target.on_cpu,
        parameters=run.trainable + run.frozen,
        trainable=run.trainable,
        phases=list(memory.phases),
        averaging=found,
    )

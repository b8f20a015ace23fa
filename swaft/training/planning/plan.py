"""A run's plan: what the rank that holds most takes, what that comes to on a machine, and what does not fit."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from swaft.averaging.host.averages import STAGING_BYTES, seconds_an_element
from swaft.averaging.host.crew import Crew
from swaft.averaging.host.memory import lane_bytes
from swaft.averaging.host.source import ring_bytes
from swaft.averaging.rules import Plan
from swaft.training.config import AveragingConfig, TrainConfig
from swaft.training.planning import sized
from swaft.training.planning.engines import Engine
from swaft.training.planning.memory import Phase, Run, numel
from swaft.training.planning.step import FP32, trace_training_step


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
class AveragingPlan:
    """Averaging on one rank, over the whole run."""

    events: int
    """Steps whose weights are averaged."""
    first_step: int
    every: int
    """Optimizer steps between two events."""
    total_steps: int
    elements: int
    """Master elements that the rank owns."""
    host_bytes: int
    """Most memory that the averages take, in host memory."""
    pinned_bytes: int
    """Of the staging ring; 0 where the masters are in host memory."""
    copied_bytes: int
    """Copied from the device to the host at each event; 0 where the masters are in host memory."""
    threads: int
    """Of the arithmetic."""
    event_seconds: float
    """Arithmetic of an event, behind the steps, at the rate of this machine now."""
    share_of_step: float | None
    """Arithmetic of an event by the time between two events; above 1 training waits for it. None: no step's time is
    known."""

    @property
    def waits(self) -> bool | None:
        """Whether training has to wait for averaging."""
        return None if self.share_of_step is None else self.share_of_step > 1


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
    """Assumptions that may be wrong, as sentences."""

    @property
    def ranks_a_machine(self) -> int:
        """Ranks that share one machine's host memory."""
        return self.world_size // self.machines

    @property
    def averaging_bytes(self) -> int:
        """Host memory of a rank's averages, pinned memory included."""
        return self.averaging.host_bytes + self.averaging.pinned_bytes if self.averaging else 0

    @property
    def device_bytes(self) -> int:
        """Most memory of one device; 0 where the ranks compute on the host."""
        return 0 if self.on_cpu else max(phase.device_bytes for phase in self.phases)

    @property
    def host_bytes(self) -> int:
        """Most host memory of a rank, its averages included."""
        return self._host_bytes_in(self.fullest_on_host)

    @property
    def fullest_on_host(self) -> Phase:
        """The phase in which a rank takes most host memory."""
        return max(self.phases, key=self._host_bytes_in)

    @property
    def machine_bytes(self) -> int:
        """Most host memory of all ranks of one machine."""
        return self.ranks_a_machine * self.host_bytes

    def _host_bytes_in(self, phase: Phase) -> int:
        own = phase.host_bytes + (phase.device_bytes if self.on_cpu else 0)
        return own if phase.name == "start" else own + self.averaging_bytes  # no averages while it loads


def plan_run(
    engine: Engine,
    config: Any,
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
        config: sections ``train`` and ``averaging``.
        build_model: makes the model, fp32.
        make_batch: makes a batch of full length.
        objective: from `swaft.training.models.build.build_objective`.
        rule_plan: the averaging rule's numbers for the run; None: nothing is averaged.
        target: what the run is planned for.
    """
    launch, train = engine.launch, config.train
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
        step=step,
        world_size=launch.world_size,
        on_cpu=target.on_cpu,
        accumulates=train.gradient_accumulation_steps > 1,
    )
    memory = engine.memory(run)
    copies = not target.on_cpu and not engine.offloads("optimizer")
    return RunPlan(
        engine=launch.engine,
        precision=engine.precision,
        world_size=launch.world_size,
        machines=launch.num_machines,
        on_cpu=target.on_cpu,
        parameters=numel(step.weights),
        trainable=numel(run.trained),
        phases=list(memory.phases),
        averaging=rule_plan
        and plan_averaging(
            rule_plan, config.averaging, memory.owned, copies=copies, step_seconds=target.step_seconds
        ),
    )


def plan_averaging(
    plan: Plan, settings: AveragingConfig, elements: int, *, copies: bool, step_seconds: float | None
) -> AveragingPlan:
    """Return what averaging takes on a rank that owns so many master elements.

    ``copies``: the masters are on a device, and are copied to the host.
    """
    crew = Crew(settings.threads)
    try:
        rate = seconds_an_element(crew, elements)
    finally:
        crew.close()
    event_seconds = max(len(plan.updates(1)), 1) * elements * rate
    compensated, spilled = settings.precision == "compensated", settings.spill_dir is not None
    return AveragingPlan(
        events=plan.num_members,
        first_step=plan.first_step,
        every=plan.every,
        total_steps=plan.total_steps,
        elements=elements,
        host_bytes=lane_bytes(plan, elements, compensated=compensated, spilled=spilled),
        pinned_bytes=ring_bytes(elements, STAGING_BYTES) if copies else 0,
        copied_bytes=FP32 * elements if copies else 0,
        threads=crew.threads,
        event_seconds=event_seconds,
        share_of_step=None if step_seconds is None else event_seconds / (plan.every * step_seconds),
    )


def find_shortages(
    found: RunPlan, target: Target, engine: Engine, train: TrainConfig, averaging: AveragingConfig
) -> list[str]:
    """Return what does not fit, each sentence with the remedies that apply to this run."""
    shortages = []
    if target.device_bytes is not None and found.device_bytes > target.device_bytes:
        fullest = max(found.phases, key=lambda phase: phase.device_bytes)
        remedies = [*_smaller_step(fullest, train), *_sharding(engine, target), *_offloading(engine)]
        there = f"--device_memory is {sized(target.device_bytes)}"
        shortages.append(f"a device would take {sized(found.device_bytes)}, and {there}; {_advice(remedies)}")
    if target.host_bytes is not None and found.machine_bytes > target.host_bytes:
        fullest = found.fullest_on_host
        starts = fullest.name == "start"
        remedies = []
        if starts and engine.launch.stage == 3 and engine.loads_whole:
            remedies.append("zero3_init_flag: true in the launch file")
        if found.on_cpu:
            remedies += [*_smaller_step(fullest, train), *_sharding(engine, target)]
        if not starts and found.averaging_bytes and averaging.precision == "compensated":
            remedies.append("averaging.precision=plain (4 bytes an element in place of 6)")
        if found.ranks_a_machine > 1:
            remedies.append("fewer ranks on each machine")
        ranks = f"the {found.ranks_a_machine} ranks of a machine would take {sized(found.machine_bytes)}"
        remedies = remedies or ["more than that in --host_memory, or a smaller model"]
        shortages.append(f"{ranks}, and --host_memory is {sized(target.host_bytes)}; {_advice(remedies)}")
    return shortages


def _smaller_step(fullest: Phase, train: TrainConfig) -> list[str]:
    """What makes activations smaller, where they are what does not fit."""
    if fullest.name != "forward and backward":
        return []
    rows, steps = train.per_device_train_batch_size, train.gradient_accumulation_steps
    fewer = (
        f"train.per_device_train_batch_size below {rows} with train.gradient_accumulation_steps above {steps}"
    )
    return [fewer] * (rows > 1) + ["train.gradient_checkpointing=true"] * (not train.gradient_checkpointing)


def _sharding(engine: Engine, target: Target) -> list[str]:
    """What spreads more of the state over the ranks."""
    launch = engine.launch
    if launch.stage == 3 or launch.engine == "FSDP2":
        return ["more ranks"]
    kind = "_cpu" if target.on_cpu else "_multinode" if launch.num_machines > 1 else ""
    what = "a higher ZeRO stage" if launch.world_size > 1 else "more ranks at a high ZeRO stage"
    return [f"{what} (launch/accelerate/zero3{kind}.yaml)"]


def _offloading(engine: Engine) -> list[str]:
    """What moves state from the device to the host."""
    stage = engine.launch.stage
    if stage in (1, 2, 3) and not engine.offloads("optimizer"):
        file = "zero3_offload" if stage == 3 else "zero2_offload"
    elif stage == 3 and not engine.offloads("param"):
        file = "zero3_offload_param"
    else:
        return []
    return [f"offloading (--deepspeed_config_file ds_configs/{file}.json)"]


def _advice(remedies: list[str]) -> str:
    *others, last = remedies
    return f"what helps: {', '.join(others)} or {last}" if others else f"what helps: {last}"

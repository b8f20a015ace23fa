"""A run's plan: memory of the rank that needs most, the total on a machine, and what does not fit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from swaft.averaging.host import STAGING_BYTES, seconds_an_element
from swaft.averaging.host.machine import Workers, lane_bytes
from swaft.averaging.host.source import ring_bytes
from swaft.averaging.rules import Plan
from swaft.errors import ConfigError
from swaft.sizes import sized
from swaft.training.checks import Problems, check_start, read_recipe
from swaft.training.config import AveragingConfig, load_config
from swaft.training.launch.launcher import Launch, read_launch, read_script
from swaft.training.planning.memory import FORWARD_BACKWARD, FP32, Phase, PlannedEngine, numel
from swaft.training.planning.step import PlannedModel, planned_model, trace_training_step

RANKS_OF_A_MACHINE = 8
"""Devices that machines usually have at most."""
OFFLOADING = {1: ("zero2_offload",), 2: ("zero2_offload",), 3: ("zero3_offload", "zero3_offload_param")}
"""DeepSpeed files, by stage, that offload the optimizer, and then also the weights."""


@dataclass(frozen=True, kw_only=True)
class AveragingPlan:
    """Averaging on one rank, over the whole run. Staging and copies are 0 if the masters are in host memory."""

    events: int
    """Steps whose weights are averaged."""
    first_step: int
    every: int
    total_steps: int
    elements: int
    """Master elements that the rank owns."""
    host_bytes: int
    """Most host memory that the averages take."""
    pinned_bytes: int
    """Host memory of the staging ring."""
    copied_bytes: int
    """Bytes copied from the device to the host at each event."""
    threads: int
    event_seconds: float
    """Seconds of arithmetic per event, in the background, at this machine's measured rate."""
    share_of_step: float | None
    """``event_seconds`` divided by the time between two events; None: the time of a step is not known."""

    @property
    def waits(self) -> bool | None:
        """Whether training has to wait for averaging."""
        return None if self.share_of_step is None else self.share_of_step > 1


@dataclass(frozen=True, kw_only=True)
class RunPlan:
    """The estimated needs of a run."""

    engine: str
    precision: str
    world_size: int
    machines: int
    on_cpu: bool
    parameters: int
    trainable: int
    phases: list[Phase]
    """Phases of the rank with the most memory."""
    averaging: AveragingPlan | None
    """None: nothing is averaged."""
    shortages: list[str] = field(default_factory=list)
    """What does not fit, and what would help, as sentences."""
    refused: list[str] = field(default_factory=list)
    """Why the run itself would refuse to start, although it can be planned, as sentences."""
    notes: list[str] = field(default_factory=list)
    """Assumptions that may be wrong, as sentences."""

    @property
    def ranks_a_machine(self) -> int:
        """Ranks that share one machine's host memory."""
        return self.world_size // self.machines

    @property
    def device_bytes(self) -> int:
        """Most memory of one device; 0 if the ranks compute on the host."""
        return max(phase.device_bytes for phase in self.phases)

    @property
    def host_bytes(self) -> int:
        """Most host memory of a rank."""
        return max(phase.host_bytes for phase in self.phases)

    @property
    def machine_bytes(self) -> int:
        """Most host memory of all ranks of one machine."""
        return self.ranks_a_machine * self.host_bytes


def plan_recipe(
    words: Sequence[str],
    *,
    on_cpu: bool = False,
    device_bytes: int | None = None,
    host_bytes: int | None = None,
    step_seconds: float | None = None,
) -> RunPlan:
    """Plan the run that ``accelerate launch`` would start with these words.

    Args:
        words: the command line after ``accelerate launch``.
        on_cpu: whether the ranks compute on the host; else on a GPU each.
        device_bytes: memory of one device, to compare with.
        host_bytes: memory of one machine, to compare with.
        step_seconds: measured time of a training step, to compare averaging with.

    Returns:
        The plan, with the problems that would keep the run, but not the plan, from starting.

    Raises:
        ConfigError: the line, a file or the settings are wrong, or the run cannot be planned.
    """
    launch, script = read_launch(words), read_script(words)
    recipe = read_recipe(Path(script.path)) if script.is_file else None
    if recipe is None:
        raise ConfigError(
            f"{script.path}: a plan needs to know the model and its batches, which only swaft's recipes provide (a "
            "script with Config and prepare); give one of recipes/, with the settings of your run"
        )
    config: Any = load_config(recipe.Config, script.arguments)
    problems = Problems()
    ready = recipe.prepare(config, problems)
    start = check_start(config, ready, launch.environ, problems)
    averages = getattr(ready, "rule", None) is not None
    knows_length = hasattr(start, "total_steps") and not start.may_be_longer
    if averages and not (knows_length or hasattr(start, "plan")):
        problems.add(
            ["the length of the run depends on the training rows; set train.max_steps to plan without them"]
        )
    needed = [(ready, "model_config"), (ready, "objective"), (ready, "rule"), (start, "engine")]
    missing = [name for whole, name in needed if not hasattr(whole, name)]
    if missing or (averages and not hasattr(start, "plan")):
        unset = (
            f"{script.path}: a plan needs {', '.join(missing)}, which its prepare does not set; set it there"
        )
        raise ConfigError(problems.found or unset)
    engine = PlannedEngine(launch, start.engine, on_cpu=on_cpu)
    model, rule_plan = planned_model(config, ready.model_config), start.plan if averages else None
    found = plan_run(engine, config, model, ready.objective, rule_plan, step_seconds=step_seconds)
    shortages = find_shortages(found, engine, config, device_bytes=device_bytes, host_bytes=host_bytes)
    return replace(found, shortages=shortages, refused=problems.found, notes=machine_notes(launch))


def plan_run(
    engine: PlannedEngine,
    config: Any,
    model: PlannedModel,
    objective: Any,
    rule_plan: Plan | None,
    *,
    step_seconds: float | None = None,
) -> RunPlan:
    """Return what a run takes.

    Args:
        engine: the engine that the launch line and the settings specify.
        config: sections ``train`` and ``averaging``.
        model: makes the model and a full batch.
        objective: from `swaft.training.models.build.build_objective`.
        rule_plan: the averaging rule's plan for the run; None: nothing is averaged.
        step_seconds: measured time of a training step, to compare averaging with; None: not known.
    """
    launch, train, averaging = engine.launch, config.train, None
    weights, activations = trace_training_step(model, objective, train, engine)
    phases, owned = engine.memory(weights, activations, accumulates=train.gradient_accumulation_steps > 1)
    if rule_plan is not None:
        averaging = _plan_averaging(rule_plan, config, owned, engine, step_seconds)
        held = {"averages": averaging.host_bytes, "staging of the averages": averaging.pinned_bytes}
        start, *training = phases
        phases = [start, *(replace(phase, host={**phase.host, **held}) for phase in training)]
    return RunPlan(
        engine=launch.engine,
        precision=engine.precision,
        world_size=launch.world_size,
        machines=launch.num_machines,
        on_cpu=engine.on_cpu,
        parameters=numel(weights),
        trainable=numel(weight for weight in weights if weight.trained),
        phases=phases,
        averaging=averaging,
    )


def _plan_averaging(
    plan: Plan, config: Any, elements: int, engine: PlannedEngine, step_seconds: float | None
) -> AveragingPlan:
    """Return what averaging takes on a rank that owns this many master elements."""
    settings: AveragingConfig = config.averaging
    workers = Workers(settings.threads)
    try:
        rate = seconds_an_element(workers, elements)
    finally:
        workers.close()
    event_seconds = max(len(plan.updates(1)), 1) * elements * rate
    compensated, spilled = settings.precision == "compensated", settings.spill_dir is not None
    copies = not engine.on_cpu and not engine.offloads("optimizer")
    return AveragingPlan(
        events=plan.num_members,
        first_step=plan.first_step,
        every=plan.every,
        total_steps=plan.total_steps,
        elements=elements,
        host_bytes=lane_bytes(plan, elements, compensated=compensated, spilled=spilled),
        pinned_bytes=ring_bytes(elements, STAGING_BYTES) if copies else 0,
        copied_bytes=FP32 * elements if copies else 0,
        threads=workers.threads,
        event_seconds=event_seconds,
        share_of_step=None if step_seconds is None else event_seconds / (plan.every * step_seconds),
    )


def machine_notes(launch: Launch) -> list[str]:
    """Return a sentence if more ranks are planned for one machine than it is likely to have, else none.

    It names the launch file for several machines.
    """
    if launch.num_machines > 1 or launch.world_size <= RANKS_OF_A_MACHINE:
        return []
    file = {"DDP": "ddp", "FSDP2": "fsdp2"}.get(launch.engine, "zero3" if launch.stage == 3 else "zero2")
    named = f"launch/accelerate/{file}_multinode.yaml"
    if launch.stage in (0, 1):
        named += f" with --deepspeed_config_file ds_configs/zero{launch.stage}.json"
    return [
        f"all {launch.world_size:,} ranks are taken to be on one machine, as the launch file says (num_machines "
        f"1); for several machines take {named} and --num_machines"
    ]


def find_shortages(
    found: RunPlan, engine: PlannedEngine, config: Any, *, device_bytes: int | None, host_bytes: int | None
) -> list[str]:
    """Return what does not fit, each sentence with the remedies that apply to this run."""
    ranks = f"the {found.ranks_a_machine} ranks of a machine"
    places = (
        ("device", "a device", found.device_bytes, device_bytes),
        ("host", ranks, found.machine_bytes, host_bytes),
    )
    return [
        f"{whose} would take {sized(taken)}, and --{place}_memory is {sized(there)}; what helps: "
        + _remedies(found, engine, config, on_host=place == "host")
        for place, whose, taken, there in places
        if there is not None and taken > there
    ]


def _remedies(found: RunPlan, engine: PlannedEngine, config: Any, *, on_host: bool) -> str:
    """Return what would help a run that does not fit: the remedies that apply, cheapest first."""
    launch, train = engine.launch, config.train
    fullest = max(found.phases, key=lambda phase: phase.host_bytes if on_host else phase.device_bytes)
    loads = fullest.name == "start"
    trains = not loads and on_host == found.on_cpu
    activations = trains and fullest.name == FORWARD_BACKWARD
    rows, steps = train.per_device_train_batch_size, train.gradient_accumulation_steps
    smaller = (
        f"train.per_device_train_batch_size below {rows} with train.gradient_accumulation_steps above {steps}"
    )
    sharded = launch.stage == 3 or launch.engine == "FSDP2"
    higher = "a higher ZeRO stage" if launch.world_size > 1 else "more ranks at a high ZeRO stage"
    kind = "_cpu" if found.on_cpu else "_multinode" if launch.num_machines > 1 else ""
    offloaded = engine.offloads("optimizer") + engine.offloads("param")
    file = next(iter(OFFLOADING.get(launch.stage or 0, ())[offloaded:]), None)
    compensated = "averages" in fullest.host and config.averaging.precision == "compensated"
    applies = {
        "zero3_init_flag: true in the launch file": loads and launch.stage == 3 and engine.loads_whole,
        smaller: activations and rows > 1,
        "train.gradient_checkpointing=true": activations and not train.gradient_checkpointing,
        "more ranks": trains and sharded,
        f"{higher} (launch/accelerate/zero3{kind}.yaml)": trains and not sharded,
        f"offloading (--deepspeed_config_file ds_configs/{file}.json)": file is not None and not on_host,
        "averaging.precision=plain (4 bytes per element instead of 6)": on_host and compensated,
        "fewer ranks on each machine": on_host and found.ranks_a_machine > 1,
    }
    remedies = [remedy for remedy, helps in applies.items() if helps]
    *others, last = remedies or ["more than that in --host_memory, or a smaller model"]
    return f"{', '.join(others)} or {last}" if others else last

"""A run's plan: what the rank that holds most takes, what that comes to on a machine, and what does not fit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from swaft.averaging.host import STAGING_BYTES, seconds_an_element
from swaft.averaging.host.machine import Workers, lane_bytes
from swaft.averaging.host.source import ring_bytes
from swaft.averaging.rules import Plan
from swaft.errors import ConfigError
from swaft.training.checks import Problems, check_start, read_recipe
from swaft.training.config import AveragingConfig, TrainConfig, load_config
from swaft.training.launch.launcher import Launch, read_launch, read_script
from swaft.training.planning import sized
from swaft.training.planning.memory import FORWARD_BACKWARD, Phase, PlannedEngine, numel
from swaft.training.planning.step import FP32, PlannedModel, planned_model, trace_training_step

RANKS_OF_A_MACHINE = 8
"""Devices that machines have at most, as a rule."""
OFFLOADING = {1: ("zero2_offload",), 2: ("zero2_offload",), 3: ("zero3_offload", "zero3_offload_param")}
"""DeepSpeed files that offload the optimizer, and the weights too, by stage."""


@dataclass(frozen=True, kw_only=True)
class AveragingPlan:
    """Averaging on one rank, over the whole run. Staging and copies are 0 where the masters are in host memory."""

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
    """Copied from the device to the host at each event."""
    threads: int
    event_seconds: float
    """Arithmetic of an event, behind the steps, at the rate of this machine now."""
    share_of_step: float | None
    """That by the time between two events; above 1 training waits for it. None: no step's time is known."""

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
        return self.fullest_on_host[0]

    @property
    def machine_bytes(self) -> int:
        """Most host memory of all ranks of one machine."""
        return self.ranks_a_machine * self.host_bytes

    @property
    def fullest_on_host(self) -> tuple[int, Phase]:
        """The phase in which a rank takes most host memory, after the bytes; while it loads, it has no averages."""
        held = [
            phase.host_bytes
            + phase.device_bytes * self.on_cpu
            + self.averaging_bytes * (phase.name != "start")
            for phase in self.phases
        ]
        return max(zip(held, self.phases, strict=True), key=lambda each: each[0])


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
        on_cpu: the ranks compute on the host; else on a GPU each.
        device_bytes: memory of one device, to compare with.
        host_bytes: memory of one machine, to compare with.
        step_seconds: time of a training step, measured, to relate averaging to.

    Returns:
        The plan; what the run would refuse and a plan can do without is on it.

    Raises:
        ConfigError: the line, a file or the settings are wrong, or the run cannot be planned.
    """
    launch, script = read_launch(words), read_script(words)
    recipe = read_recipe(Path(script.path)) if script.is_file else None
    if recipe is None:
        raise ConfigError(
            f"{script.path}: a plan needs to know the model and its batches, which only swaft's recipes tell (a "
            "script with Config and prepare); name one of recipes/, with the settings of your run"
        )
    config: Any = load_config(recipe.Config, script.arguments)
    problems = Problems()
    ready = recipe.prepare(config, problems)
    start = check_start(config, ready, launch.environ, problems)
    averages = getattr(ready, "rule", None) is not None
    if averages and not hasattr(start, "total_steps"):
        problems.add(
            ["the length of the run depends on the training rows; set train.max_steps to plan without them"]
        )
    needed = ((ready, "model_config"), (ready, "objective"), (ready, "rule"), (start, "engine"))
    if not all(hasattr(where, name) for where, name in needed) or (averages and not hasattr(start, "plan")):
        raise ConfigError(problems.found)
    engine = PlannedEngine(launch, start.engine, on_cpu=on_cpu)
    model, plan = planned_model(config, ready.model_config), start.plan if averages else None
    found = plan_run(engine, config, model, ready.objective, plan, step_seconds=step_seconds)
    return replace(
        found,
        shortages=find_shortages(found, engine, config, device_bytes=device_bytes, host_bytes=host_bytes),
        refused=problems.found,
        notes=machine_notes(launch),
    )


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
        engine: what the launch line and the settings say of it.
        config: sections ``train`` and ``averaging``.
        model: how it and a full batch of it are made.
        objective: from `swaft.training.models.build.build_objective`.
        rule_plan: the averaging rule's numbers for the run; None: nothing is averaged.
        step_seconds: time of a training step, measured, to relate averaging to; None: not known.
    """
    launch, train = engine.launch, config.train
    weights, activations = trace_training_step(model.build, model.batch, objective, train, engine)
    phases, owned = engine.memory(weights, activations, accumulates=train.gradient_accumulation_steps > 1)
    return RunPlan(
        engine=launch.engine,
        precision=engine.precision,
        world_size=launch.world_size,
        machines=launch.num_machines,
        on_cpu=engine.on_cpu,
        parameters=numel(weights),
        trainable=numel(weight for weight in weights if weight.trained),
        phases=phases,
        averaging=None
        if rule_plan is None
        else _plan_averaging(
            rule_plan,
            config.averaging,
            owned,
            copies=not engine.on_cpu and not engine.offloads("optimizer"),
            step_seconds=step_seconds,
        ),
    )


def _plan_averaging(
    plan: Plan, settings: AveragingConfig, elements: int, *, copies: bool, step_seconds: float | None
) -> AveragingPlan:
    """Return what averaging takes on a rank that owns so many master elements, copied from a device or not."""
    workers = Workers(settings.threads)
    try:
        rate = seconds_an_element(workers, elements)
    finally:
        workers.close()
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
        threads=workers.threads,
        event_seconds=event_seconds,
        share_of_step=None if step_seconds is None else event_seconds / (plan.every * step_seconds),
    )


def machine_notes(launch: Launch) -> list[str]:
    """Return a sentence where more ranks are planned for one machine than one is likely to have, or none.

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
    shortages, stage, train = [], engine.launch.stage, config.train
    if device_bytes is not None and found.device_bytes > device_bytes:
        fullest = max(found.phases, key=lambda phase: phase.device_bytes)
        offloads = (engine.offloads("optimizer"), engine.offloads("param"))
        left = [
            file for file, done in zip(OFFLOADING.get(stage or 0, ()), offloads, strict=False) if not done
        ]
        offloading = {
            f"offloading (--deepspeed_config_file ds_configs/{file}.json)": True for file in left[:1]
        }
        shortages.append(
            f"a device would take {sized(found.device_bytes)}, and --device_memory is "
            f"{sized(device_bytes)}; {_advice(_in_training(fullest, engine, train) | offloading)}"
        )
    if host_bytes is not None and found.machine_bytes > host_bytes:
        _, fullest = found.fullest_on_host
        starts = fullest.name == "start"
        spares = found.averaging_bytes > 0 and config.averaging.precision == "compensated"
        remedies = {"zero3_init_flag: true in the launch file": starts and stage == 3 and engine.loads_whole}
        remedies |= _in_training(fullest, engine, train) if found.on_cpu else {}
        remedies["averaging.precision=plain (4 bytes an element in place of 6)"] = not starts and spares
        remedies["fewer ranks on each machine"] = found.ranks_a_machine > 1
        shortages.append(
            f"the {found.ranks_a_machine} ranks of a machine would take {sized(found.machine_bytes)}, and "
            f"--host_memory is {sized(host_bytes)}; {_advice(remedies)}"
        )
    return shortages


def _in_training(fullest: Phase, engine: PlannedEngine, train: TrainConfig) -> dict[str, bool]:
    """Remedies, and whether they apply: smaller activations where these do not fit, and state sharded further."""
    launch, backward = engine.launch, fullest.name == FORWARD_BACKWARD
    rows, steps = train.per_device_train_batch_size, train.gradient_accumulation_steps
    smaller = (
        f"train.per_device_train_batch_size below {rows} with train.gradient_accumulation_steps above {steps}"
    )
    kind = "_cpu" if engine.on_cpu else "_multinode" if launch.num_machines > 1 else ""
    what = "a higher ZeRO stage" if launch.world_size > 1 else "more ranks at a high ZeRO stage"
    sharded = launch.stage == 3 or launch.engine == "FSDP2"
    return {
        smaller: backward and rows > 1,
        "train.gradient_checkpointing=true": backward and not train.gradient_checkpointing,
        "more ranks" if sharded else f"{what} (launch/accelerate/zero3{kind}.yaml)": True,
    }


def _advice(remedies: Mapping[str, bool]) -> str:
    *others, last = [remedy for remedy, applies in remedies.items() if applies] or [
        "more than that in --host_memory, or a smaller model"
    ]
    return f"what helps: {', '.join(others)} or {last}" if others else f"what helps: {last}"

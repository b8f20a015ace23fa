"""A run's plan: what the rank that holds most takes, what that comes to on a machine, and what does not fit."""

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
from swaft.training.checks.problems import Problems
from swaft.training.checks.recipe import is_recipe, load_recipe, require_python
from swaft.training.checks.start import check_start
from swaft.training.config import AveragingConfig, load_config
from swaft.training.launch.launcher import Launch, read_launch, read_script
from swaft.training.planning.engines import PlannedEngine
from swaft.training.planning.memory import Phase, numel
from swaft.training.planning.model import PlannedModel, planned_model
from swaft.training.planning.shortages import Hardware, find_shortages
from swaft.training.planning.step import FP32, trace_training_step

RANKS_OF_A_MACHINE = 8
"""Devices that machines have at most, as a rule."""


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


def plan_recipe(words: Sequence[str], hardware: Hardware) -> RunPlan:
    """Plan the run that ``accelerate launch`` would start with these words.

    Args:
        words: the command line after ``accelerate launch``.
        hardware: what the run is planned for.

    Returns:
        The plan; what the run would refuse and a plan can do without is on it.

    Raises:
        ConfigError: the line, a file or the settings are wrong, or the run cannot be planned.
    """
    launch, script = read_launch(words), read_script(words)
    path = Path(script.path)
    if script.is_file:
        require_python(path)
    if not script.is_file or not is_recipe(path):
        raise ConfigError(
            f"{path}: a plan needs to know the model and its batches, which only swaft's recipes tell (a "
            "script with Config and prepare); name one of recipes/, with the settings of your run"
        )
    recipe = load_recipe(path)
    config: Any = load_config(recipe.config_class, script.arguments)
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
    engine = PlannedEngine(launch, start.engine, on_cpu=hardware.on_cpu)
    model, plan = planned_model(config, ready.model_config), start.plan if averages else None
    found = plan_run(engine, config, model, ready.objective, plan, step_seconds=hardware.step_seconds)
    return replace(
        found,
        shortages=find_shortages(found, hardware, engine, config.train, config.averaging),
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
    memory = engine.memory(weights, activations, accumulates=train.gradient_accumulation_steps > 1)
    return RunPlan(
        engine=launch.engine,
        precision=engine.precision,
        world_size=launch.world_size,
        machines=launch.num_machines,
        on_cpu=engine.on_cpu,
        parameters=numel(weights),
        trainable=numel(weight for weight in weights if weight.group is not None),
        phases=list(memory.phases),
        averaging=None
        if rule_plan is None
        else _plan_averaging(
            rule_plan,
            config.averaging,
            memory.owned,
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

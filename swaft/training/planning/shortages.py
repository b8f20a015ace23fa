"""What of a plan does not fit, each with the settings that would help this run, and no others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from swaft.training.config import AveragingConfig, TrainConfig
from swaft.training.planning import sized
from swaft.training.planning.engines import PlannedEngine
from swaft.training.planning.memory import FORWARD_BACKWARD, Phase

if TYPE_CHECKING:
    from swaft.training.planning.plan import RunPlan


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """What a run is planned for."""

    on_cpu: bool = False
    """The ranks compute on the host; else on a GPU each."""
    device_bytes: int | None = None
    """Memory of one device, to compare with."""
    host_bytes: int | None = None
    """Memory of one machine, to compare with."""
    step_seconds: float | None = None
    """Time of a training step, measured, to relate averaging to."""


def find_shortages(
    found: RunPlan, hardware: Hardware, engine: PlannedEngine, train: TrainConfig, averaging: AveragingConfig
) -> list[str]:
    """Return what does not fit, each sentence with the remedies that apply to this run."""
    shortages = []
    if hardware.device_bytes is not None and found.device_bytes > hardware.device_bytes:
        fullest = max(found.phases, key=lambda phase: phase.device_bytes)
        remedies = [*_training_remedies(fullest, engine, train), *_offloading(engine)]
        there = f"--device_memory is {sized(hardware.device_bytes)}"
        shortages.append(f"a device would take {sized(found.device_bytes)}, and {there}; {_advice(remedies)}")
    if hardware.host_bytes is not None and found.machine_bytes > hardware.host_bytes:
        fullest = found.fullest_on_host
        starts = fullest.name == "start"
        remedies = ["zero3_init_flag: true in the launch file"] * (
            starts and engine.launch.stage == 3 and engine.loads_whole
        )
        if found.on_cpu:
            remedies += _training_remedies(fullest, engine, train)
        if not starts and found.averaging_bytes and averaging.precision == "compensated":
            remedies.append("averaging.precision=plain (4 bytes an element in place of 6)")
        if found.ranks_a_machine > 1:
            remedies.append("fewer ranks on each machine")
        ranks = f"the {found.ranks_a_machine} ranks of a machine would take {sized(found.machine_bytes)}"
        remedies = remedies or ["more than that in --host_memory, or a smaller model"]
        shortages.append(f"{ranks}, and --host_memory is {sized(hardware.host_bytes)}; {_advice(remedies)}")
    return shortages


def _training_remedies(fullest: Phase, engine: PlannedEngine, train: TrainConfig) -> list[str]:
    """What makes activations smaller, where they are what does not fit, and what shards more of the state."""
    launch, remedies = engine.launch, []
    rows, steps = train.per_device_train_batch_size, train.gradient_accumulation_steps
    if fullest.name == FORWARD_BACKWARD and rows > 1:
        remedies.append(
            f"train.per_device_train_batch_size below {rows} with train.gradient_accumulation_steps above {steps}"
        )
    if fullest.name == FORWARD_BACKWARD and not train.gradient_checkpointing:
        remedies.append("train.gradient_checkpointing=true")
    kind = "_cpu" if engine.on_cpu else "_multinode" if launch.num_machines > 1 else ""
    what = "a higher ZeRO stage" if launch.world_size > 1 else "more ranks at a high ZeRO stage"
    sharded = launch.stage == 3 or launch.engine == "FSDP2"
    return [*remedies, "more ranks" if sharded else f"{what} (launch/accelerate/zero3{kind}.yaml)"]


def _offloading(engine: PlannedEngine) -> list[str]:
    """What moves state from the device to the host, where anything is left to move."""
    files = {1: ("zero2_offload",), 2: ("zero2_offload",), 3: ("zero3_offload", "zero3_offload_param")}
    offloaded = (engine.offloads("optimizer"), engine.offloads("param"))
    left = [
        file
        for file, done in zip(files.get(engine.launch.stage or 0, ()), offloaded, strict=False)
        if not done
    ]
    return [f"offloading (--deepspeed_config_file ds_configs/{file}.json)" for file in left[:1]]


def _advice(remedies: list[str]) -> str:
    *others, last = remedies
    return f"what helps: {', '.join(others)} or {last}" if others else f"what helps: {last}"

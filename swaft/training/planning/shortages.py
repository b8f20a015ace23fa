"""What of a plan does not fit, each with the settings that would help this run, and no others."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from swaft.training.config import AveragingConfig, TrainConfig
from swaft.training.planning import sized
from swaft.training.planning.engines import PlannedEngine
from swaft.training.planning.memory import FORWARD_BACKWARD, Phase

if TYPE_CHECKING:
    from swaft.training.planning.plan import RunPlan

OFFLOADING = {1: ("zero2_offload",), 2: ("zero2_offload",), 3: ("zero3_offload", "zero3_offload_param")}
"""DeepSpeed files that offload the optimizer, and the weights too, by stage."""


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
    shortages, stage = [], engine.launch.stage
    if hardware.device_bytes is not None and found.device_bytes > hardware.device_bytes:
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
            f"{sized(hardware.device_bytes)}; {_advice(_in_training(fullest, engine, train) | offloading)}"
        )
    if hardware.host_bytes is not None and found.machine_bytes > hardware.host_bytes:
        fullest = found.fullest_on_host
        starts = fullest.name == "start"
        spares = found.averaging_bytes > 0 and averaging.precision == "compensated"
        remedies = {"zero3_init_flag: true in the launch file": starts and stage == 3 and engine.loads_whole}
        remedies |= _in_training(fullest, engine, train) if found.on_cpu else {}
        remedies["averaging.precision=plain (4 bytes an element in place of 6)"] = not starts and spares
        remedies["fewer ranks on each machine"] = found.ranks_a_machine > 1
        shortages.append(
            f"the {found.ranks_a_machine} ranks of a machine would take {sized(found.machine_bytes)}, and "
            f"--host_memory is {sized(hardware.host_bytes)}; {_advice(remedies)}"
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

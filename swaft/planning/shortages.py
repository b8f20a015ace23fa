"""What does not fit into the memory there is, and which settings would help."""

from __future__ import annotations

from swaft.config import AveragingConfig, TrainConfig
from swaft.planning.engines import Engine
from swaft.planning.memory import sized
from swaft.planning.plan import RunPlan, Target

BACKWARD = "forward and backward"


def find_shortages(
    found: RunPlan, target: Target, engine: Engine, train: TrainConfig, averaging: AveragingConfig
) -> list[str]:
    """Return what does not fit, each sentence with the remedies that apply to this run.

    Args:
        found: what the run takes.
        target: what there is.
        engine: what the launch line says of it.
        train: section ``train``.
        averaging: section ``averaging``.
    """
    problems = []
    if target.device_bytes is not None and found.device_bytes > target.device_bytes:
        fullest = max(found.phases, key=lambda phase: phase.device_bytes)
        remedies = [*_step_remedies(fullest.name, train), *_sharding(engine, target), *_offloading(engine)]
        problems.append(
            _sentence("a device", found.device_bytes, "device_memory", target.device_bytes, remedies)
        )
    if target.host_bytes is not None and found.machine_bytes > target.host_bytes:
        fullest = found.fullest_on_host
        remedies = _loading(engine) if fullest.name == "start" else []
        if found.on_cpu:
            remedies += [*_step_remedies(fullest.name, train), *_sharding(engine, target)]
        if fullest.name != "start" and found.averaging_bytes and averaging.precision == "compensated":
            remedies.append("averaging.precision=plain (4 bytes an element in place of 6)")
        if found.ranks_a_machine > 1:
            remedies.append("fewer ranks on each machine")
        what = f"the {found.ranks_a_machine} ranks of a machine"
        problems.append(_sentence(what, found.machine_bytes, "host_memory", target.host_bytes, remedies))
    return problems


def _step_remedies(fullest: str, train: TrainConfig) -> list[str]:
    """What makes activations smaller, where it is they that are in the way."""
    if fullest != BACKWARD:
        return []
    batch, accumulation = train.per_device_train_batch_size, train.gradient_accumulation_steps
    remedies = []
    if batch > 1:
        remedies.append(
            f"train.per_device_train_batch_size below {batch} with train.gradient_accumulation_steps above "
            f"{accumulation}"
        )
    if not train.gradient_checkpointing:
        remedies.append("train.gradient_checkpointing=true")
    return remedies


def _sharding(engine: Engine, target: Target) -> list[str]:
    """What spreads more of the state over the ranks."""
    launch = engine.launch
    kind = "_cpu" if target.on_cpu else "_multinode" if launch.num_machines > 1 else ""
    if launch.stage == 3 or launch.engine == "FSDP2":
        return ["more ranks"]
    what = "a higher ZeRO stage" if launch.world_size > 1 else "more ranks at a high ZeRO stage"
    return [f"{what} (launch/accelerate/zero3{kind}.yaml)"]


def _offloading(engine: Engine) -> list[str]:
    """What moves state from the device to the host."""
    stage = engine.launch.stage
    if stage in (1, 2, 3) and not engine.offloads_masters:
        file = "zero3_offload" if stage == 3 else "zero2_offload"
    elif stage == 3 and not engine.offloads_weights:
        file = "zero3_offload_param"
    else:
        return []
    return [f"offloading (--deepspeed_config_file ds_configs/{file}.json)"]


def _loading(engine: Engine) -> list[str]:
    """What keeps the ranks from loading a whole model each."""
    return (
        ["zero3_init_flag: true in the launch file"]
        if engine.launch.stage == 3 and engine.loads_whole
        else []
    )


def _sentence(what: str, needed: int, option: str, there: int, remedies: list[str]) -> str:
    *others, last = remedies or [f"more than that in --{option}, or a smaller model"]
    advice = f"{', '.join(others)} or {last}" if others else last
    return f"{what} would take {sized(needed)}, and --{option} is {sized(there)}; what helps: {advice}"

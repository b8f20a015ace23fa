"""Plans the run of a recipe from its launch line."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from swaft.errors import ConfigError
from swaft.training.checks.problems import MISSING, Problems
from swaft.training.checks.recipe import is_recipe, load_recipe, require_python
from swaft.training.checks.start import check_start
from swaft.training.config import load_config
from swaft.training.launch.launcher import Launch, read_launch, read_script
from swaft.training.planning.engines import Engine
from swaft.training.planning.model import planned_model
from swaft.training.planning.plan import RunPlan, Target, find_shortages, plan_run

RANKS_OF_A_MACHINE = 8
"""Devices that machines have at most, as a rule."""


def plan_recipe(words: Sequence[str], target: Target) -> RunPlan:
    """Plan the run that ``accelerate launch`` would start with these words.

    Args:
        words: the command line after ``accelerate launch``.
        target: what the run is planned for.

    Returns:
        The plan; what the run would refuse and a plan can do without is on it.

    Raises:
        ConfigError: the line, a file or the settings are wrong, or the run cannot be planned.
    """
    launch, script = read_launch(words), read_script(words)
    if script.is_file:
        require_python(Path(script.path))
    if not script.is_file or not is_recipe(Path(script.path)):
        raise ConfigError(
            f"{script.path}: a plan needs to know the model and its batches, which only swaft's recipes tell (a "
            "script with Config and prepare); name one of recipes/, with the settings of your run"
        )
    recipe = load_recipe(Path(script.path))
    config: Any = load_config(recipe.config_class, script.arguments)
    problems = Problems()
    ready: Any = recipe.prepare(config, problems)
    start = check_start(config, ready, launch.environ, problems)
    if start.total_steps is MISSING and ready.rule is not None:
        problems.add(
            ["the length of the run depends on the training rows; set train.max_steps to plan without them"]
        )
    plan = None if ready.rule is None else start.plan
    if any(needed is MISSING for needed in (ready.model_config, ready.objective, start.engine, plan)):
        raise ConfigError(problems.found)
    engine = Engine(launch, start.engine)
    model = planned_model(config, ready.model_config)
    found = plan_run(
        engine,
        config,
        build_model=model.build,
        make_batch=model.batch,
        objective=ready.objective,
        rule_plan=plan,
        target=target,
    )
    return dataclasses.replace(
        found,
        shortages=find_shortages(found, target, engine, config.train, config.averaging),
        refused=problems.found,
        notes=machine_notes(launch),
    )


def machine_notes(launch: Launch) -> list[str]:
    """Say so where more ranks are planned for one machine than one is likely to have.

    Args:
        launch: the launch line.

    Returns:
        A sentence that names the launch file for several machines, or none.
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

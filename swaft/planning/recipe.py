"""Plans the run of a recipe from its launch line."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from swaft.averaging.rules import Plan
from swaft.config import load_config
from swaft.errors import ConfigError
from swaft.planning.engines import Engine
from swaft.planning.model import planned_model
from swaft.planning.plan import RunPlan, Target, plan_run
from swaft.training.launcher import read_launch, read_script
from swaft.training.pretrained import hidden_size
from swaft.training.problems import MISSING, Problems
from swaft.training.recipe import Prepared, is_recipe, load_recipe
from swaft.training.schedule import planned_steps


def plan_recipe(words: Sequence[str], target: Target) -> RunPlan:
    """Plan the run that ``accelerate launch`` would start with these words.

    Args:
        words: the command line after ``accelerate launch``.
        target: what the run is planned for.

    Raises:
        ConfigError: the line, a file or the settings are wrong, or the run cannot be planned.
    """
    launch, script = read_launch(words), read_script(words)
    if not script.is_file or not is_recipe(Path(script.path)):
        raise ConfigError(
            f"{script.path}: a plan needs to know the model and its batches, which only swaft's recipes tell (a "
            "script with Config and prepare); name one of recipes/, with the settings of your run"
        )
    recipe = load_recipe(Path(script.path))
    config: Any = load_config(recipe.config_class, script.arguments)
    problems = Problems()
    ready: Any = recipe.prepare(config, problems)
    if any(needed is MISSING for needed in (ready.model_config, ready.objective, ready.rule)):
        raise ConfigError(problems.found)
    engine = Engine(launch, config.train, hidden_size=hidden_size(ready.model_config))
    model = planned_model(config, ready.model_config)
    return plan_run(
        engine,
        config.train,
        config.averaging,
        build_model=model.build,
        make_batch=model.batch,
        objective=ready.objective,
        rule_plan=_rule_plan(config, ready, launch.world_size, problems),
        target=target,
    )


def _rule_plan(config: Any, ready: Prepared, world_size: int, problems: Problems) -> Plan | None:
    """Return the averaging rule's numbers for the run's length.

    Raises:
        ConfigError: the length depends on rows that cannot be read here.
    """
    if ready.rule is None:
        return None
    steps = config.train.max_steps
    if steps <= 0:
        if ready.rows is MISSING:
            raise ConfigError(
                [
                    *problems.found,
                    "the length of the run depends on the training rows; set train.max_steps to plan without them",
                ]
            )
        steps = planned_steps(config.train, num_rows=len(ready.rows["train"]), world_size=world_size)
    return ready.rule.plan(steps)

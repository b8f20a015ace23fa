"""Finds settings that cannot work, before a model or a row is loaded; builds the averaging rule they describe."""

from __future__ import annotations

import re
from dataclasses import fields
from typing import Any

from swaft.averaging.rules import RULES, Plan, Rule
from swaft.errors import ConfigError
from swaft.options import check, options_of
from swaft.training.config.schema import AveragingConfig, RecipeConfig, Section
from swaft.training.config.values import chosen_options

SETTINGS_OF_ARGUMENTS = {name: f"averaging.{name}" for rule in RULES.values() for name in options_of(rule)}
SETTINGS_OF_ARGUMENTS["total_steps"] = "train.max_steps, train.num_train_epochs"
"""The settings that arguments of rules and of their plans come from."""


def check_config(config: Any) -> list[str]:
    """Every problem of a configuration, each message led by the full name of its setting.

    Args:
        config: a `RecipeConfig`, or any other dataclass of section dataclasses.
    """
    sections = {field.name: getattr(config, field.name) for field in fields(config)}
    problems = [
        f"{name}.{setting}: {fault}"
        for name, section in sections.items()
        for setting, fault in check(section) or (section.conflicts() if isinstance(section, Section) else ())
    ]
    if problems or not isinstance(config, RecipeConfig):
        return problems
    problems += [f"{setting}: {fault}" for setting, fault in config.conflicts()]
    if config.train.max_steps > 0:
        problems += check_averaging(config.averaging, config.train.max_steps)
    return problems


def check_averaging(averaging: AveragingConfig, total_steps: int) -> list[str]:
    """Problems that show once the length of the run is known: options that do not fit it or each other."""
    try:
        plan_rule(build_rule(averaging), total_steps)
    except ConfigError as error:
        return error.problems
    return []


def build_rule(averaging: AveragingConfig) -> Rule | None:
    """Return the averaging rule, None for ``rule: none``.

    Args:
        averaging: section ``averaging``, whose options are called as the arguments of the rules; a null leaves
            the choice to the rule.

    Raises:
        ConfigError: where an option is set that the rule would not use, or one is missing that it needs.
    """
    kind = RULES.get(averaging.rule)
    options = chosen_options(averaging, kind, f"averaging.rule={averaging.rule}")
    return None if kind is None else kind(start=averaging.start, every=averaging.every, **options)


def plan_rule(rule: Rule | None, total_steps: int) -> Plan | None:
    """Return the events of a run of ``total_steps`` optimizer steps, None without a rule.

    Raises:
        ConfigError: the rule does not fit; its arguments are named as the settings they come from.
    """

    def setting(argument: re.Match[str]) -> str:
        return SETTINGS_OF_ARGUMENTS.get(argument[0], argument[0])

    try:
        return None if rule is None else rule.plan(total_steps)
    except ConfigError as error:
        arguments = r"(?<![\w.])\w+(?=[=)]| is )"  # every=2, (every), every is
        raise ConfigError([re.sub(arguments, setting, problem) for problem in error.problems]) from error

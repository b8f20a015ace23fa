"""Finds settings that cannot work, before a model or a row is loaded; builds the averaging rule they describe."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import fields
from typing import Any

from swaft.averaging.rules import RULES, Plan, Rule
from swaft.errors import ConfigError
from swaft.options import check, options_of
from swaft.training.config.schema import AveragingConfig, EvalConfig, Section, TrainConfig

RULE_ARGUMENTS = {name: f"averaging.{name}" for rule in RULES.values() for name in options_of(rule)}
SETTINGS_OF_ARGUMENTS = RULE_ARGUMENTS | {"total_steps": "train.max_steps, train.num_train_epochs"}
"""The settings that arguments of rules and of their plans come from."""


def check_config(config: Any) -> list[str]:
    """Every problem of a configuration, each message led by the full name of its setting.

    Args:
        config: a dataclass of section dataclasses.
    """
    sections = {field.name: getattr(config, field.name) for field in fields(config)}
    problems = [
        f"{name}.{setting}: {fault}"
        for name, section in sections.items()
        for setting, fault in check(section) or (section.conflicts() if isinstance(section, Section) else ())
    ]
    averaging, evaluation, train = (sections.get(name) for name in ("averaging", "eval", "train"))
    if problems or not isinstance(averaging, AveragingConfig):
        return problems
    if isinstance(evaluation, EvalConfig):
        problems += _check_choosing(averaging, evaluation)
    if isinstance(train, TrainConfig) and train.max_steps > 0:
        problems += check_averaging(averaging, train.max_steps)
    return problems


def check_averaging(averaging: AveragingConfig, total_steps: int) -> list[str]:
    """Problems that show once the length of the run is known: options that do not fit it or each other.

    Args:
        averaging: the section.
        total_steps: optimizer steps of the run.
    """
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
    kind = None if averaging.rule == "none" else RULES[averaging.rule]
    known = {} if kind is None else options_of(kind)
    borrowed = set(RULE_ARGUMENTS) - {"start", "every"}
    options = {
        option.name: value
        for option in fields(averaging)
        if option.name in borrowed and (value := getattr(averaging, option.name)) is not None
    }
    problems = [
        f"averaging.{name} is {value}, which averaging.rule={averaging.rule} does not use; remove it"
        for name, value in options.items()
        if name not in known
    ]
    problems += [
        f"averaging.{name} is null, which averaging.rule={averaging.rule} needs; set it"
        for name, option in known.items()
        if option.required and name not in options
    ]
    if problems:
        raise ConfigError(problems)
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


def _check_choosing(averaging: AveragingConfig, evaluation: EvalConfig) -> Iterator[str]:
    """Problems of choosing between last and averaged weights, which both sections share."""
    if evaluation.keep_best in ("averaged", "either") and averaging.rule == "none":
        yield (
            f"eval.keep_best: {evaluation.keep_best} needs averaged weights, and averaging.rule is none; set "
            "averaging.rule, or eval.keep_best=last"
        )
    if evaluation.early_stopping_patience is not None and averaging.rule == "merge":
        yield (
            "eval.early_stopping_patience: averaging.rule=merge weighs each step by how far it is from the run's "
            "end, which has to be known; use another rule (swa, ema), or train to the end"
        )
    chooses = evaluation.keep_best != "none" or evaluation.early_stopping_patience is not None
    chooses |= averaging.rule == "windows" or averaging.search_blend
    if evaluation.metric_for_best_model is not None and not chooses:
        yield (
            f"eval.metric_for_best_model: {evaluation.metric_for_best_model} decides between weights, and nothing "
            "chooses any; set eval.keep_best or eval.early_stopping_patience, or remove it"
        )

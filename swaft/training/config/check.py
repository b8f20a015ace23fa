"""Finds settings that cannot work, alone or together, before a model or a row is loaded."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields
from typing import Any

from swaft.errors import ConfigError
from swaft.training.config.check_sections import SECTION_CHECKS
from swaft.training.config.leaves import leaves
from swaft.training.config.schema import AveragingConfig, EvalConfig, TrainConfig
from swaft.training.config.values import not_allowed


def check_config(config: Any) -> list[str]:
    """Every problem of a configuration, each message led by the full name of its setting.

    Args:
        config: a dataclass of section dataclasses. Sections of an unknown class are only checked for
            values outside their choices.
    """
    problems = list(_choices(config))
    for field in fields(config):
        section = getattr(config, field.name)
        check = SECTION_CHECKS.get(type(section))
        problems += check(section) if check else []
    return problems or [*_check_choosing(config), *_check_known_length(config)]


def check_averaging(averaging: AveragingConfig, total_steps: int) -> list[str]:
    """Problems that show once the length of the run is known: options that do not fit it or each other.

    Args:
        averaging: the section.
        total_steps: optimizer steps of the run.
    """
    from swaft.training.config.rule import build_rule  # only here: the other checks need no torch

    try:
        rule = build_rule(averaging)
        if rule is not None:
            rule.plan(total_steps)
    except ConfigError as error:
        return error.problems
    return []


def _check_known_length(config: Any) -> list[str]:
    averaging, train = getattr(config, "averaging", None), getattr(config, "train", None)
    if isinstance(averaging, AveragingConfig) and isinstance(train, TrainConfig) and train.max_steps > 0:
        return check_averaging(averaging, train.max_steps)
    return []


def _check_choosing(config: Any) -> list[str]:
    """Problems of choosing between last and averaged weights, which sections `eval` and `averaging` share."""
    averaging, evaluation = getattr(config, "averaging", None), getattr(config, "eval", None)
    if not isinstance(averaging, AveragingConfig) or not isinstance(evaluation, EvalConfig):
        return []
    problems = []
    if evaluation.keep_best in ("averaged", "either") and averaging.rule == "none":
        problems.append(
            f"eval.keep_best: {evaluation.keep_best} needs averaged weights, and averaging.rule is none; set "
            "averaging.rule, or eval.keep_best=last"
        )
    if evaluation.early_stopping_patience is not None and averaging.rule == "merge":
        problems.append(
            "eval.early_stopping_patience: averaging.rule=merge weighs each step by how far it is from the run's "
            "end, which has to be known; use another rule (swa, ema), or train to the end"
        )
    chooses = evaluation.keep_best != "none" or evaluation.early_stopping_patience is not None
    if evaluation.metric_for_best_model is not None and not (
        chooses or averaging.rule == "windows" or averaging.search_blend
    ):
        problems.append(
            f"eval.metric_for_best_model: {evaluation.metric_for_best_model} decides between weights, and nothing "
            "chooses any; set eval.keep_best or eval.early_stopping_patience, or remove it"
        )
    return problems


def _choices(config: Any) -> Iterator[str]:
    for name, leaf in leaves(type(config)).items():
        section, short = name.split(".")
        value = getattr(getattr(config, section), short)
        if leaf.choices and value is not None and value not in leaf.choices:
            yield f"{name}: {not_allowed(str(value), leaf.choices)}"

"""Turns section ``averaging`` of a configuration into the averaging rule it describes."""

from __future__ import annotations

from dataclasses import MISSING, fields

from swaft.averaging.rules import RULES, Rule
from swaft.errors import ConfigError
from swaft.training.config.schema import AveragingConfig

AVERAGING_COMMON = ("rule", "start", "every", "precision", "threads", "spill_dir", "blend", "search_blend")
"""Options of section ``averaging`` that every rule uses, or the averager itself."""


def build_rule(averaging: AveragingConfig) -> Rule | None:
    """Return the averaging rule, None for ``rule: none``.

    Args:
        averaging: section ``averaging``, whose options are called as the arguments of the rules; a null leaves
            the choice to the rule.

    Raises:
        ConfigError: where an option is set that the rule would not use, or one is missing that it needs.
    """
    kind = None if averaging.rule == "none" else RULES[averaging.rule]
    arguments = () if kind is None else fields(kind)
    options = {
        option.name: value
        for option in fields(averaging)
        if option.name not in AVERAGING_COMMON and (value := getattr(averaging, option.name)) is not None
    }
    problems = [
        f"averaging.{name} is {value}, which averaging.rule={averaging.rule} does not use; remove it"
        for name, value in options.items()
        if name not in {argument.name for argument in arguments}
    ]
    problems += [
        f"averaging.{argument.name} is null, which averaging.rule={averaging.rule} needs; set it"
        for argument in arguments
        if argument.default is MISSING and argument.name not in options
    ]
    if problems:
        raise ConfigError(problems)
    return None if kind is None else kind(start=averaging.start, every=averaging.every, **options)

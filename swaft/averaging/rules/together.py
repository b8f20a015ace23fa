"""Several rules planned for one run, with all that is wrong told at once."""

from __future__ import annotations

from collections.abc import Mapping
from numbers import Integral

from swaft.averaging.rules.base import Plan, Rule
from swaft.errors import ConfigError


def plan_all(rules: Mapping[str, Rule], total_steps: int, precision: str) -> dict[str, Plan]:
    """The events of every rule in a run of ``total_steps`` optimizer steps.

    Args:
        rules: by name.
        total_steps: of the whole run.
        precision: of running means, ``compensated`` or ``plain``.

    Raises:
        ConfigError: with every rule, name or number that does not fit.
    """
    problems = [
        f"rule: {name!r} is no name of a rule, expected text that is not empty"
        for name in rules
        if not isinstance(name, str) or not name
    ]
    problems += [
        f"rule: {rule!r} is no rule, expected swaft.SWA(...), say, or several by name: {{'swa': swaft.SWA(...)}}"
        for rule in rules.values()
        if not hasattr(rule, "plan")
    ]
    if problems:
        raise ConfigError(problems)
    if not rules:
        problems.append("rule={} names no rule, expected at least one")
    if not isinstance(total_steps, Integral) or isinstance(total_steps, bool) or total_steps < 1:
        raise ConfigError(f"total_steps is {total_steps!r}, expected a whole number of optimizer steps")
    if precision not in ("compensated", "plain"):
        problems.append(f"averaging.precision is {precision!r}, expected compensated or plain")
    plans = {}
    for name, rule in rules.items():
        try:
            plans[name] = rule.plan(total_steps)
        except ConfigError as error:
            problems += error.problems
    if problems:
        raise ConfigError(problems)
    return plans

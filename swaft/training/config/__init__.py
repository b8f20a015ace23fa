"""Typed settings of a run, filled from defaults, YAML files and the command line.

Settings that only one family of tasks has are defined with its rows, in `swaft.training.data`.
"""

from swaft.training.config.load import (
    build_rule,
    check_averaging,
    check_config,
    flatten,
    load_config,
    plan_rule,
    read_config,
    to_yaml,
)
from swaft.training.config.schema import (
    AdapterConfig,
    AnyModelConfig,
    AveragingConfig,
    EvalConfig,
    ModelConfig,
    NoiseConfig,
    RecipeConfig,
    RowsConfig,
    Section,
    TrackConfig,
    TrainConfig,
)

__all__ = [
    "AdapterConfig",
    "AnyModelConfig",
    "AveragingConfig",
    "EvalConfig",
    "ModelConfig",
    "NoiseConfig",
    "RecipeConfig",
    "RowsConfig",
    "Section",
    "TrackConfig",
    "TrainConfig",
    "build_rule",
    "check_averaging",
    "check_config",
    "flatten",
    "load_config",
    "plan_rule",
    "read_config",
    "to_yaml",
]

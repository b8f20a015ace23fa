"""Typed settings of a run, filled from defaults, YAML files and the command line.

What only one family of tasks has is beside this: `classification`, `question_answering`, `seq2seq`, `causal_lm`.
"""

from swaft.training.config.check import build_rule, check_averaging, check_config, plan_rule
from swaft.training.config.load import flatten, load_config, read_config, to_yaml
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

"""Typed settings of a run, filled from defaults, YAML files and the command line."""

from swaft.training.config.causal_lm import CausalConfig, CausalDataConfig
from swaft.training.config.check import build_rule, check_averaging, check_config, plan_rule
from swaft.training.config.load import load_config, read_config
from swaft.training.config.question_answering import (
    QuestionAnsweringConfig,
    QuestionAnsweringDataConfig,
    QuestionAnsweringEvalConfig,
)
from swaft.training.config.render import flatten, to_yaml
from swaft.training.config.schema import (
    AdapterConfig,
    AveragingConfig,
    ClassificationConfig,
    DataConfig,
    EvalConfig,
    ModelConfig,
    NoiseConfig,
    RowsConfig,
    Section,
    TrackConfig,
    TrainConfig,
)
from swaft.training.config.seq2seq import (
    Seq2SeqConfig,
    Seq2SeqDataConfig,
    Seq2SeqEvalConfig,
    Seq2SeqModelConfig,
    Seq2SeqTrainConfig,
)

__all__ = [
    "AdapterConfig",
    "AveragingConfig",
    "CausalConfig",
    "CausalDataConfig",
    "ClassificationConfig",
    "DataConfig",
    "EvalConfig",
    "ModelConfig",
    "NoiseConfig",
    "QuestionAnsweringConfig",
    "QuestionAnsweringDataConfig",
    "QuestionAnsweringEvalConfig",
    "RowsConfig",
    "Section",
    "Seq2SeqConfig",
    "Seq2SeqDataConfig",
    "Seq2SeqEvalConfig",
    "Seq2SeqModelConfig",
    "Seq2SeqTrainConfig",
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

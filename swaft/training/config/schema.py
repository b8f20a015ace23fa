"""The settings of a run as typed dataclasses, one per section, with Hugging Face's names for the settings.

The docstring under a field is its help text: what it is, its unit, and why it has that default.
Its type says which values are allowed (`swaft.options`); a section's `conflicts` reports settings that clash.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal

from accelerate.utils import LoggerType

from swaft.averaging.rules import RULES
from swaft.averaging.rules.base import Blend, Precision
from swaft.averaging.rules.power_ema import SIGMA_REL_LIMIT
from swaft.noise import R3F, R4F, RDrop
from swaft.options import (
    Count,
    NotNegative,
    Positive,
    Range,
    ShareBelowOne,
    StepOrShare,
    WholeNumber,
    options_of,
)
from swaft.training.config.values import DELIMITERS, Users, borrows, not_allowed, split_names, written
from swaft.training.metrics import unfit

Fault = tuple[str, str]
"""Name of a setting within its section, and what is wrong with it."""

LONGEST_TIMEOUT = 365 * 24 * 3600
"""Seconds. torch counts a timeout in nanoseconds in 64 bits, which hold no more than three centuries."""
HIGHEST_SEED = 4_000_000_000
"""numpy takes seeds below 2**32, and the rank and the step are added to this one."""


class Section:
    """A section of settings."""

    paths: ClassVar[tuple[str, ...]] = ()
    """Settings that name a file or folder, in which `~` is the user's home, as in transformers."""
    choice: ClassVar[str] = ""
    """Full name of the setting that decides which of the others are used (`averaging.rule`); empty: all are."""
    users: ClassVar[Users] = {}
    """Which values of `choice` use another setting, by its name. A setting that is not listed is always used."""

    def __post_init__(self) -> None:
        for name in self.paths:
            if path := getattr(self, name):
                setattr(self, name, os.path.expanduser(path))

    def conflicts(self) -> Iterator[Fault]:
        """Yield settings that are each allowed but do not work together."""
        section, _, leaf = self.choice.partition(".")
        chosen = written(getattr(self, leaf)) if leaf else ""
        for name in self.users:
            value, default = getattr(self, name), options_of(type(self))[name].default
            if value != default and chosen not in (users := self.users_of(name, value)):
                reason = f"is {written(value)}, which {self.choice}={chosen} does not use"
                use = f"({', '.join(users)} {'do' if len(users) > 1 else 'does'})"
                other = "choose one of these" if len(users) > 1 else f"set {self.choice}={users[0]}"
                yield name, f"{reason} {use}; {other}, or remove it: {section}.{name}={written(default)}"

    @classmethod
    def users_of(cls, name: str, value: Any) -> list[str]:
        """Return the values of `choice`, as YAML writes them, that use a setting with this value."""
        return [user for user, texts in cls.users[name].items() if not texts or value in texts]


@dataclass(kw_only=True)
class AdapterConfig(Section):
    """Whether to train low-rank adapters instead of the weights themselves."""

    choice: ClassVar[str] = "model.use_peft"
    users: ClassVar[Users] = {
        name: {"true": ()} for name in ("lora_r", "lora_alpha", "lora_dropout", "lora_target_modules")
    }
    use_peft: bool = False
    """Train LoRA adapters and the new head, with the pretrained weights frozen; `final/` and
    `final-averaged/` are then adapter folders. LoRA needs a higher `train.learning_rate`, 1e-4 to 5e-4."""
    lora_r: Count = 16
    """Rank of the adapters."""
    lora_alpha: Count = 32
    """The update is scaled by this number divided by the rank."""
    lora_dropout: ShareBelowOne = 0.05
    """Dropout before the adapters."""
    lora_target_modules: str | None = None
    """Layers that get adapters: comma-separated names (query,value), or all-linear; null: those that
    peft chooses for the architecture, mostly the attention's queries and values."""

    def conflicts(self) -> Iterator[Fault]:
        """Yield adapter options that are set although no adapters are trained, and empty module names."""
        yield from super().conflicts()
        names = self.lora_target_modules
        if names is not None and not all(split_names(names)):
            advice = "write comma-separated names (query,value), or all-linear"
            yield "lora_target_modules", f"'{names}' holds an empty name; {advice}"


@dataclass(kw_only=True)
class AnyModelConfig(AdapterConfig):
    """Which model to train, pretrained or new."""

    paths: ClassVar[tuple[str, ...]] = ("model_name_or_path", "tokenizer_name")
    model_name_or_path: Any
    """Hub id or folder of the pretrained model."""
    tokenizer_name: str | None = None
    """Hub id or folder of the tokenizer; null: the model's own."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model. Off, because that code runs with your permissions."""

    @property
    def described(self) -> dict[str, Any] | None:
        """Entries of a new model's transformers configuration; None: the model is pretrained."""
        return None

    @property
    def setting(self) -> str:
        """The setting that says which model."""
        return "model.model_name_or_path" if self.described is None else "model.config"


@dataclass(kw_only=True)
class ModelConfig(AnyModelConfig):
    """Which pretrained model to fine-tune."""

    model_name_or_path: str
    """Hub id or folder of the pretrained model; `demo` is the MiniLM encoder of the package extra
    `swaft[demo]`, which needs no network."""
    ignore_mismatched_sizes: bool = False
    """Put a new head on a model whose own head is for a different number of classes (an MNLI model, say), or for
    classes with other names. false: that is an error; a head for the same classes is kept, in its own order."""


@dataclass(kw_only=True)
class RowsConfig(Section):
    """Which rows to train and evaluate on, and which of their columns.

    The rows come from exactly one of `task_name`, `dataset_name` and `train_file`. A later config or an
    override that sets one of the three replaces the whole source, including its other splits.
    """

    paths: ClassVar[tuple[str, ...]] = ("dataset_name", "train_file", "validation_file", "test_file")
    task_name: str | None = None
    """Name of a task: a folder in `$SWAFT_DATA` (default ../shared/data if it exists) holding
    train.parquet and so on, otherwise a GLUE task on the hub; `python_docstrings` is built on this machine."""
    dataset_name: str | None = None
    """Hub id of a dataset, or a folder laid out as one (train/, validation/, test/ with parquet, csv, tsv
    or json files)."""
    dataset_config_name: str | None = None
    """Configuration of `dataset_name`, if the dataset has several."""
    train_file: str | None = None
    """Training rows: a parquet, csv, tsv, json or jsonl file."""
    validation_file: str | None = None
    """Validation rows that go with `train_file`; null: the run is not evaluated on validation rows."""
    test_file: str | None = None
    """Test rows that go with `train_file`."""
    delimiter: str | None = None
    """Character between the cells of a csv or tsv file (`;`, `tab`); null: a comma in a csv file, a tab in a tsv
    file, which has no quoting."""
    validation_fraction: Annotated[float, Range(above=0, below=1)] | None = None
    """Share of the training rows to use for validation instead (0.1 is a tenth), drawn at random and the same for
    every `train.seed`; an error if the rows have a validation split of their own."""
    skip_bad_rows: bool = False
    """Leave out rows with a blank text, without a label, or with answers that cannot be read, and log which;
    false: the first such row is an error."""
    max_train_samples: Count | None = None
    """Use only this many training rows, from the first on; null: all."""
    max_eval_samples: Count | None = None
    """Use only this many validation rows, from the first on; null: all."""
    max_predict_samples: Count | None = None
    """Use only this many test rows, from the first on; null: all."""
    preprocessing_num_workers: Count | None = None
    """Processes that tokenize the rows; null: one. Of the ranks of a machine the first tokenizes, and the others
    read what it has cached; only rows in memory (SQuAD's json files) are tokenized by every rank."""
    split_special_tokens: bool = True
    """Read a special token spelled out in a text (`</s>`, `[SEP]`) as plain text; false: it keeps its special
    meaning, for texts that contain such tokens on purpose."""

    @property
    def languages(self) -> tuple[str, ...]:
        """Languages to evaluate on besides the language of the training rows."""
        return ()

    def conflicts(self) -> Iterator[Fault]:
        """Yield rows with no source or several, and settings that do not apply to the source."""
        sources = {name: getattr(self, name) for name in ("task_name", "dataset_name", "train_file")}
        named = [f"data.{name}={value}" for name, value in sources.items() if value is not None]
        if not named:
            yield "task_name", "no rows named; set data.task_name, data.dataset_name or data.train_file"
        if len(named) > 1:
            yield "task_name", f"{' and '.join(named)} each name the rows; keep one"
        for name in ("validation_file", "test_file"):
            if getattr(self, name) is not None and self.train_file is None:
                yield name, "is used together with data.train_file, which is not set"
        if self.dataset_config_name is not None and self.dataset_name is None:
            yield "dataset_config_name", "is a configuration of data.dataset_name, which is not set"
        if self.validation_fraction is not None and self.validation_file is not None:
            yield "validation_fraction", "data.validation_file names the validation rows already; keep one"
        if self.delimiter is not None:
            character = DELIMITERS.get(self.delimiter, self.delimiter)
            files = (self.train_file, self.validation_file, self.test_file)
            is_table = any((file or "").lower().endswith((".csv", ".tsv")) for file in files)
            if len(character) != 1 or character in '"\r\n':
                yield "delimiter", f"{self.delimiter!r} is not one character; expected one such as ; or tab"
            elif not is_table and self.dataset_name is None:  # of a dataset it is seen when it is read
                yield "delimiter", "is about csv and tsv files, but none is given; remove it"


@dataclass(kw_only=True)
class TrainConfig(Section):
    """How to optimise, and where the results go."""

    paths: ClassVar[tuple[str, ...]] = ("output_dir", "resume_from_checkpoint")
    output_dir: str
    """Run folder, for the configuration, the metrics and the trained weights."""
    per_device_train_batch_size: Count = 16
    """Rows per device and micro-batch. The total batch size is this times accumulation steps times devices."""
    gradient_accumulation_steps: Count = 1
    """Micro-batches per optimizer step."""
    num_train_epochs: Positive = 3.0
    """Passes over the training rows, may be fractional; `max_steps` wins if it is set."""
    max_steps: int = -1
    """Total optimizer steps; -1: as many as `num_train_epochs` takes."""
    learning_rate: Positive = 2e-5
    """Peak learning rate of AdamW. 2e-5 is usual for BERT; small models take 5e-5 to 1e-4."""
    weight_decay: NotNegative = 0.01
    """Decoupled weight decay; not applied to biases or normalisation weights."""
    adam_beta1: ShareBelowOne = 0.9
    """Decay of AdamW's running mean of gradients."""
    adam_beta2: ShareBelowOne = 0.999
    """Decay of AdamW's running mean of squared gradients."""
    adam_epsilon: Positive = 1e-8
    """Added to AdamW's denominator."""
    max_grad_norm: NotNegative = 1.0
    """Gradients are scaled down to this L2 norm; 0 turns clipping off."""
    lr_scheduler_type: Literal["auto", "linear", "cosine", "constant_with_warmup", "constant"] = "auto"
    """Learning rate schedule. auto: constant after warmup if averaging is on, because a rate that
    decays to zero leaves averaging nothing to average; otherwise linear decay. constant: without warmup."""
    warmup_steps: ShareBelowOne | WholeNumber = 0.06
    """Length of the warmup: a fraction below 1 is a share of the run, a whole number is steps.
    RoBERTa was fine-tuned with 0.06."""
    mixed_precision: Literal["auto", "no", "bf16", "fp16"] = "auto"
    """Number format of the forward and backward pass. auto: what `accelerate launch` was given."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    seed: Annotated[int, Range(low=0, high=HIGHEST_SEED)] = 42
    """Seed for everything random: initial head, order of rows, dropout, noise."""
    logging_steps: Count = 10
    """Optimizer steps between progress lines."""
    dataloader_num_workers: WholeNumber = 0
    """Processes per device that load batches; 0: the training process does it, enough for short texts."""
    group_by_length: bool = False
    """Batch inputs of similar length, so that little of a batch is padding. Off, because it makes batches less
    random."""
    save_steps: Count | None = 500
    """Optimizer steps between checkpoints, from which a killed run resumes; null: only on SIGTERM and SIGUSR1.
    A checkpoint takes three times the space of the weights in fp32, plus the averages."""
    save_total_limit: Count | None = 2
    """How many checkpoints to keep, the newest ones; null: all."""
    resume_from_checkpoint: str = "auto"
    """auto: resume from the newest complete checkpoint in `output_dir`, if there is one; none: expect an empty
    folder; or the path of a checkpoint."""
    disable_tqdm: bool | None = None
    """Show no progress bar; null: show one on a terminal only, so that it does not fill a log file."""
    ddp_timeout: Annotated[int, Range(low=1, high=LONGEST_TIMEOUT)] = 1800
    """Seconds that a process waits for the others before the run fails, under every engine. It has to exceed the
    longest time a process may spend alone, such as loading or saving a large model."""

    def conflicts(self) -> Iterator[Fault]:
        """Yield an empty output folder, and an impossible number of steps."""
        if not self.output_dir:
            yield "output_dir", "is empty; set it to the run's folder"
        if self.max_steps != -1 and self.max_steps < 1:
            yield "max_steps", f"{self.max_steps} is neither a number of steps nor -1 (use num_train_epochs)"


@dataclass(kw_only=True)
@borrows(RULES, after="every")
class AveragingConfig(Section):
    """Which weights to average during the run. null leaves the choice to the rule."""

    choice: ClassVar[str] = "averaging.rule"
    users: ClassVar[Users] = {
        # Not windows: a window is chosen by the score of its mean.
        "blend": {name: () for name in RULES if name != "windows"},
        "search_blend": dict.fromkeys(RULES, ()),
    }
    paths: ClassVar[tuple[str, ...]] = ("spill_dir",)
    rule: Literal["none", "swa", "ema", "lawa", "merge", "bema", "power_ema", "windows"] = "none"
    """swa: the uniform mean of the weights; ema: their exponential moving average; lawa: the mean of the last
    few; merge: a weighted mean that imitates a learning rate decay; bema: an ema with its lag corrected;
    power_ema: averages whose memory grows with the run; windows: the mean of every stretch of the run, to
    choose from afterwards; none: no averaging."""
    start: StepOrShare | None = None
    """First weights in the average: a fraction (0.5) is a share of the run, a whole number (100) is an
    optimizer step; so 1 is step 1, and 1.0 is the end. null: 0.5 for swa and merge, 0 for the other rules."""
    every: Count = 1
    """Optimizer steps between averaged weights. 1, because averaging does not slow down the step; bema was
    published with 400, lawa with checkpoints far apart."""
    sigma_rel: Annotated[float, Range(above=0, below=SIGMA_REL_LIMIT)] | None = None
    """Width of the average's profile, its standard deviation as a share of the run; a wider one remembers earlier
    weights. (power_ema only; null: 0.05)"""
    precision: Precision = "compensated"
    """Precision of running means. compensated: 6 bytes per element, exact to the last digits of fp32 in runs of
    any length; plain: 4 bytes, loses digits in long runs."""
    spill_dir: str | None = None
    """Folder, on a disk of each node, to which finished blocks and snapshots move; null keeps them in memory."""
    threads: Count | None = None
    """Threads that do the averaging alongside training; null: half of this rank's cores, at most 8."""
    blend: Blend = 1.0
    """How far the averaged weights go from the last weights towards the average, from -1 to 2: 1 is the average, 0
    the last weights. Not for windows, which are chosen by the score of their mean; use `search_blend` there."""
    search_blend: bool = False
    """Choose the blend after training from 0, 0.3, 0.6, 1 and 1.5, with one evaluation on validation rows each."""

    def conflicts(self) -> Iterator[Fault]:
        """Yield options of other rules, and a blend chosen in two ways."""
        unused = [*super().conflicts()]
        yield from unused
        if not unused and self.blend != 1 and self.search_blend:
            yield "blend", "is chosen by averaging.search_blend; remove one of the two"


NOISE_KINDS: dict[str, type] = {"r3f": R3F, "r4f": R4F, "rdrop": RDrop}
"""The noise objectives by their name in `noise.kind`."""


@dataclass(kw_only=True)
@borrows(NOISE_KINDS, after="weight", but=("seed", "label_smoothing"))
class NoiseConfig(Section):
    """The noise-stability objective. null leaves the choice to the preset."""

    choice: ClassVar[str] = "noise.kind"
    kind: Literal["none", "r3f", "r4f", "rdrop"] = "none"
    """r3f: a clean and a noised pass, with a symmetric KL between them; r4f: r3f with a spectral norm on the
    head; rdrop: two dropout masks instead of noise; none: the task's loss alone."""
    weight: NotNegative = 1.0
    """Factor of the divergence in the loss; for rdrop, the alpha of its preset. 1.0 is the middle of the papers'
    range."""


@dataclass(kw_only=True)
class EvalConfig(Section):
    """When and how to evaluate."""

    per_device_eval_batch_size: Count = 32
    """Rows per device and evaluation batch. Changes speed and memory, not the result."""
    eval_steps: Count | None = None
    """Optimizer steps between evaluations; null: evaluate once, at the end."""
    keep_best: Literal["none", "last", "averaged", "either"] = "none"
    """Which weights to keep in `best/` whenever they reach the best score on validation rows: the last, the
    averaged, or either (the averaged if they tie); none: no such folder. They are not scored on test rows."""
    metric_for_best_model: str | None = None
    """Score that decides between weights, for `keep_best`, early stopping and the windows of averaging; lower is
    better for loss, perplexity and mse. null: the main score of `metric`; the loss if there is none."""
    early_stopping_patience: Count | None = None
    """Stop after this many evaluations in a row in which the weights that `keep_best` watches (none: either) did
    not score better. With averaging, evaluations count only once there is an average. null: train to the end."""
    early_stopping_threshold: NotNegative = 0.0
    """Smallest gain over the best score so far that counts as better."""
    metric: str = "auto"
    """What to measure; auto: the usual metric of the task."""

    tasks: ClassVar[tuple[str, ...]] = ()
    """Kinds of task whose metrics `metric` may name (`swaft.training.metrics`)."""

    @property
    def judges_weights(self) -> bool:
        """Whether weights are judged while a run trains, to keep the best or to stop early."""
        return self.keep_best != "none" or self.early_stopping_patience is not None

    def conflicts(self) -> Iterator[Fault]:
        """Yield choices between weights without evaluations, and metrics of other tasks."""
        if self.eval_steps is None:
            message = "needs evaluations while training, and eval.eval_steps is null; set it"
            if self.keep_best != "none":
                yield "keep_best", message
            if self.early_stopping_patience is not None:
                yield "early_stopping_patience", message
        if self.early_stopping_threshold and self.early_stopping_patience is None:
            message = (
                "is used with eval.early_stopping_patience, which is null; set it, or remove the threshold"
            )
            yield "early_stopping_threshold", f"{self.early_stopping_threshold} {message}"
        if self.metric != "auto" and (message := unfit(self.metric, *self.tasks)):
            yield "metric", message


@dataclass(kw_only=True)
class TrackConfig(Section):
    """Where to report the metrics besides the run folder."""

    paths: ClassVar[tuple[str, ...]] = ("logging_dir",)
    report_to: str = "none"
    """Tracker, by accelerate's name: tensorboard, wandb, trackio, mlflow, ...; none: the run folder only,
    and nothing touches the network."""
    project_name: str = "swaft"
    """The tracker's project for the run."""
    run_name: str | None = None
    """Name of the run in the tracker; null: the last part of `train.output_dir`."""
    logging_dir: str | None = None
    """Folder for trackers that write files; null: inside `train.output_dir`."""

    def conflicts(self) -> Iterator[Fault]:
        """Yield an unknown tracker, and a run name that the tracker cannot take."""
        if self.report_to not in (trackers := ("none", *LoggerType.list())):
            yield "report_to", not_allowed(self.report_to, trackers)
        if self.run_name is not None and self.report_to == "comet_ml":
            yield "run_name", f"is {self.run_name}, but accelerate passes no run name to comet_ml; remove it"


@dataclass(frozen=True, kw_only=True)
class RecipeConfig:
    """The sections that every recipe has; a family of tasks replaces some of them with its own."""

    task: ClassVar[str] = "sequence classification"
    """What is learnt: a key of `swaft.training.models.pretrained.FORMS`."""

    model: AnyModelConfig
    data: RowsConfig = field(default_factory=RowsConfig)
    train: TrainConfig
    averaging: AveragingConfig = field(default_factory=AveragingConfig)
    noise: NoiseConfig = field(default_factory=NoiseConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    track: TrackConfig = field(default_factory=TrackConfig)

    def conflicts(self) -> Iterator[Fault]:
        """Yield settings of different sections that do not work together, by the full name of one of them."""
        kept, patience, rule = self.eval.keep_best, self.eval.early_stopping_patience, self.averaging.rule
        if kept in ("averaged", "either") and rule == "none":
            reason = f"{kept} needs averaged weights, and averaging.rule is none"
            yield "eval.keep_best", f"{reason}; set averaging.rule, or eval.keep_best=last"
        if patience is not None and rule == "merge":
            reason = "averaging.rule=merge weights each step by its distance from the run's end"
            advice = "which must be known in advance; use another rule (swa, ema), or train to the end"
            yield "eval.early_stopping_patience", f"{reason}, {advice}"
        judged = self.eval.judges_weights or self.averaging.search_blend or rule == "windows"
        if (named := self.eval.metric_for_best_model) is not None and not judged:
            reason = f"{named} decides between weights, but no setting asks for that decision"
            advice = "set eval.keep_best or eval.early_stopping_patience, or remove it"
            yield "eval.metric_for_best_model", f"{reason}; {advice}"

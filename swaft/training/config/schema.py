"""The settings of a run as typed dataclasses, one a section, with Hugging Face's names for the leaves.

The docstring under a field is its help text: what it is, its unit, and why the default is what it is.
`load_config` fills these classes; nothing here checks values (see `swaft.training.config.check`).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal


@dataclass(kw_only=True)
class AdapterConfig:
    """Whether to train low-rank adapters in place of the weights themselves."""

    use_peft: bool = False
    """Train LoRA adapters and the new head, and keep the pretrained weights as they are; `final/` and
    `final-averaged/` are adapter folders then. LoRA wants a higher `train.learning_rate`, 1e-4 to 5e-4."""
    lora_r: int = 16
    """Rank of the adapters."""
    lora_alpha: int = 32
    """The update is scaled by this number over the rank."""
    lora_dropout: float = 0.05
    """Dropout before the adapters."""
    lora_target_modules: str | None = None
    """Layers that get adapters: names with commas between them (query,value), or all-linear; null: those that
    peft chooses for the architecture, mostly the attention's queries and values."""


@dataclass(kw_only=True)
class ModelConfig(AdapterConfig):
    """Which pretrained model to fine-tune."""

    model_name_or_path: str
    """Hub id or folder of the pretrained model; `demo` is the MiniLM encoder of the package extra
    `swaft[demo]`, which needs no network."""
    tokenizer_name: str | None = None
    """Hub id or folder of the tokenizer; null: the model's own."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model. Off, because that code runs with your rights."""
    ignore_mismatched_sizes: bool = False
    """Put a new head on a model whose own head is for another number of classes (an MNLI model, say), or for
    classes of other names. false: that is an error; a head for the same classes is kept, in its own order."""


@dataclass(kw_only=True)
class RowsConfig:
    """Where rows come from, and how many of them to take."""

    task_name: str | None = None
    """Name of a task: a folder of `$SWAFT_DATA` (default ../shared/data where it exists) holding
    train.parquet and so on, else a GLUE task of the hub; `python_docstrings` is built on this machine."""
    dataset_name: str | None = None
    """Hub id of a dataset, or a folder laid out as one (train/, validation/, test/ with parquet, csv, tsv
    or json files)."""
    dataset_config_name: str | None = None
    """Configuration of `dataset_name`, where the dataset has several."""
    train_file: str | None = None
    """Training rows: a parquet, csv, tsv, json or jsonl file."""
    validation_file: str | None = None
    """Validation rows, beside `train_file`; null: the run is not evaluated on validation rows."""
    test_file: str | None = None
    """Test rows, beside `train_file`."""
    delimiter: str | None = None
    """Character between the cells of a csv or tsv file (`;`, `tab`); null: a comma, and a tab in a tsv file, which
    has no quoting."""
    validation_fraction: float | None = None
    """Share of the training rows that are validation rows instead, drawn at random and the same whatever
    `train.seed` is (0.1 is a tenth); where the rows have a validation split of their own it is refused."""
    skip_bad_rows: bool = False
    """Leave out rows with a blank text, without a label, or whose answers cannot be read, and say which; false:
    the first such row is an error."""
    max_train_samples: int | None = None
    """Use only the first so many training rows; null: all."""
    max_eval_samples: int | None = None
    """Use only the first so many validation rows; null: all."""
    max_predict_samples: int | None = None
    """Use only the first so many test rows; null: all."""
    split_special_tokens: bool = True
    """Read a special token that a text spells (`</s>`, `[SEP]`) as the text it is; false: it has its special
    meaning, for texts that have such tokens on purpose."""


@dataclass(kw_only=True)
class DataConfig(RowsConfig):
    """Which rows to train and evaluate on, and which columns of them.

    The rows come from exactly one of `task_name`, `dataset_name` and `train_file`. A later config or an
    override that names one of the three replaces the whole source, its other splits included.
    """

    text_column: str | None = None
    """Column with the (first) text; null: found by its usual name (sentence, sentence1, text, ...)."""
    text_pair_column: str | None = None
    """Column with the second text of a pair; null: found by its usual name, if there is one."""
    label_column: str | None = None
    """Column with the answer; null: `label` or `labels`."""
    do_regression: bool | None = None
    """Whether numbers in the label column are scores; null: fractional ones are, whole ones are class ids. false
    lets -1 be a class, too."""
    positive_label: str | None = None
    """Name of the class, of two, whose F1 `eval.metric` measures; null: the second one (of texts, by the
    alphabet), and the log says which."""
    eval_languages: str | None = None
    """Languages to evaluate on besides that of the training rows, with commas between them (de,fr,sw): each is
    evaluated at the end as a split of its own (test_de), and so is the mean over all languages. Of `dataset_name`
    they are configurations; else they are files beside those of the validation and test rows, with the language
    before the ending (test.csv, test.de.csv)."""
    max_seq_length: int = 128
    """Longest input in tokens, longer texts are cut. 128 holds nearly every GLUE pair."""


@dataclass(kw_only=True)
class TrainConfig:
    """How to optimise, and where the results go."""

    output_dir: str
    """Run folder: configuration, metrics, and the trained weights."""
    per_device_train_batch_size: int = 16
    """Rows per device and micro-batch. The total batch is this times accumulation times devices."""
    gradient_accumulation_steps: int = 1
    """Micro-batches per optimizer step."""
    num_train_epochs: float = 3.0
    """Passes over the training rows, a fraction allowed; `max_steps` wins where it is set."""
    max_steps: int = -1
    """Optimizer steps in all; -1: as many as `num_train_epochs` takes."""
    learning_rate: float = 2e-5
    """Peak rate of AdamW. 2e-5 is BERT's usual; small models take 5e-5 to 1e-4."""
    weight_decay: float = 0.01
    """Decoupled weight decay, applied neither to biases nor to normalisation weights."""
    adam_beta1: float = 0.9
    """Decay of AdamW's running mean of gradients."""
    adam_beta2: float = 0.999
    """Decay of AdamW's running mean of squared gradients."""
    adam_epsilon: float = 1e-8
    """Added to AdamW's denominator."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this L2 norm; 0 turns clipping off."""
    lr_scheduler_type: Literal["auto", "linear", "cosine", "constant_with_warmup", "constant"] = "auto"
    """Learning rate over the run. auto: constant after warm-up when averaging is on, because a rate that
    decays to zero leaves averaging nothing to average; linear decay otherwise."""
    warmup_steps: int | float = 0.06
    """Length of the warm-up: a fraction below 1 is a share of the run, a whole number is steps.
    0.06 is the share RoBERTa was fine-tuned with."""
    mixed_precision: Literal["auto", "no", "bf16", "fp16"] = "auto"
    """Number format of the forward and backward pass. auto: whatever `accelerate launch` was told."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    seed: int = 42
    """Seed of everything random: initial head, order of rows, dropout, noise."""
    logging_steps: int = 10
    """Optimizer steps between two progress lines."""
    dataloader_num_workers: int = 0
    """Processes that load batches, per device; 0: the training process does it, enough for short texts."""
    group_by_length: bool = False
    """Make batches of inputs of like length, so that little of them is padding. Off, because batches are less
    random then."""
    save_steps: int | None = 500
    """Optimizer steps between two checkpoints, from which a run that was killed goes on; null: none but on SIGTERM
    and SIGUSR1. One takes three times the weights in fp32, the averages apart."""
    save_total_limit: int | None = 2
    """Checkpoints that are kept, the newest ones; null: all."""
    resume_from_checkpoint: str = "auto"
    """auto: go on from the newest complete checkpoint in `output_dir`, where there is one; none: expect an empty
    folder; or the path of a checkpoint."""
    disable_tqdm: bool | None = None
    """Show no progress bar; null: a bar only on a terminal, where it does not fill a log file."""
    ddp_timeout: int = 1800
    """Seconds that a process waits for the others before the run is given up, under every engine. Longer than the
    longest any of them may take alone, to load or to save a large model."""


@dataclass(kw_only=True)
class AveragingConfig:
    """Which weights to average along the run. A null leaves the choice to the rule."""

    rule: Literal["none", "swa", "ema", "lawa", "merge", "bema", "power_ema", "windows"] = "none"
    """swa: the uniform mean of the weights; ema: their exponential moving average; lawa: the mean of the last
    few; merge: weights that imitate a decay of the learning rate; bema: an ema with its lag corrected;
    power_ema: averages whose memory grows with the run; windows: the mean of every stretch of the run, to
    choose among afterwards; none: no averaging."""
    start: int | float = 0.5
    """First weights in the average: a fraction (0.5) is a share of the run, a whole number (100) is the
    optimizer step; so 1 is step 1 and 1.0 the end. Half the run, as the paper does: before that the
    weights still move too fast."""
    every: int = 1
    """Optimizer steps between two averaged weights. 1, because averaging costs the step nothing; bema was
    published with 400, lawa with checkpoints far apart."""
    include_start: bool | None = None
    """Whether the weights at `start` themselves are the first of the average (swa only); null: true."""
    decay: float | None = None
    """Share of the old average kept at each averaging (ema only); null: as `half_life` says, without it 0.999,
    a memory of about 1,000 averaged weights."""
    half_life: int | float | None = None
    """Time after which weights count half as much, in place of `decay` (ema only): a fraction (0.1) is a share
    of the run, a whole number (100) is optimizer steps."""
    warmup: Literal["none", "ramp", "debias"] | None = None
    """How a young average forgets its first weights (ema only): ramp raises the decay slowly, debias counts
    as if the sum had begun at zero; null: none."""
    last: int | None = None
    """Weights in the mean, each kept whole at 4 bytes an element (lawa only); null: 10."""
    weights: Literal["linear", "cosine", "1-sqrt"] | None = None
    """Decay of the learning rate, from `start` to the end, that the average imitates (merge only, and has to be
    given there); linear is the uniform mean."""
    ema_power: float | None = None
    """How fast the average slows down, kappa of the paper (bema only); null: 0.5."""
    bias_power: float | None = None
    """How fast the correction fades, eta of the paper (bema only); null: 0.2."""
    lag: int | None = None
    """Age in steps that the run begins with, rho of the paper (bema only); null: 10."""
    multiplier: float | None = None
    """Age that a step adds, gamma of the paper (bema only); null: 1.0."""
    snapshots: int | None = None
    """Copies of the two averages along the run, 8 bytes an element each time (power_ema only); null: 16."""
    blocks: int | None = None
    """Stretches of the run whose means are kept, at 6 bytes an element (windows only); null: 32."""
    precision: Literal["compensated", "plain"] = "compensated"
    """Of running means. compensated: 6 bytes an element, exact to the last digits of fp32 in runs of any length;
    plain: 4 bytes, loses digits in long runs."""
    spill_dir: str | None = None
    """Folder, on a disk of each node, that finished blocks and snapshots move to; null keeps them in memory."""
    threads: int | None = None
    """Threads that do the averaging beside training; null: half of this rank's cores, at most 8."""
    blend: float = 1.0
    """How far the averaged weights go from the last ones to the average, from -1 to 2: 1 is the average, 0 the last
    weights."""
    search_blend: bool = False
    """Choose the blend after training among 0, 0.3, 0.6, 1 and 1.5, on validation rows, an evaluation for each."""


@dataclass(kw_only=True)
class NoiseConfig:
    """The noise-stability objective. A null leaves the choice to the preset."""

    kind: Literal["none", "r3f", "r4f", "rdrop"] = "none"
    """r3f: clean and noised pass, and a symmetric KL between them; r4f: r3f with a spectral norm on the
    head; rdrop: two dropout masks instead of noise; none: the task's loss alone."""
    preset: Literal["paper", "relative", "fairseq", "rdrop", "rdrop_paper"] | None = None
    """Published form of the objective to follow; null: paper (for rdrop: rdrop, the cross entropies of both passes
    averaged as in its released code; rdrop_paper sums them, as equation 4 does)."""
    weight: float = 1.0
    """Factor on the divergence in the loss; for rdrop the alpha of its preset. 1.0 is the middle of the papers'
    range."""
    noise: Literal["uniform", "normal"] | None = None
    """Distribution of the noise added to the input embeddings."""
    sigma: float | None = None
    """Size of the noise: bound of the uniform, standard deviation of the normal; in units of the
    embeddings, or as a share of their RMS under the preset relative."""
    masks: Literal["shared", "independent"] | None = None
    """Whether both passes use the same dropout masks."""
    reduction: Literal["mean", "batchmean"] | None = None
    """mean: over the rows whose label counts; batchmean: the sum over all rows by the number of sentences,
    which depends on how a step's rows are cut into micro-batches where sentences differ in length."""
    detach: Literal["none", "clean", "noised", "target"] | None = None
    """Which side of the divergence gets no gradient; with noised the noised pass takes none, and costs less."""
    passes: Literal["two", "doubled"] | None = None
    """two: the clean and the noised pass one after the other; doubled: one pass over the batch twice, faster for
    small batches, with dropout masks of its own for each half; null: two."""
    fused: bool | None = None
    """Compute the loss of a model that generates from its hidden states, so that its logits are never made; false
    makes them, and takes some twenty times the memory of one pass's logits; null: true."""
    layers: Literal["all", "last"] | None = None
    """Which linear layers of the head r4f normalises; null: all (the paper; the released code: last)."""


@dataclass(kw_only=True)
class EvalConfig:
    """When and how to evaluate."""

    per_device_eval_batch_size: int = 32
    """Rows per device and evaluation batch. Changes speed and memory, not the result."""
    eval_steps: int | None = None
    """Optimizer steps between two evaluations; null: once, at the end."""
    keep_best: Literal["none", "last", "averaged", "either"] = "none"
    """Which weights to keep in `best/` whenever they score best on validation rows: the last ones, the averaged
    ones, or either (of equal ones the averaged); none: no such folder."""
    metric_for_best_model: str | None = None
    """Score that decides between weights, for `keep_best`, early stopping and the windows of averaging; of loss
    and mse less is better. null: the main score of `metric`."""
    early_stopping_patience: int | None = None
    """End the run after so many evaluations in a row without a better score of the weights that `keep_best`
    watches (none: either). Where weights are averaged, evaluations count once there is an average. null: train
    to the end."""
    early_stopping_threshold: float = 0.0
    """Least gain over the best score so far that counts as a better one."""
    metric: str = "auto"
    """What to measure: accuracy, f1, f1_macro, accuracy_f1, matthews_correlation, pearson_spearman or mse;
    auto: the usual one of the task."""


@dataclass(kw_only=True)
class TrackConfig:
    """Where to send the numbers besides the run folder."""

    report_to: str = "none"
    """Tracker, by accelerate's name: tensorboard, wandb, trackio, mlflow, ...; none: the run folder only,
    and nothing touches the network."""
    project_name: str = "swaft"
    """Project under which a tracker files the run."""
    run_name: str | None = None
    """Name of the run in the tracker; null: the last part of `train.output_dir`."""
    logging_dir: str | None = None
    """Folder for trackers that write files; null: inside `train.output_dir`."""


@dataclass(kw_only=True)
class ClassificationConfig:
    """Everything `recipes/classification.py` needs."""

    model: ModelConfig
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig
    averaging: AveragingConfig = field(default_factory=AveragingConfig)
    noise: NoiseConfig = field(default_factory=NoiseConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    track: TrackConfig = field(default_factory=TrackConfig)

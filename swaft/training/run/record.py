"""What a checkpoint's manifest says about its run, and whether another process may resume it; no side effects.

Engines silently open a checkpoint of another model, other rows or another seed, so digests are compared.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from datasets import Dataset
from torch import nn

from swaft.averaging.state import sum_of_bits
from swaft.errors import ConfigError, StateError
from swaft.training.config import TrainConfig
from swaft.training.run.checkpoints import AVERAGE

SAMPLED_ROWS = 64
"""Size of the sample of rows: reading every row would take as long as a pass."""


@dataclass(frozen=True, kw_only=True)
class Setup:
    """The properties of a run that do not change."""

    stage: int | None
    """DeepSpeed's ZeRO stage; None under torch alone."""
    world_size: int
    """Number of ranks."""
    per_device_train_batch_size: int
    """Rows of a micro-batch on one rank."""
    rows_per_step: int
    """Rows of an optimizer step, over all ranks and micro-batches."""
    grouped_by: int | None
    """Rows per batch when grouping by length, over all ranks; None: not grouped."""
    total_steps: int
    """Optimizer steps of the whole run."""
    rows: int
    """Training rows."""
    rows_sha256: str
    """Digest of a sample of the rows, from `fingerprint_rows`."""
    architecture_sha256: str
    """Digest of names and shapes of weights, from `fingerprint_architecture`."""
    frozen_sha256: str
    """Digest of the frozen weights, from `fingerprint_frozen`."""
    seed: int
    """``train.seed``."""

    @property
    def engine(self) -> str:
        """What wrote weights and optimizer state, in words."""
        return "torch alone" if self.stage is None else f"DeepSpeed stage {self.stage}"


SETTING_OF = {
    "total_steps": "train.max_steps or num_train_epochs as it was",
    "rows": "section data as it was",
    "rows_sha256": "section data, the tokenizer, or swaft's version, as it was",
    "architecture_sha256": "section model as it was",
    "frozen_sha256": "section model as it was",
    "seed": "train.seed as it was",
}
"""What to set if one of the fields of a `Setup` that must not differ does."""


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """What a checkpoint says about a run at one of its steps."""

    setup: Setup
    """What does not change during the run."""
    settings: Mapping[str, Any]
    """Every setting by its full name."""
    applied_steps: int
    """Optimizer steps that were not skipped."""
    weights: str
    """Sum of the bits of the trained weights."""
    parts: Mapping[str, Any]
    """States of the parts of the run, by name, including ``position`` and ``meter``."""
    versions: Mapping[str, str]
    """Versions of packages."""

    @classmethod
    def read(cls, content: Mapping[str, Any], checkpoint: Path) -> RunRecord:
        """Read a checkpoint's content; raise `StateError` if another version of swaft wrote it."""
        for record, values, where in ((cls, content, ""), (Setup, content.get("setup"), ": setup")):
            expected = sorted(each.name for each in fields(record))
            found = sorted(values) if isinstance(values, Mapping) else values
            if found != expected:
                raise StateError(
                    f"{checkpoint}/manifest.json: content{where}: found {found}, expected {expected}; it was "
                    "written by another version of swaft; resume it with that version"
                )
        return cls(**{**content, "setup": Setup(**content["setup"])})


def require_same_run(before: RunRecord, now: Setup, checkpoint: Path) -> None:
    """Refuse to resume with another length, other rows, another seed, another model or another engine.

    Torch's own optimizer state opens under torch alone, on any number of ranks; DeepSpeed's under its stage and
    number of ranks.

    Raises:
        ConfigError: names each setting that differs.
        StateError: the engine cannot open the optimizer state; says which one can.
    """
    was, settings = before.setup, dict(SETTING_OF)
    different = [name for name in settings if getattr(was, name) != getattr(now, name)]
    for known, more in (("rows", "rows_sha256"), ("architecture_sha256", "frozen_sha256")):
        if known in different and more in different:
            different.remove(more)  # adds no information
    if was.rows_per_step != now.rows_per_step and was.rows == now.rows:
        settings["total_steps"] = (
            "train.per_device_train_batch_size or gradient_accumulation_steps so that their product with the "
            f"ranks, {now.world_size} now and {was.world_size} before, is {was.rows_per_step} rows a step (it is "
            f"{now.rows_per_step})"
        )
    if different:
        raise ConfigError(
            [
                f"{checkpoint} is of a run with {name} = {_shown(getattr(was, name))}, this one has "
                f"{_shown(getattr(now, name))}; set {settings[name]}, or start a new run in a new train.output_dir"
                for name in different
            ]
        )
    if was.stage != now.stage or (now.stage is not None and was.world_size != now.world_size):
        fits = (
            "Torch's optimizer state fits one process, DDP and FSDP2, on any number of ranks"
            if was.stage is None
            else "DeepSpeed's optimizer state fits one stage and one number of ranks"
        )
        raise StateError(
            f"{checkpoint} was written under {was.engine} by {was.world_size} ranks, but this run is {now.engine} "
            f"on {now.world_size}. {fits}: start with those to resume. Its averages fit any engine: "
            f"averager.load_state('{checkpoint / AVERAGE}', same_weights=False)"
        )


def _shown(value: Any) -> Any:
    """Return a value for a message, of a digest its beginning."""
    return f"{value[:12]}..." if isinstance(value, str) else value


def require_averages(before: RunRecord, checkpoint: Path, *, there: bool, wanted: bool) -> None:
    """Refuse to drop a run's averages, or to start averaging a run that did not average from its start."""
    if there != wanted:
        what = "averaged nothing" if wanted else "averages, and would lose its averages"
        raise ConfigError(
            f"averaging.rule: {checkpoint} is of a run that {what} "
            f"(averaging.rule={before.settings.get('averaging.rule')}); set that, or start a new run in a new "
            "train.output_dir"
        )


def changed_settings(before: RunRecord, now: Setup, settings: Mapping[str, Any]) -> Iterator[str]:
    """Yield in words which settings have changed, except where a run is written and how it resumes.

    All changes take effect, except that trained weights come from the checkpoint, whatever the model is now. The
    rows per step are reported too: they change with the number of ranks, which is not a setting.
    """
    kept = {"model.model_name_or_path": " (the trained weights are the checkpoint's)"}
    for name in sorted({*before.settings, *settings} - {"train.output_dir", "train.resume_from_checkpoint"}):
        was, is_now = before.settings.get(name), settings.get(name)
        if was != is_now:
            yield f"{name}: {was} before, {is_now} now{kept.get(name, '')}"
    if before.setup.rows_per_step != now.rows_per_step:
        yield (
            f"rows of an optimizer step: {before.setup.rows_per_step} before, {now.rows_per_step} now; they are "
            "train.per_device_train_batch_size x gradient_accumulation_steps x ranks"
        )


def batches_read(before: RunRecord, now: Setup) -> int:
    """Return how many micro-batches of the pass a rank has read; raise `ConfigError` if it is within one."""
    was, batches = before.setup, before.parts["position"]["batches"]
    rows = batches * was.per_device_train_batch_size * was.world_size
    size = now.per_device_train_batch_size * now.world_size
    if rows >= was.rows:  # the pass is over; its last micro-batches may have been filled up
        return math.ceil(was.rows / size)
    if batches and was.grouped_by != now.grouped_by:
        raise ConfigError(
            f"the checkpoint stands within a pass over rows of similar length, grouped by {was.grouped_by}, but "
            f"this run groups them by {now.grouped_by} (train.per_device_train_batch_size times ranks, or "
            "train.group_by_length); set them as they were, because the order of the rows depends on it"
        )
    if rows % size:
        raise ConfigError(
            f"the checkpoint stands at row {rows:,} of a pass, which is not a whole number of this run's "
            f"micro-batches of {size} rows over all ranks; set train.per_device_train_batch_size so that it is "
            f"(it was {was.per_device_train_batch_size} on {was.world_size} ranks)"
        )
    return rows // size


def layout_of(train: TrainConfig, *, world_size: int, stage: int | None) -> dict[str, Any]:
    """Return the fields of a `Setup` that are determined by settings and launcher."""
    batch = train.per_device_train_batch_size * world_size
    return {
        "stage": stage,
        "world_size": world_size,
        "per_device_train_batch_size": train.per_device_train_batch_size,
        "rows_per_step": batch * train.gradient_accumulation_steps,
        "grouped_by": batch if train.group_by_length else None,
        "seed": train.seed,
    }


def fingerprint_frozen(model: nn.Module) -> str:
    """Return a digest of the names, shapes and bits of the frozen weights, which are in no checkpoint.

    The model has to be on the host and not sharded yet. 16-bit weights have the digest of the same numbers in fp32.
    """

    def bits(parameter: nn.Parameter) -> int:
        return sum_of_bits(piece.float() for piece in parameter.reshape(-1).split(1 << 24))

    frozen = [(name, p) for name, p in model.named_parameters() if not p.requires_grad]
    return _digest([(name, list(p.shape), bits(p)) for name, p in frozen])


def fingerprint_architecture(model: nn.Module) -> str:
    """Return a digest of the names and shapes of a model's weights, and which are trained, before sharding."""
    return _digest([(name, list(p.shape), p.requires_grad) for name, p in model.named_parameters()])


def fingerprint_rows(rows: Dataset) -> str:
    """Return a digest of the columns and of `SAMPLED_ROWS` evenly spaced rows, including the first and the last."""
    last, places = len(rows) - 1, max(1, min(SAMPLED_ROWS, len(rows)) - 1)
    indices = sorted({place * last // places for place in range(places + 1)})
    return _digest([rows.column_names, rows.select(indices).with_format(None).to_list()])


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, default=str).encode()).hexdigest()

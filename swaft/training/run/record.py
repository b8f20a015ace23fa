"""What a checkpoint's manifest says about its run, and whether another process may go on with it; pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from swaft.errors import ConfigError, StateError


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What of a run does not change as it goes on."""

    stage: int | None
    """DeepSpeed's stage of ZeRO; None under torch alone."""
    world_size: int
    """Ranks."""
    per_device_train_batch_size: int
    """Rows of a micro-batch on one rank."""
    rows_per_step: int
    """Rows of an optimizer step, over all ranks and micro-batches."""
    grouped_by: int | None
    """Rows that are put together by length; None: not grouped."""
    total_steps: int
    """Optimizer steps of the whole run."""
    rows: int
    """Training rows."""
    rows_sha256: str
    """Of a sample of them, from :func:`~swaft.training.run.fingerprint.fingerprint_rows`."""
    architecture_sha256: str
    """Of names and shapes of weights, from :func:`~swaft.training.run.fingerprint.fingerprint_architecture`."""
    frozen_sha256: str
    """Of the weights that are not trained, from :func:`~swaft.training.run.fingerprint.fingerprint_frozen`."""
    seed: int
    """``train.seed``."""

    @property
    def engine(self) -> str:
        """What wrote weights and optimizer state, in words."""
        return "torch alone" if self.stage is None else f"DeepSpeed stage {self.stage}"


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """A run at one of its steps, but for what is in files."""

    setup: Setup
    """What does not change."""
    settings: Mapping[str, Any]
    """Every setting by its full name."""
    applied_steps: int
    """Optimizer steps that were not skipped."""
    weights: str
    """Sum of the bits of the trained weights."""
    parts: Mapping[str, Any]
    """States of the parts of the run, by name, ``position`` and ``meter`` among them."""
    versions: Mapping[str, str]
    """Of packages."""

    def as_dict(self) -> dict[str, Any]:
        """As plain values."""
        return asdict(self)

    @classmethod
    def read(cls, content: Mapping[str, Any], checkpoint: Path) -> RunRecord:
        """Understand what a checkpoint says.

        Raises:
            StateError: it says other things, as another version of swaft would write.
        """
        _require_fields(cls, content, checkpoint, "content")
        _require_fields(Setup, content["setup"], checkpoint, "content: setup")
        return cls(**{**content, "setup": Setup(**content["setup"])})


def require_same_run(before: RunRecord, now: Setup, checkpoint: Path) -> None:
    """Refuse to go on with a run of another length, other rows, another seed or another model.

    Raises:
        ConfigError: naming each setting that differs.
    """
    settings = {
        "total_steps": "train.max_steps or num_train_epochs as it was",
        "rows": "section data as it was",
        "rows_sha256": "section data, or the tokenizer, as it was",
        "architecture_sha256": "section model as it was",
        "frozen_sha256": "section model as it was",
        "seed": "train.seed as it was",
    }
    different = [name for name in settings if getattr(before.setup, name) != getattr(now, name)]
    for known, more in (("rows", "rows_sha256"), ("architecture_sha256", "frozen_sha256")):
        if known in different and more in different:
            different.remove(more)  # says nothing more
    if before.setup.rows_per_step != now.rows_per_step and before.setup.rows == now.rows:
        settings["total_steps"] = _same_step(before.setup, now)
    problems = [
        f"{checkpoint} is of a run with {name} = {_short(getattr(before.setup, name))}, this one has "
        f"{_short(getattr(now, name))}; set {settings[name]}, or begin a new run in a new train.output_dir"
        for name in different
    ]
    if problems:
        raise ConfigError(problems)


def require_same_engine(before: RunRecord, now: Setup, checkpoint: Path, *, average: Path) -> None:
    """Refuse an optimizer state that the engine of this run cannot open.

    Torch's own opens under torch alone, on any number of ranks; DeepSpeed's under its stage and number of ranks.

    Args:
        before: of the checkpoint.
        now: of this run.
        checkpoint: its folder.
        average: folder of the averages in it, which open anywhere.

    Raises:
        StateError: saying what opens it.
    """
    was = before.setup
    if was.stage != now.stage or (now.stage is not None and was.world_size != now.world_size):
        fits = (
            "Torch's optimizer state fits one process, DDP and FSDP2, on any number of ranks"
            if was.stage is None
            else "DeepSpeed's optimizer state fits one stage and one number of ranks"
        )
        raise StateError(
            f"{checkpoint} was written under {was.engine} by {was.world_size} ranks, and this run is {now.engine} "
            f"on {now.world_size}. {fits}: start with those to go on. Its averages fit any engine: "
            f"averager.load_state('{average}', same_weights=False)"
        )


def require_averages(before: RunRecord, checkpoint: Path, *, there: bool, wanted: bool) -> None:
    """Refuse averages that would be lost, and to average a run whose beginning nobody has averaged.

    Args:
        before: of the checkpoint.
        checkpoint: its folder.
        there: whether it holds averages.
        wanted: whether this run averages.

    Raises:
        ConfigError: as said.
    """
    if there != wanted:
        what = "averaged nothing" if wanted else "averages, and would lose what it has"
        raise ConfigError(
            f"averaging.rule: {checkpoint} is of a run that {what} "
            f"(averaging.rule={before.settings.get('averaging.rule')}); set that, or begin a new run in a new "
            "train.output_dir"
        )


def changed_settings(before: RunRecord, now: Setup, settings: Mapping[str, Any]) -> list[str]:
    """What was set otherwise, in words; where a run is written to and how it goes on apart.

    All of it is obeyed, but that trained weights are the checkpoint's, whatever model they began as. The rows of a
    step are told too: they change with the number of ranks, which no setting says.
    """
    kept = {"model.model_name_or_path": " (the trained weights are the checkpoint's)"}
    names = sorted({*before.settings, *settings} - {"train.output_dir", "train.resume_from_checkpoint"})
    changed = [
        f"{name}: {before.settings.get(name)} before, {settings.get(name)} now{kept.get(name, '')}"
        for name in names
        if before.settings.get(name) != settings.get(name)
    ]
    if before.setup.rows_per_step != now.rows_per_step:
        changed.append(
            f"rows of an optimizer step: {before.setup.rows_per_step} before, {now.rows_per_step} now; they are "
            "train.per_device_train_batch_size x gradient_accumulation_steps x ranks"
        )
    return changed


def batches_read(before: RunRecord, now: Setup) -> int:
    """Micro-batches of the pass that a rank of this run has read, when so many rows have been.

    Raises:
        ConfigError: rows of half a batch have been read.
    """
    was, batches = before.setup, before.parts["position"]["batches"]
    if batches and was.grouped_by != now.grouped_by:
        raise ConfigError(
            f"the checkpoint stands within a pass over rows of like length, grouped by {was.grouped_by}, and "
            f"this run groups them by {now.grouped_by} (train.per_device_train_batch_size times ranks, or "
            "train.group_by_length); set them as they were, for the order of the rows depends on it"
        )
    rows = batches * was.per_device_train_batch_size * was.world_size
    size = now.per_device_train_batch_size * now.world_size
    if rows % size:
        raise ConfigError(
            f"the checkpoint stands at row {rows:,} of a pass, which is no whole number of this run's "
            f"micro-batches of {size} rows over all ranks; set train.per_device_train_batch_size so that it is "
            f"(it was {was.per_device_train_batch_size} on {was.world_size} ranks)"
        )
    return rows // size


def _same_step(before: Setup, now: Setup) -> str:
    """The settings by which a step takes as many rows as it did, in words."""
    return (
        "train.per_device_train_batch_size or gradient_accumulation_steps so that their product with the ranks, "
        f"{now.world_size} now and {before.world_size} before, is {before.rows_per_step} rows a step (it is "
        f"{now.rows_per_step})"
    )


def _short(value: Any) -> Any:
    """A value as it is told: of a digest its beginning."""
    return f"{value[:12]}..." if isinstance(value, str) else value


def _require_fields(record: type, content: Any, checkpoint: Path, where: str) -> None:
    expected = sorted(each.name for each in fields(record))
    found = sorted(content) if isinstance(content, Mapping) else content
    if found != expected:
        raise StateError(
            f"{checkpoint}/manifest.json: {where}: found {found}, expected {expected}; it was written by another "
            "version of swaft, which is the one to go on with"
        )

"""What a run tells while it trains: a banner, one line per logging step, trackers, and a closing table."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import transformers
from accelerate import Accelerator
from tqdm.auto import tqdm

from swaft.averaging import ReadoutSearch
from swaft.training.config import flatten
from swaft.training.evaluation.evaluate import Scores
from swaft.training.launch.accelerator import RunConfig
from swaft.training.run.folder import RunFolder

logger = logging.getLogger(__name__)


class BarSafeHandler(logging.Handler):
    """Writes log lines to standard output above a progress bar, where there is one."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write one line."""
        tqdm.write(self.format(record), file=sys.stdout)
        sys.stdout.flush()


def setup_logging() -> None:
    """Send swaft's lines to standard output: all from the main process, only errors from the others.

    Progress bars of other libraries stay on a terminal; in a log file they are only noise.
    """
    handler = BarSafeHandler()
    handler.setFormatter(logging.Formatter("%(message)s"))
    if not (sys.stderr.isatty() and os.environ.get("LOCAL_RANK", "0") == "0"):
        datasets.disable_progress_bars()
        transformers.utils.logging.disable_progress_bar()
    root = logging.getLogger("swaft")
    root.handlers, root.propagate = [handler], False
    root.setLevel(logging.INFO if os.environ.get("RANK", "0") == "0" else logging.ERROR)


class ProgressLog:
    """Tells the progress of one run to the screen, to metrics.jsonl and to trackers.

    Args:
        accelerator: whose trackers are told too.
        folder: whose metrics.jsonl is written, tracker or not.
        total_steps: optimizer steps of the run.
        averaging: name of the averaging rule, shown before the number of members.
        disable_tqdm: no progress bar; None: a bar only on a terminal. Only the local main process has one.
        done: steps that were taken before.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        folder: RunFolder,
        *,
        total_steps: int,
        averaging: str = "none",
        disable_tqdm: bool | None = None,
        done: int = 0,
    ):
        self._accelerator = accelerator
        self._folder = folder
        self._total_steps = total_steps
        self._averaging = averaging
        hidden = not accelerator.is_local_main_process or bool(disable_tqdm)
        # tqdm reads disable=None as "unless this is a terminal"; a bar in a log file is only noise.
        self._bar = tqdm(
            total=total_steps,
            initial=done,
            unit="step",
            disable=True if hidden else disable_tqdm,
            leave=False,
        )

    def banner(self, facts: Mapping[str, Any]) -> None:
        """Print the facts of the run, one a line, before the first step."""
        logger.info("***** Running training *****")
        for name, value in facts.items():
            logger.info("  %s = %s", name, f"{value:,}" if isinstance(value, int) else value)

    def advance(self) -> None:
        """Move the bar one optimizer step on."""
        self._bar.update()

    def training(self, step: int, record: Mapping[str, float | None]) -> None:
        """Log one training record: a line on the screen, a line in metrics.jsonl, and the trackers."""
        logger.info(training_line(step, self._total_steps, record, averaging=self._averaging))
        known = {name: value for name, value in record.items() if value is not None}
        self._record("train", step, known)

    def evaluation(self, step: int, split: str, scores: Mapping[str, Scores]) -> None:
        """Log scores by kind of weights (``last``, ``averaged``)."""
        for weights, values in scores.items():
            logger.info("step %d | %s, %s weights | %s", step, split, weights, _joined(values))
            self._record(f"{split}/{weights}", step, values)

    def resumes(self, checkpoint: Path, step: int) -> None:
        """Say where the run resumes."""
        logger.info("resuming from %s, after step %d of %d", checkpoint, step, self._total_steps)

    def stopped_early(self, step: int) -> None:
        """Say that an evaluation ended the run before its last step."""
        logger.info(
            "stopped early, after step %d of %d: the validation score gets no better", step, self._total_steps
        )

    def table(self, rows: Sequence[Sequence[str]]) -> None:
        """Print the closing table; the first row is its head."""
        for line in aligned(rows):
            logger.info(line)

    def window(self, found: ReadoutSearch) -> None:
        """Say which weights were averaged, where that was chosen after training."""
        best = found.best
        blended = len({each.readout.blend for each in found.tried}) > 1
        logger.info(
            "averaged: the %d weights from step %d to %d%s, best of %d %s on validation data (%.4f)",
            *(best.members, best.start, best.end),
            f", {best.readout.blend:g} of the way from the last ones" if blended else "",
            *(len(found.tried), "windows and blends" if blended else "windows", best.score),
        )

    def saved(self, folders: Mapping[str, Path]) -> None:
        """Say where the weights lie, by kind."""
        for kind, folder in folders.items():
            logger.info("%s weights saved in %s", kind, folder)

    def close(self) -> None:
        """Take the bar away, end the trackers and leave the process group, all ranks together (collective)."""
        self._bar.close()
        # The main process still writes when the others are done, and a group in use must not lose members.
        self._accelerator.wait_for_everyone()
        self._accelerator.end_training()

    def _record(self, kind: str, step: int, values: Mapping[str, float]) -> None:
        self._folder.append_metrics({"kind": kind, "step": step, **values})
        self._accelerator.log({f"{kind}/{name}": value for name, value in values.items()}, step=step)


def start_trackers(accelerator: Accelerator, config: RunConfig) -> None:
    """Tell the trackers of ``track.report_to``, where there are any, which run this is."""
    if config.track.report_to == "none":
        return
    run_name = config.track.run_name or Path(config.train.output_dir).name
    accelerator.init_trackers(
        config.track.project_name, config=flatten(config), init_kwargs={"wandb": {"name": run_name}}
    )


def training_line(
    step: int, total_steps: int, record: Mapping[str, float | None], *, averaging: str = "swa"
) -> str:
    """Return the line of one training record.

    Args:
        step: optimizer steps so far.
        total_steps: optimizer steps of the run.
        record: ``loss``, ``task_loss``, ``divergence``, ``grad_norm``, ``learning_rate``,
            ``tokens_per_second``, ``noise_to_signal``, ``changed`` and ``num_averaged``; None or missing
            where not measured.
        averaging: name of the averaging rule.
    """
    loss = f"loss {record['loss']:.4g}"
    if record.get("divergence"):
        loss += f" (task {record['task_loss']:.4g}, noise {record['divergence']:.4g})"
    parts = [f"step {step}/{total_steps}", loss]
    if record.get("grad_norm") is not None:
        parts.append(f"gnorm {record['grad_norm']:.3g}")
    parts += [f"lr {record['learning_rate']:.2g}", f"{_thousands(record['tokens_per_second'] or 0.0)} tok/s"]
    if record.get("noise_to_signal"):
        parts.append(f"nsr {record['noise_to_signal']:.2g} changed {record['changed']:.0%}")
    if record.get("num_averaged") is not None:
        parts.append(f"{averaging} {int(record['num_averaged'] or 0) or 'off'}")
    return " | ".join(parts)


def scores_table(scores: Mapping[str, Mapping[str, Scores]], *, seconds: float) -> list[list[str]]:
    """Return the closing table: one row a split and kind of weights, one column a score.

    Args:
        scores: split to kind of weights to scores.
        seconds: time spent in training steps.
    """
    names = list(
        dict.fromkeys(name for kinds in scores.values() for values in kinds.values() for name in values)
    )
    head = ["split", "weights", *names, "train seconds"]
    rows = [
        [split, kind, *(f"{values[name]:.4f}" if name in values else "-" for name in names), f"{seconds:.1f}"]
        for split, kinds in scores.items()
        for kind, values in kinds.items()
    ]
    return [head, *rows]


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return the rows as lines with columns of equal width."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]


def _joined(values: Scores) -> str:
    return " ".join(f"{name} {value:.4f}" for name, value in values.items())


def _thousands(number: float) -> str:
    return f"{number / 1000:.1f}k" if number >= 1000 else f"{number:.0f}"

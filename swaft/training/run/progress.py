"""What a run reports: a banner, a line per logging step, trackers, a closing table, and summary.json."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import datasets
import transformers
from accelerate import Accelerator
from tqdm.auto import tqdm

from swaft.averaging import ReadoutSearch
from swaft.averaging.rules import rule_name
from swaft.distributed import is_first_rank
from swaft.training.config import RecipeConfig, flatten
from swaft.training.evaluation.evaluate import Evaluation, Scores
from swaft.training.launch.accelerator import engine_name
from swaft.training.models.build import noise_facts, noise_in_words

if TYPE_CHECKING:
    from swaft.training.run.run import Run

logger = logging.getLogger(__name__)

ON_THE_LINE = {
    *("loss", "task_loss", "divergence", "grad_norm", "learning_rate", "tokens_per_second", "seconds"),
    *("noise_to_signal", "changed", "num_averaged"),
}
"""Numbers with a fixed place on a log line, or none; other numbers that a recipe logs are appended."""


RUN_NAMES = {
    "wandb": "name", "trackio": "name", "swanlab": "experiment_name", "mlflow": "run_name", "clearml": "task_name",
    "dvclive": "exp_name",
}  # fmt: skip
"""The trackers' argument for the name of a run."""


class BarSafeHandler(logging.Handler):
    """Writes log lines to standard output, above the progress bar if there is one."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write one line."""
        tqdm.write(self.format(record), file=sys.stdout)
        sys.stdout.flush()


def setup_logging() -> None:
    """Send swaft's lines to standard output: all from the main process, only errors from the others.

    Other libraries' errors also come from every process, and their warnings from the main one. Their progress bars
    stay on a terminal; in a log file they are only noise.
    """
    is_main = is_first_rank()
    handler = BarSafeHandler()
    handler.setFormatter(logging.Formatter("%(message)s"))
    if not (sys.stderr.isatty() and os.environ.get("LOCAL_RANK", "0") == "0"):
        disable_progress_bars()
    if not is_main:
        datasets.utils.logging.set_verbosity_error()
        transformers.utils.logging.set_verbosity_error()
    root = logging.getLogger("swaft")
    root.handlers, root.propagate = [handler], False
    root.setLevel(logging.INFO if is_main else logging.ERROR)


def disable_progress_bars() -> None:
    """Turn off the progress bars of other libraries."""
    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()


class ProgressLog:
    """Reports the progress of one run on the screen, in metrics.jsonl and to trackers.

    Args:
        run: the run, at its starting position. Only the local main process has a progress bar.
    """

    def __init__(self, run: Run):
        self._run, begun = run, run.position.step
        # tqdm reads disable=None as "unless this is a terminal"; a bar in a log file is only noise.
        disable = run.config.train.disable_tqdm if run.accelerator.is_local_main_process else True
        self._bar = tqdm(total=run.total_steps, initial=begun, unit="step", disable=disable, leave=False)

    def banner(self, *, task: str, schedule: Callable[[int], float]) -> None:
        """Print the facts of the run, one per line, before the first step."""
        run = self._run
        logger.info("***** Running training *****")
        for name, value in run_facts(run, task=task, schedule=schedule).items():
            logger.info("  %s = %s", name, f"{value:,}" if isinstance(value, int) else value)
        if run.folder.checkpoint is not None:
            path, step = run.folder.checkpoint.path, run.position.step
            logger.info("resuming from %s, after step %d of %d", path, step, run.total_steps)

    def advance(self) -> None:
        """Advance the bar by one optimizer step."""
        self._bar.update()

    def training(self, step: int, record: Mapping[str, float | None]) -> None:
        """Log one training record: a line on the screen, a line in metrics.jsonl, and the trackers."""
        run = self._run
        rule = "none" if run.averager is None else rule_name(run.averager.plan())
        logger.info(training_line(step, run.total_steps, record, averaging=rule))
        known = {name: value for name, value in record.items() if value is not None}
        self._record("train", step, known)

    def evaluation(self, step: int, split: str, scores: Mapping[str, Scores]) -> None:
        """Log scores by kind of weights (``last``, ``averaged``)."""
        for weights, values in scores.items():
            found = " ".join(f"{name} {value:.4f}" for name, value in values.items())
            logger.info("step %d | %s, %s weights | %s", step, split, weights, found)
            self._record(f"{split}/{weights}", step, values)

    def stopped_early(self) -> None:
        """Log that an evaluation ended the run before its last step."""
        done, total = self._run.position.step, self._run.total_steps
        logger.info("stopped early, after step %d of %d: the validation score is not improving", done, total)

    def searching(self, choices: Sequence[str], *, evaluations: int) -> None:
        """Log that a window or a blend (the choices) is chosen now, with this many evaluations at most."""
        logger.info(
            "choosing the %s of the average by %s on validation data, with at most %d evaluations",
            *(" and the ".join(choices), self._run.target.chosen, evaluations),
        )

    def window(self, found: ReadoutSearch, choices: Sequence[str]) -> None:
        """Log which weights were averaged, if that was chosen after training."""
        averager, best = self._run.averager, found.best
        assert averager is not None
        score = f"{self._run.target.chosen} {best.score:.4f}"
        if best.readout.blend == 0 or best.start == averager.applied_steps:
            logger.info(
                "averaged: no %s scored better than the last weights; %s holds those (%s)",
                *(" or ".join(choices), self._run.folder.final_averaged.name, score),
            )
            return
        logger.info(
            "averaged: %s, best of %d %s on validation data (%s)",
            averager.plan().in_words(averager.count(), best.readout),
            *(len(found.tried), " and ".join(f"{each}s" for each in choices), score),
        )

    def end(
        self, saved: Mapping[str, Path], scores: Mapping[str, Mapping[str, Scores]], *, seconds: float
    ) -> None:
        """Log where the weights are, by kind, and print the closing table if anything was scored."""
        best = self._run.best and self._run.best.found
        for kind, folder in saved.items():
            which = f" ({best.weights}, {best})" if best and kind == "best" else ""
            logger.info("%s weights%s saved in %s", kind, which, folder)
        if scores:
            for line in closing_table(scores, seconds=seconds):
                logger.info(line)

    def close(self) -> None:
        """Remove the bar, end the trackers and leave the process group, all ranks together (collective)."""
        self._bar.close()
        # The main process is still writing when the others are done, and a group in use must not lose members.
        self._run.accelerator.wait_for_everyone()
        self._run.accelerator.end_training()

    def _record(self, kind: str, step: int, values: Mapping[str, float]) -> None:
        self._run.folder.append_metrics({"kind": kind, "step": step, **values})
        self._run.accelerator.log({f"{kind}/{name}": value for name, value in values.items()}, step=step)


def start_trackers(accelerator: Accelerator, config: RecipeConfig) -> None:
    """Start the trackers of ``track.report_to``, if any, with the settings of the run."""
    if config.track.report_to == "none":
        return
    track, run_name = config.track, config.track.run_name or Path(config.train.output_dir).name
    # accelerate takes the run's folder for tensorboard, and its name for aim, only from the project.
    projects = {"tensorboard": f"{track.project_name}/{run_name}", "aim": run_name}
    names = {tracker: {name: run_name} for tracker, name in RUN_NAMES.items()}
    if "CLEARML_TASK" in os.environ:  # takes precedence
        del names["clearml"]
    accelerator.init_trackers(
        projects.get(track.report_to, track.project_name), config=flatten(config), init_kwargs=names
    )


def training_line(
    step: int, total_steps: int, record: Mapping[str, float | None], *, averaging: str = "swa"
) -> str:
    """Return the line of one training record.

    Args:
        step: optimizer steps so far.
        total_steps: optimizer steps of the run.
        record: numbers by name, None or missing if not measured: those of `ON_THE_LINE` (at least ``loss``,
            ``learning_rate`` and ``tokens_per_second``), and whatever else the recipe logs.
        averaging: name of the averaging rule.
    """
    loss = f"loss {record['loss']:.4g}"
    if record.get("divergence") is not None:
        loss += f" (task {record['task_loss']:.4g}, noise {record['divergence']:.4g})"
    parts = [f"step {step}/{total_steps}", loss]
    if record.get("grad_norm") is not None:
        parts.append(f"gnorm {record['grad_norm']:.3g}")
    speed = record["tokens_per_second"] or 0.0
    shown = f"{speed / 1000:.1f}k" if speed >= 1000 else f"{speed:.0f}"
    parts += [f"lr {record['learning_rate']:.2g}", f"{shown} tok/s"]
    if record.get("noise_to_signal") is not None:
        parts.append(f"nsr {record['noise_to_signal']:.2g} changed {record['changed']:.0%}")
    parts += [f"{name} {record[name]:.4g}" for name in record if name not in ON_THE_LINE]
    if record.get("num_averaged") is not None:
        parts.append(f"{averaging} {int(record['num_averaged'] or 0) or 'off'}")
    if step < total_steps and (seconds := record.get("seconds")):
        left = round(seconds / step * (total_steps - step))
        parts += [f"{timedelta(seconds=left)} of training left"] if left else []
    return " | ".join(parts)


def closing_table(scores: Mapping[str, Mapping[str, Scores]], *, seconds: float) -> list[str]:
    """Return the lines of the closing table: a row per split and kind of weights, a column per score."""
    names = list(
        dict.fromkeys(name for kinds in scores.values() for values in kinds.values() for name in values)
    )
    rows = [["split", "weights", *names, "train seconds"]]
    for split, kinds in scores.items():
        for kind, values in kinds.items():
            cells = [f"{values[name]:.4f}" if name in values else "-" for name in names]
            rows.append([split, kind, *cells, f"{seconds:.1f}"])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]


def run_facts(run: Run, *, task: str, schedule: Callable[[int], float]) -> dict[str, Any]:
    """Return the facts of a prepared run for its banner, with the names used by transformers' Trainer."""
    train, accelerator, averager = run.config.train, run.accelerator, run.averager
    per_step = (
        train.per_device_train_batch_size * train.gradient_accumulation_steps * accelerator.num_processes
    )
    precision = "fp32" if accelerator.mixed_precision == "no" else f"{accelerator.mixed_precision} over fp32"
    facts = {
        "Task": task,
        "Num examples": run.num_rows,
        "Num epochs": f"{run.total_steps / run.steps_per_epoch:.2f}",
        "Instantaneous batch size per device": train.per_device_train_batch_size,
        "Total train batch size (w. parallel, distributed & accumulation)": per_step,
        "Gradient accumulation steps": train.gradient_accumulation_steps,
        "Total optimization steps": run.total_steps,
        "Number of trainable parameters": str(run.num_parameters),
        "Learning rate": getattr(schedule, "__name__", str(schedule)),
        "Engine": engine_name(accelerator),
        "Ranks": f"{accelerator.num_processes} on {accelerator.device.type}",
        "Precision": precision,
        "Objective": noise_in_words(noise_facts(run.objective, run.model)),
        "Averaging": "none",
    }
    if facts["Objective"] == "none":  # one pass: the task loss, or a copied recipe's own
        facts["Objective"] = getattr(run.objective, "__name__", type(run.objective).__name__)
    if averager is not None:
        plan = averager.plan()
        facts["Averaging"] = f"{plan.rule!r}: {plan.in_words(plan.num_members, run.readout)}"
        facts["Averaging takes"] = "; ".join(str(averager.forecast()).splitlines())
    return facts


def summary(
    run: Run,
    evaluations: Mapping[str, Mapping[str, Evaluation]],
    *,
    seconds: float,
    window: ReadoutSearch | None = None,
) -> dict[str, Any]:
    """Return the content of summary.json.

    Args:
        run: the finished run.
        evaluations: by split and kind of weights (``last``, ``averaged``).
        seconds: time in training steps, without evaluation and saving.
        window: what was averaged, if that was chosen after training.
    """
    averager, steps = run.averager, run.position.step

    def each(part: Callable[[Evaluation], Any]) -> dict[str, dict[str, Any]]:
        return {
            split: {kind: part(evaluation) for kind, evaluation in kinds.items()}
            for split, kinds in evaluations.items()
        }

    content: dict[str, Any] = {
        "metric": run.target.score,
        "scores": each(lambda evaluation: evaluation.scores),
        "steps": steps,
        "applied_steps": run.applied_steps,
        "num_averaged": 0 if averager is None else averager.num_averaged,
        "train_seconds": round(seconds, 3),
    }
    if run.position.stopped:
        content["stopped_early_at"] = steps
    if run.best is not None and run.best.found is not None:
        content["best"] = asdict(run.best.found)
    if any(evaluation.details for kinds in evaluations.values() for evaluation in kinds.values()):
        content["details"] = each(lambda evaluation: evaluation.details)
    if averager is not None:
        # How often averaging blocked training, and for how long in total.
        content["averaging_waits"] = averager.waits.count
        content["averaging_wait_seconds"] = round(averager.waits.seconds, 3)
    if window is not None:
        content["window"] = window.best.row()
        content["windows_tried"] = [tried.row() for tried in window.tried]
    return content

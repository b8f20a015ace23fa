"""Keeps the weights that score best on validation rows, and says when further training no longer helps."""

from __future__ import annotations

import json
import logging
import math
import shutil
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from swaft.averaging import Engine, Readout, WeightAverager, save_pretrained
from swaft.errors import ConfigError
from swaft.storage import sync_tree
from swaft.storage.files import beside, replace_folder
from swaft.training.config import AveragingConfig, EvalConfig
from swaft.training.metrics import Metric, Scores

logger = logging.getLogger(__name__)

STATE = "state.json"
"""File with the best score so far, next to the best weights in a checkpoint."""
LOWER_IS_BETTER = ("loss", "perplexity")
"""Scores of any run for which lower is better; a metric says which of its own are (`Metric.lower_is_better`)."""


@dataclass(frozen=True, kw_only=True)
class Target:
    """The scores by which a recipe judges weights."""

    score: str
    """Name of the main score, as given in the summary."""
    chosen: str
    """Name of the score that decides between weights."""
    better: Callable[..., Any] = max
    """The built-in ``min`` or ``max``."""


@dataclass(frozen=True, kw_only=True)
class Best:
    """The weights that scored best so far."""

    step: int
    """Optimizer steps after which they were found."""
    weights: str
    """``last`` or ``averaged``."""
    metric: str
    """Name of the score."""
    score: float
    """Their score on validation rows."""

    def __str__(self) -> str:
        """Write it as `step 20, validation accuracy 0.9100`."""
        return f"step {self.step:,}, validation {self.metric} {self.score:.4f}"


def choose_target(
    evaluation: EvalConfig,
    metric: Metric | None,
    splits: Collection[str],
    averaging: AveragingConfig | None = None,
    *,
    others: Sequence[str] = ("loss",),
) -> Target:
    """Return what decides between weights: the score that the settings name, else the main one.

    Args:
        evaluation: section ``eval``.
        metric: what is measured, its main score first; None: only the others.
        splits: names of the splits.
        averaging: section ``averaging``.
        others: scores that every evaluation reports as well.

    Raises:
        ConfigError: there is no such score, or there are no validation rows to choose by.
    """
    names, lower = (metric.names, metric.lower_is_better) if metric else ((), ())
    known = list(dict.fromkeys([*names, *others]))
    chosen = evaluation.metric_for_best_model or known[0]
    problems = []
    if chosen not in known:
        problems.append(
            f"eval.metric_for_best_model: this run has no score '{chosen}' to choose weights by; expected one of "
            f"{', '.join(known)}"
        )
    asked = {
        "eval.eval_steps": evaluation.eval_steps is not None,
        "eval.keep_best": evaluation.keep_best != "none",
        "eval.early_stopping_patience": evaluation.early_stopping_patience is not None,
        "averaging.search_blend": averaging is not None and averaging.search_blend,
        "averaging.rule=windows": averaging is not None and averaging.rule == "windows",
    }
    problems += [
        f"{name}: weights are scored on validation rows, and there are none; add some "
        f"(data.validation_file), or {'choose another rule' if 'rule' in name else 'remove it'}"
        for name, is_asked in asked.items()
        if is_asked and "validation" not in splits
    ]
    if problems:
        raise ConfigError(problems)
    better = min if chosen in (*LOWER_IS_BETTER, *lower) else max
    return Target(score=known[0], chosen=chosen, better=better)


class BestWeights:
    """Tracks the validation score of a run's weights, and keeps the best in a folder if asked to.

    Args:
        evaluation: section ``eval``.
        target: which score counts, from `choose_target`.
        folder: Hugging Face folder for the best weights. It is always either complete or absent.
        tokenizer: saved with the weights.
        engine: its last weights may be kept.
        averager: its averaged weights may be kept; None without averaging.
    """

    def __init__(
        self,
        evaluation: EvalConfig,
        *,
        target: Target,
        folder: Path,
        tokenizer: Any,
        engine: Engine,
        averager: WeightAverager | None,
    ):
        self.found: Best | None = None
        """The best weights so far; None before the first score that is a number."""
        kind = evaluation.keep_best
        self._keeps = kind != "none"
        # If scores tie, the first counts.
        self._watched = (kind,) if kind in ("last", "averaged") else ("averaged", "last")
        self._patience = evaluation.early_stopping_patience
        self._threshold = evaluation.early_stopping_threshold
        self._target, self._folder, self._tokenizer = target, folder, tokenizer
        self._engine, self._averager = engine, averager
        self._in_vain = 0

    def observe(self, step: int, scores: Mapping[str, Scores], readout: Readout | None = None) -> bool:
        """Take in an evaluation on validation rows, and keep the weights if they are the best so far (collective).

        Args:
            step: optimizer steps taken so far.
            scores: scores of the current weights, by kind, ``last`` and ``averaged``.
            readout: which average was evaluated, if the rule offers a choice.

        Returns:
            Whether to stop, because the patience has run out without a better score; the same on every rank.

        Raises:
            StateError, AveragingError: the weights could not be written; on every rank.
        """
        seen = {kind: scores[kind][self._target.chosen] for kind in self._watched if kind in scores}
        # All ranks use the first one's score: different kinds of machines may round it differently.
        seen = self._engine.ranks.gather(seen)[0]
        seen = {kind: score for kind, score in seen.items() if not math.isnan(score)}
        gain = 0.0
        if seen:
            kind = self._target.better(seen, key=seen.__getitem__)
            gain = self._gain_of(seen[kind])
            if gain > 0:
                self.found = Best(step=step, weights=kind, metric=self._target.chosen, score=seen[kind])
                if self._keeps:
                    self._write(self.found, readout)
        waits_for_average = self._averager is not None and "averaged" not in scores
        self._in_vain = 0 if waits_for_average or gain > self._threshold else self._in_vain + 1
        return self._patience is not None and self._in_vain >= self._patience

    def save_state(self, path: Path) -> None:
        """Save the best score so far and the best weights in a checkpoint (collective).

        The weights are copied: files shared by several checkpoints would be damaged in all of them at once.
        """
        ranks = self._engine.ranks
        with ranks.together(f"{path} could not be written", patiently=True):
            if ranks.is_main:
                kept = bool(self.found and self._keeps)
                if kept:
                    shutil.copytree(self._folder, path)
                path.mkdir(parents=True, exist_ok=True)
                names = [str(file.relative_to(path)) for file in path.rglob("*") if file.is_file()]
                state = {"found": self.found and asdict(self.found), "in_vain": self._in_vain, "files": names}
                (path / STATE).write_text(json.dumps(state), encoding="utf-8")

    def load_state(self, path: Path) -> None:
        """Continue from what :meth:`save_state` wrote, whatever the folder holds by now (collective).

        If section ``eval`` has changed so that old and new scores cannot be compared, the choice starts again.
        """
        ranks = self._engine.ranks
        with ranks.together(f"{self._folder} could not be restored", patiently=True):
            if not (path / STATE).exists():  # the checkpoint is from a run that did not choose
                return
            state = json.loads((path / STATE).read_text(encoding="utf-8"))
            found = None if state["found"] is None else Best(**state["found"])
            if found is not None and (problem := self._incomparable(found, kept=bool(state["files"]))):
                logger.warning("%s; the choice of the best weights starts again from here", problem)
                return
            self.found, self._in_vain = found, state["in_vain"]
            if ranks.is_main and state["files"]:
                new = self._emptied()
                for name in state["files"]:
                    (new / name).parent.mkdir(parents=True, exist_ok=True)
                    shutil.copyfile(path / name, new / name)
                self._put_in_place(new)
            elif ranks.is_main and self._folder.exists():  # from steps that will be repeated
                shutil.rmtree(self._folder)

    def _incomparable(self, found: Best, *, kept: bool) -> str | None:
        """Return why the best weights of a checkpoint cannot be compared with later ones; None: they can."""
        if found.metric != self._target.chosen:
            return f"eval.metric_for_best_model is {self._target.chosen}, but was {found.metric}"
        if found.weights not in self._watched:
            return f"eval.keep_best looks at {self._watched[0]} weights, but the best were {found.weights}"
        if self._keeps and not kept:
            return "eval.keep_best was none, so the best weights so far were not kept"
        return None

    def _gain_of(self, score: float) -> float:
        if self.found is None:
            return math.inf
        return score - self.found.score if self._target.better is max else self.found.score - score

    def _write(self, found: Best, readout: Readout | None) -> None:
        ranks, note = self._engine.ranks, f" (the best so far: {found})"
        new = self._emptied()
        if found.weights == "averaged":
            assert self._averager is not None
            self._averager.save_pretrained(new, readout, note=note)
        else:
            save_pretrained(self._engine, new, description=f"weights of a training run, not averaged{note}")
        with ranks.together(f"{self._folder} could not be written", patiently=True):
            if ranks.is_main:
                self._tokenizer.save_pretrained(new)
                self._put_in_place(new)

    def _emptied(self) -> Path:
        """Return the folder for new best weights, emptied of what an interrupted run left there."""
        place = beside(self._folder, "new")
        if self._engine.ranks.is_main:
            shutil.rmtree(place, ignore_errors=True)
        return place / self._folder.name  # the model card names the folder it is written into

    def _put_in_place(self, new: Path) -> None:
        sync_tree(new)
        replace_folder(new, self._folder)
        new.parent.rmdir()

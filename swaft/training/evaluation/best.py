"""Keeps the weights that score best on validation rows, and says when training on no longer helps."""

from __future__ import annotations

import json
import logging
import math
import shutil
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from swaft.averaging import Engine, Readout, WeightAverager, save_pretrained
from swaft.errors import ConfigError
from swaft.storage import sync_tree
from swaft.storage.files import beside, replace_folder
from swaft.training.config import AveragingConfig, EvalConfig
from swaft.training.evaluation.evaluate import Scores
from swaft.training.metrics import Metric

logger = logging.getLogger(__name__)

STATE = "state.json"
"""What was found so far, beside the best weights in a checkpoint."""
LOWER_IS_BETTER = ("loss", "mse")
"""The scores of which less is better; of all others more is."""


@dataclass(frozen=True, kw_only=True)
class Target:
    """What a recipe judges weights by."""

    score: str
    """Name of the main score, which the summary names."""
    chosen: str
    """Name of the score that decides between weights."""

    @property
    def better(self) -> Callable[..., Any]:
        """The built-in ``min`` or ``max``."""
        return min if self.chosen in LOWER_IS_BETTER else max


@dataclass(frozen=True, kw_only=True)
class Best:
    """The weights that scored best so far."""

    step: int
    """Optimizer steps that they took."""
    weights: str
    """``last`` or ``averaged``."""
    metric: str
    """Name of the score."""
    score: float
    """Their score on validation rows."""


def watches_weights(evaluation: EvalConfig) -> bool:
    """Whether a run's weights are judged while it trains, to keep the best or to stop early."""
    return evaluation.keep_best != "none" or evaluation.early_stopping_patience is not None


def choose_target(
    evaluation: EvalConfig,
    metric: Metric | None,
    splits: Collection[str],
    averaging: AveragingConfig | None = None,
) -> Target:
    """Return what decides between weights: a score of the metric, if there is one, or the loss.

    Raises:
        ConfigError: there is no such score, or there are no validation rows to choose by.
    """
    known = [*(metric.names if metric else ()), "loss"]
    chosen = evaluation.metric_for_best_model or known[0]
    problems = []
    if chosen not in known:
        problems.append(
            f"eval.metric_for_best_model: this run has no score '{chosen}'; expected one of {', '.join(known)}"
        )
    asked = {
        "eval.eval_steps": evaluation.eval_steps is not None,
        "eval.keep_best": evaluation.keep_best != "none",
        "eval.early_stopping_patience": evaluation.early_stopping_patience is not None,
        "averaging.search_blend": averaging is not None and averaging.search_blend,
    }
    problems += [
        f"{name}: weights are scored on validation rows, and there are none; name some "
        "(data.validation_file), or remove it"
        for name, is_asked in asked.items()
        if is_asked and "validation" not in splits
    ]
    if problems:
        raise ConfigError(problems)
    return Target(score=known[0], chosen=chosen)


class BestWeights:
    """Follows the validation score of a run's weights; keeps the best of them in a folder, where that is asked for.

    Args:
        evaluation: section ``eval``.
        target: which score counts, from `choose_target`.
        folder: Hugging Face folder of the best weights. It is always a whole one, or not there.
        tokenizer: saved beside the weights.
        engine: whose last weights may be kept.
        averager: whose averaged weights may be kept; None without averaging.
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
        # Of equal scores the first counts.
        self._watched = (kind,) if kind in ("last", "averaged") else ("averaged", "last")
        self._patience = evaluation.early_stopping_patience
        self._threshold = evaluation.early_stopping_threshold
        self._target, self._folder, self._tokenizer = target, folder, tokenizer
        self._engine, self._averager = engine, averager
        self._in_vain = 0

    def observe(self, step: int, scores: Mapping[str, Scores], readout: Readout | None = None) -> bool:
        """Take in an evaluation on validation rows, and keep the weights if they are the best so far (collective).

        Args:
            step: optimizer steps that the weights took.
            scores: by kind of weights, ``last`` and ``averaged``; of the weights as they are now.
            readout: which average was evaluated, where the rule leaves a choice.

        Returns:
            Whether the run has had its patience's worth of evaluations without a better score; the same on every
            rank.

        Raises:
            StateError, AveragingError: the weights could not be written; on every rank.
        """
        seen = {kind: scores[kind][self._target.chosen] for kind in self._watched if kind in scores}
        # All ranks follow the first: machines of different make may round a score apart.
        seen = self._engine.ranks.gather(seen)[0]
        seen = {kind: score for kind, score in seen.items() if not math.isnan(score)}
        gain = 0.0
        if seen:
            kind = self._target.better(seen, key=seen.__getitem__)
            gain = self._gain_of(seen[kind])
            if gain > 0:
                self.found = Best(step=step, weights=kind, metric=self._target.chosen, score=seen[kind])
                if self._keeps:
                    self._write(kind, readout)
        waits_for_average = self._averager is not None and "averaged" not in scores
        self._in_vain = 0 if waits_for_average or gain > self._threshold else self._in_vain + 1
        return self._patience is not None and self._in_vain >= self._patience

    def save_state(self, path: Path) -> None:
        """Keep in a checkpoint what was found so far, and the best weights too (collective).

        They are copied: files that several checkpoints shared would be damaged in all of them at once.
        """
        ranks = self._engine.ranks
        with ranks.together(f"{path} could not be written"):
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

        Where section ``eval`` has changed so that what was found cannot be compared with what will be, choosing
        begins anew.
        """
        ranks = self._engine.ranks
        with ranks.together(f"{self._folder} could not be restored"):
            if not (path / STATE).exists():  # of a run that did not choose
                return
            state = json.loads((path / STATE).read_text(encoding="utf-8"))
            found = None if state["found"] is None else Best(**state["found"])
            if found is not None and (problem := self._incomparable(found, kept=bool(state["files"]))):
                logger.warning("%s; the best weights are chosen anew from here", problem)
                return
            self.found, self._in_vain = found, state["in_vain"]
            if ranks.is_main and state["files"]:
                new = self._emptied()
                for name in state["files"]:
                    (new / name).parent.mkdir(parents=True, exist_ok=True)
                    shutil.copyfile(path / name, new / name)
                self._put_in_place(new)
            elif ranks.is_main and self._folder.exists():  # of steps that will be taken again
                shutil.rmtree(self._folder)

    def _incomparable(self, found: Best, *, kept: bool) -> str | None:
        """Return why the best weights of a checkpoint cannot be compared with those to come; None: they can."""
        if found.metric != self._target.chosen:
            return f"eval.metric_for_best_model is {self._target.chosen}, and was {found.metric}"
        if found.weights not in self._watched:
            return f"eval.keep_best looks at {self._watched[0]} weights, and the best were {found.weights}"
        if self._keeps and not kept:
            return "eval.keep_best was none, and the best weights of so far were not kept"
        return None

    def _gain_of(self, score: float) -> float:
        if self.found is None:
            return math.inf
        return score - self.found.score if self._target.better is max else self.found.score - score

    def _write(self, kind: str, readout: Readout | None) -> None:
        ranks = self._engine.ranks
        new = self._emptied()
        if kind == "averaged":
            assert self._averager is not None
            self._averager.save_pretrained(new, readout)
        else:
            save_pretrained(self._engine, new)
        with ranks.together(f"{self._folder} could not be written"):
            if ranks.is_main:
                self._tokenizer.save_pretrained(new)
                self._put_in_place(new)

    def _emptied(self) -> Path:
        """Return the folder for new best weights, without what a run left there that was ended."""
        new = beside(self._folder, "new")
        if self._engine.ranks.is_main:
            shutil.rmtree(new, ignore_errors=True)
        return new

    def _put_in_place(self, new: Path) -> None:
        sync_tree(new)
        replace_folder(new, self._folder)

"""The records of a run: a recipe's run folder, or the state of transformers' Trainer."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from swaft.errors import ConfigError

Curve = list[tuple[float, float]]
"""(optimizer step, value) pairs, ordered by step."""

SURFACE = "surface.json"
"""File of a run folder that holds the losses between last and averaged weights, and around them."""
TRAINER_STATE = "trainer_state.json"
"""File in which transformers' Trainer keeps its log."""
NOT_A_SCORE = re.compile(r"(runtime|per_second|epoch|model_preparation_time|num_tokens)$")
"""Numbers that the Trainer logs among the scores."""


@dataclass(frozen=True, kw_only=True)
class RunLog:
    """One run, as far as its files describe it."""

    path: Path
    training: dict[str, Curve] = field(default_factory=dict)
    """Curves of the training log, by name."""
    evaluations: dict[str, dict[str, dict[str, Curve]]] = field(default_factory=dict)
    """Curves of scores: by split (``validation``), score name, and weights (``last``, ``averaged``)."""
    final: dict[str, dict[str, dict[str, float]]] = field(default_factory=dict)
    """Final scores: by split, weights, and score name."""
    metric: str | None = None
    """The score that counts."""
    facts: dict[str, Any] = field(default_factory=dict)
    """Other facts that the run reports, by name."""
    settings: dict[str, tuple[Any, str]] = field(default_factory=dict)
    """Every setting's value and where it came from, by full name (``train.seed``)."""
    windows: list[dict[str, float]] = field(default_factory=list)
    """Averages tried after training: ``start`` and ``end`` (steps), ``score``, and ``blend`` if it was tried."""
    samples: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    """Generated texts by split, one row each: the input, and the output of each kind of weights."""
    surface: dict[str, Any] | None = None
    """The result of ``swaft report --surface``."""
    notes: list[str] = field(default_factory=list)
    """Notes for the reader: the run has not ended, a line was truncated."""

    @property
    def name(self) -> str:
        """The run's name on the page."""
        return self.path.resolve().name

    def score(self, split: str, weights: str, name: str) -> float | None:
        """Return a final score; None: the run has none of this split, kind of weights and name."""
        return self.final.get(split, {}).get(weights, {}).get(name)


def read_run(path: Path) -> RunLog:
    """Read a recipe's run folder; or an output folder, a checkpoint or the trainer_state.json of the Trainer.

    Raises:
        ConfigError: there is no run, or its files cannot be read.
    """
    try:
        return _read_run(path)
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error


def _read_run(path: Path) -> RunLog:
    if path.is_file() and path.name == TRAINER_STATE:
        path = path.parent
    if (path / "metrics.jsonl").is_file():
        return _read_recipe_run(path)
    # Of one step the output folder's state is the later one: it may have an evaluation after training.
    states = [*path.glob(f"checkpoint-*/{TRAINER_STATE}"), path / TRAINER_STATE]
    steps = {each: (json_object(each) or {}).get("global_step") or 0 for each in filter(Path.is_file, states)}
    states = sorted(steps, key=steps.__getitem__)
    if states:
        return _read_trainer_run(path, states[-1])
    if (path / "config.yaml").is_file():
        raise ConfigError(
            f"{path} has no metrics.jsonl: the run has logged nothing yet, or was not a recipe's"
        )
    found = "no folder" if not path.is_dir() else "a folder that holds neither"
    raise ConfigError(
        f"{path} is {found}; expected a run: a folder with metrics.jsonl (a recipe's), or with trainer_state.json "
        "or checkpoint-*/trainer_state.json (the Trainer's)"
    )


def name_among(run: RunLog, runs: Sequence[RunLog]) -> str:
    """Return a unique name for a run: its name, preceded by as many folders as tell it from the others."""
    own, every = run.path.resolve().parts, {each.path.resolve().parts for each in runs}
    tails = (own[-length:] for length in range(1, len(own)))
    alone = (tail for tail in tails if sum(each[-len(tail) :] == tail for each in every) == 1)
    return "/".join(next(alone, own))


def _read_recipe_run(path: Path) -> RunLog:
    notes: list[str] = []
    training, evaluations = {}, {}
    for record in _json_lines(path / "metrics.jsonl", notes):
        kind, step = record.pop("kind", ""), record.pop("step", None)
        if kind == "train":
            _add(training, step, record)
        elif "/" in kind:
            split, weights = kind.split("/", 1)
            _add(training, step, {"drift": record.pop("drift", None)})
            for score, value in record.items():
                _add(evaluations.setdefault(split, {}).setdefault(score, {}), step, {weights: value})
    summary = json_object(path / "summary.json")
    if summary is None:
        notes.append("The run has not ended: there is no summary.json.")
        summary = {}
    if not (path / "config.yaml").is_file():
        notes.append("There is no config.yaml, so settings are not known.")
    final, windows = summary.get("scores", {}), summary.get("windows_tried", [])
    _require(
        _is_nested(final, 3), path / "summary.json", "scores are not by split, kind of weights, and name"
    )
    _require(
        all({"start", "end", "score"} <= {*row} for row in windows),
        path / "summary.json",
        "windows_tried lacks start, end or score",
    )
    return RunLog(
        path=path,
        training=training,
        evaluations=evaluations,
        final={
            split: {
                kind: {score: value for score, value in scores.items() if _is_number(value)}
                for kind, scores in kinds.items()
            }
            for split, kinds in final.items()
        },
        metric=summary.get("metric"),
        facts={k: v for k, v in summary.items() if k not in ("scores", "details", "windows_tried", "metric")},
        settings=_settings(path),
        windows=windows,
        samples={
            each.stem.removeprefix("samples-"): list(_json_lines(each, notes))
            for each in sorted(path.glob("samples-*.jsonl"))
        },
        surface=_surface(path),
        notes=notes,
    )


def _read_trainer_run(path: Path, state_file: Path) -> RunLog:
    state = json_object(state_file) or {}
    if not isinstance(state.get("log_history"), list):
        raise ConfigError(f"{state_file} has no log_history; expected the state of transformers' Trainer")
    training, evaluations = {}, {}
    final: dict[str, dict[str, float]] = {}
    are_objects = all(isinstance(entry, dict) for entry in state["log_history"])
    _require(are_objects, state_file, "log_history holds no objects")
    for entry in state["log_history"]:
        step = entry.get("step")
        scores = {  # a user's metric may be a list or a text
            name: value for name, value in entry.items() if _is_number(value) and not NOT_A_SCORE.search(name)
        }
        if "loss" in entry:
            _add(training, step, {name: value for name, value in scores.items() if name != "step"})
        for name, value in scores.items():
            if name.startswith("eval_"):
                short = name.removeprefix("eval_")
                weights = "averaged" if short.startswith("averaged_") else "last"
                score = short.removeprefix("averaged_")
                if short == "averaged_drift":
                    _add(training, step, {"drift": value})
                    continue
                _add(evaluations.setdefault(score, {}), step, {weights: value})
                final.setdefault(weights, {})[score] = value
    return RunLog(
        path=path,
        training=training,
        evaluations={"validation": evaluations} if evaluations else {},
        final={"validation": final} if final else {},
        metric="loss" if final else None,
        facts={
            name: state.get(name)
            for name in ("global_step", "max_steps", "best_metric", "best_model_checkpoint")
        },
        surface=_surface(path),
        notes=[f"Read from {state_file.relative_to(path)}, at step {state.get('global_step')}."],
    )


def _surface(path: Path) -> dict[str, Any] | None:
    file = path / SURFACE
    found = json_object(file)
    if found is not None:
        for part, names in (("line", {"position", "loss"}), ("plane", {"across", "up", "loss"})):
            _require(names <= {*found.get(part, ())}, file, f"{part} lacks one of {', '.join(sorted(names))}")
    return found


def _add(curves: dict[str, Curve], step: Any, values: Mapping[str, Any]) -> None:
    for name, value in values.items():
        if _is_number(step) and _is_number(value):
            curves.setdefault(name, []).append((step, float(value)))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _json_lines(path: Path, notes: list[str]) -> Iterator[dict[str, Any]]:
    """Yield the records of a file; a truncated last line is left out, with a note."""
    with path.open(encoding="utf-8", errors="replace", newline="\n") as file:
        lines = list(file)  # splitlines would also split inside texts, at U+2028 for example
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
            _require(isinstance(record, dict), path, f"line {number} is not an object")
            yield record
        except ValueError as error:
            if number < len(lines):
                raise ConfigError(f"{path}: line {number} is not JSON ({error}); fix or remove it") from error
            notes.append(f"The last line of {path.name} is cut off, and left out.")


def json_object(path: Path) -> dict[str, Any] | None:
    """Return the object in a JSON file; None if there is no file.

    Raises:
        ConfigError: it holds something else.
    """
    if not path.is_file():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{path} is not JSON ({error}); expected what the run wrote") from error
    if not isinstance(found, dict):
        raise ConfigError(f"{path} holds a {type(found).__name__}; expected an object")
    return found


def _require(is_right: bool, file: Path, wrong: str) -> None:
    if not is_right:
        raise ConfigError(f"{file}: {wrong}; it is damaged, or of another version of swaft")


def _is_nested(value: Any, depth: int) -> bool:
    """Whether a value consists of mappings nested ``depth`` levels deep."""
    return depth == 0 or (
        isinstance(value, dict) and all(_is_nested(each, depth - 1) for each in value.values())
    )


def setting_values(path: Path) -> dict[str, Any]:
    """Return the settings in a run's config.yaml by full name (``train.seed``); empty if there is none.

    Raises:
        ConfigError: it is not YAML with sections.
    """
    import yaml

    file = path / "config.yaml"
    try:
        sections = yaml.safe_load(file.read_text(encoding="utf-8")) if file.is_file() else {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file} is not YAML ({error}); expected what the run wrote") from error
    if not isinstance(sections, dict):
        raise ConfigError(f"{file} holds no sections of settings; expected what the run wrote")
    return {
        f"{section}.{name}": value
        for section, settings in sections.items()
        if isinstance(settings, dict)
        for name, value in settings.items()
    }


def config_class(values: Mapping[str, Any]) -> type | None:
    """Return the recipe settings class that shares the most settings with these; None if none shares any.

    Args:
        values: by full name. Another version of swaft may have a few more or fewer.
    """
    from swaft.training.data.causal_lm import CausalConfig
    from swaft.training.data.classification import ClassificationConfig
    from swaft.training.data.question_answering import QuestionAnsweringConfig
    from swaft.training.data.seq2seq import Seq2SeqConfig

    kinds = (ClassificationConfig, QuestionAnsweringConfig, Seq2SeqConfig, CausalConfig)
    shared = {kind: len(_defaults(kind).keys() & values.keys()) for kind in kinds}
    best = max(kinds, key=shared.__getitem__)
    return best if shared[best] else None


def _settings(path: Path) -> dict[str, tuple[Any, str]]:
    """Return the value of every setting, and where it came from: command.txt lists those of the command line."""
    command, values = path / "command.txt", setting_values(path)
    words = command.read_text(encoding="utf-8") if command.is_file() else ""
    given = set(re.findall(r"(?:^|[\s'\"-])([a-z_]+\.[a-z_0-9]+)(?=[=\s])", words))
    kind = config_class(values) if values else None
    defaults = {} if kind is None else _defaults(kind)

    def origin(name: str, value: Any) -> str:
        if name in given:
            return "command line"
        return "default" if name in defaults and defaults[name] == value else "config file"

    return {name: (value, origin(name, value)) for name, value in values.items()}


def _defaults(kind: type) -> dict[str, Any]:
    """Return the defaults of a recipe's settings by full name."""
    from swaft.training.config.values import settings

    return {name: option.default for name, option in settings(kind).items()}

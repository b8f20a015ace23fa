"""Checkpoints in, one averaged Hugging Face folder out: of all of them, or of those that a score selects.

The greedy soup follows Wortsman et al. 2022 (arXiv:2203.05482): a checkpoint stays in if it does no harm.
"""

from __future__ import annotations

import math
import shlex
import shutil
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import torch

from swaft.errors import ConfigError, StateError
from swaft.soup.adapter import AdapterMean
from swaft.soup.agreement import compare_configs, fit_to_base, require_same_model, without_tied
from swaft.soup.checkpoint import NO_CONFIGURATION, SavedWeights
from swaft.soup.huggingface import (
    ADAPTER,
    ADAPTER_CONFIG,
    CONFIG,
    MODEL,
    holds_weights,
    open_folder,
    read_json,
)
from swaft.soup.kinds import is_average, is_copy_of_masters, open_checkpoint
from swaft.soup.mean import Mean
from swaft.soup.output import (
    Shard,
    check_weights,
    copy_files,
    describe,
    fingerprint,
    plan_shards,
    refuse_modules,
    refuse_occupied,
    set_config_dtype,
    write_json,
    write_weights,
)
from swaft.storage import FileRecord
from swaft.storage.files import new_folder, place_beside
from swaft.storage.tensor_file import dtype_of_weights, name_of

FOLDER = "{folder}"
"""The placeholder for the folder in an evaluation command."""
SHARD_BYTES = 5 * 10**9
"""Default maximum size of one file of weights."""


@dataclass(frozen=True)
class Soup:
    """An averaged folder that was written and read back."""

    output: Path
    """The folder."""
    sha256: str
    """One hash of its weights, independent of its location: `output.fingerprint`."""
    shares: list[tuple[str, float]]
    """The checkpoints and the share of each; the shares sum to 1."""
    dtype: str
    """Of the averaged tensors."""
    tensors: int
    elements: int
    files: dict[str, FileRecord]
    """The files of weights."""
    rounding: float
    """How far rounding to the dtype has moved the weights, relative to their norm."""
    worst_rounding: tuple[str, float]
    """The tensor that rounding moved most, and how far."""
    truncation: float | None
    """For LoRA adapters: the error of the new factors due to their limited rank, relative to the mean update."""
    notes: list[str]
    """Differences between the configurations, and files that were not copied."""

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self) | {"output": str(self.output)}


@dataclass(frozen=True)
class GreedyChoice:
    """The selected candidates, and the scores behind the choice."""

    chosen: list[int]
    """Indices of the chosen candidates, the best first."""
    score: float
    """Score of the mean of the chosen candidates."""
    alone: list[float]
    """Score of every candidate alone."""
    trials: list[tuple[int, float, bool]]
    """(candidate, score of the mean with it, whether it stayed), in the order of the trials."""


def average(
    checkpoints: Sequence[str | PathLike[str]],
    output: str | PathLike[str],
    *,
    weights: Sequence[float] | None = None,
    dtype: str | torch.dtype = "float32",
    max_shard_bytes: int = SHARD_BYTES,
    base: str | PathLike[str] | None = None,
    lora_rank: int | None = None,
    rule: str | None = None,
    trust_pickle: bool = False,
) -> Soup:
    """Write the weighted mean of checkpoints of one model.

    Args:
        checkpoints: folders of any kind that :func:`open_checkpoint` knows.
        output: folder to write. It must not exist or must be empty.
        weights: one per checkpoint, 0 or more, in any scale; None: equal weights.
        dtype: ``float32``, ``bfloat16`` or ``float16``, as a string or a torch dtype; the float64 mean is rounded
            to it once.
        max_shard_bytes: maximum bytes of a file of weights, unless a single tensor is larger. An adapter is always
            one file.
        base: Hugging Face folder of the same model, which provides what the checkpoints lack: configuration,
            tokenizer, frozen weights. For a saved state of LoRA adapters: the adapter folder.
        lora_rank: rank of the result, if the checkpoints are LoRA adapters; None: their own.
        rule: which average to take from saved states of averages.
        trust_pickle: whether engine files of DeepSpeed and torch, which are Python pickle, may be opened.

    Raises:
        ConfigError: an argument makes no sense.
        StateError: a checkpoint is damaged, or of another model than the first, or the folder could not be written.
            No folder is left then.
    """
    paths, output = _paths(checkpoints), Path(output)
    refuse_occupied(output)
    opened = _opened(
        paths,
        weights=weights,
        dtype=dtype,
        max_shard_bytes=max_shard_bytes,
        base=base,
        lora_rank=lora_rank,
        rule=rule,
        trust_pickle=trust_pickle,
    )
    with opened as found, new_folder(output) as folder:
        mean, notes = found.mean, found.notes + copy_files(found.files, folder)
        if isinstance(mean, AdapterMean):
            write_json(folder / ADAPTER_CONFIG, mean.config)
        else:
            set_config_dtype(folder, found.dtype)
        records = write_weights(folder, found.stem, found.shards, mean.slices)
        check_weights(folder, found.shards, records)
        soup = Soup(
            output=output,
            sha256=fingerprint(records),
            shares=[(str(path), share) for path, (_, share) in zip(paths, found.shares, strict=True)],
            dtype=name_of(found.dtype),
            tensors=len(mean.specs),
            elements=sum(spec.numel for spec in mean.specs.values()),
            files=records,
            rounding=mean.rounding.overall,
            worst_rounding=mean.rounding.worst,
            truncation=mean.truncation if isinstance(mean, AdapterMean) else None,
            notes=notes,
        )
        write_json(folder / "average.json", {k: v for k, v in soup.as_dict().items() if k != "output"})
        labelled = [(member.label, share) for member, share in found.shares]
        describe(folder, output.name, labelled, soup.dtype, soup.sha256)
    return soup


def _paths(checkpoints: Sequence[str | PathLike[str]]) -> list[Path]:
    if isinstance(checkpoints, str | PathLike):
        raise ConfigError(f"checkpoints is {str(checkpoints)!r}; expected a list of folders")
    return [Path(path) for path in checkpoints]


def average_greedily(
    checkpoints: Sequence[str | PathLike[str]],
    output: str | PathLike[str],
    *,
    score: Callable[[Path], float],
    higher_is_better: bool,
    **how: Any,
) -> tuple[Soup, GreedyChoice]:
    """Write the uniform mean of the checkpoints that :func:`choose_greedily` selects.

    Args:
        checkpoints: folders, as for :func:`average`.
        output: folder to write. During the selection, trial means are kept in a hidden folder next to it, one at a
            time.
        score: returns the score of a Hugging Face folder.
        higher_is_better: whether higher scores are better, or lower ones.
        how: as for :func:`average`, without weights.

    Raises:
        ConfigError: as for :func:`average`.
        StateError: as for :func:`average`.
    """
    paths, output = _paths(checkpoints), Path(output)
    refuse_occupied(output)
    if how.get("weights") is not None:
        raise ConfigError("average_greedily chooses among uniform means; expected no weights")
    with _opened(paths, **how):
        pass  # what cannot be averaged is refused before the first score
    with place_beside(output) as place:
        trial = place / "trial"

        def scored(chosen: Sequence[int]) -> float:
            first = paths[chosen[0]]
            is_whole = how.get("base") is None and holds_weights(first) and not is_copy_of_masters(first)
            if len(chosen) == 1 and is_whole:
                return score(first)
            shutil.rmtree(trial, ignore_errors=True)
            average([paths[each] for each in chosen], trial, **how)
            return score(trial)

        choice = choose_greedily(len(paths), scored, higher_is_better=higher_is_better)
    return average([paths[each] for each in choice.chosen], output, **how), choice


def choose_greedily(
    count: int, score: Callable[[Sequence[int]], float], *, higher_is_better: bool
) -> GreedyChoice:
    """Start with the best candidate, and try the others from the best down; one stays if the score gets no worse.

    Args:
        count: number of candidates, which are numbered from 0.
        score: returns the score of the uniform mean of some candidates, or of a single one. Called 2 count - 1
            times.
        higher_is_better: whether higher scores are better, or lower ones.

    Raises:
        ConfigError: a score is not one number.
        StateError: a score is NaN, as for weights that have diverged.
    """
    sign = 1.0 if higher_is_better else -1.0

    def asked(chosen: Sequence[int]) -> float:
        scored = score(chosen)
        try:
            found = float(scored)
        except (TypeError, ValueError) as error:
            raise ConfigError(
                f"score returned {type(scored).__name__}, expected one number: metrics['accuracy'], say"
            ) from error
        if math.isnan(found):
            raise StateError(
                f"the score of candidates {[*chosen]} is not a number; leave out what has diverged"
            )
        return found

    alone = [asked([each]) for each in range(count)]
    order = sorted(range(count), key=lambda each: -sign * alone[each])
    chosen, best, trials = order[:1], alone[order[0]], []
    for each in order[1:]:
        found = asked([*chosen, each])
        stays = sign * found >= sign * best
        trials.append((each, found, stays))
        if stays:
            chosen, best = [*chosen, each], found
    return GreedyChoice(chosen, best, alone, trials)


def score_by_command(command: str, folder: Path) -> float:
    """Run a command for a folder, and read the number in the last line it prints.

    Args:
        command: words quoted as in a shell, but not run by a shell; `{folder}` stands for the folder.
        folder: to score.

    Raises:
        ConfigError: the command does not contain {folder}.
        StateError: it fails, or prints no number.
    """
    words = [word.replace(FOLDER, str(folder)) for word in command_words(command)]
    try:
        done = subprocess.run(words, stdout=subprocess.PIPE, text=True, errors="replace")
    except OSError as error:
        raise StateError(f"--evaluate: {words[0]} could not be started: {error.strerror}") from error
    if done.returncode:
        raise StateError(f"--evaluate: {shlex.join(words)} ended with exit code {done.returncode}")
    lines = done.stdout.strip().splitlines()
    try:
        value = float(lines[-1])
    except (IndexError, ValueError):
        value = math.nan
    if not math.isfinite(value):
        last = repr(lines[-1][:200]) if lines else "nothing"
        raise StateError(
            f"--evaluate: the last line that {shlex.join(words)} printed is {last}; expected a number"
        )
    return value


def command_words(command: str) -> list[str]:
    """Split a command into words, as a shell does.

    Raises:
        ConfigError: it does not contain {folder}, so it does not say what to score; or its quotes do not close.
    """
    try:
        words = shlex.split(command)
    except ValueError as error:
        raise ConfigError(f"--evaluate: {command!r}: {error}") from error
    if not any(FOLDER in word for word in words[1:]):
        raise ConfigError(
            f"--evaluate is {command!r}; expected a command with {FOLDER} in it, such as "
            "'python score.py {folder}'"
        )
    return words


@dataclass(frozen=True, kw_only=True)
class _Opened:
    """Checkpoints that can be averaged, open, and what their average will be."""

    mean: Mean
    dtype: torch.dtype
    shares: list[tuple[SavedWeights, float]]
    files: Path
    stem: str
    shards: list[Shard]
    notes: list[str]


@contextmanager
def _opened(
    paths: Sequence[Path],
    *,
    weights: Sequence[float] | None = None,
    dtype: str | torch.dtype = "float32",
    max_shard_bytes: int = SHARD_BYTES,
    base: str | PathLike[str] | None = None,
    lora_rank: int | None = None,
    rule: str | None = None,
    trust_pickle: bool = False,
) -> Iterator[_Opened]:
    """Open checkpoints and check all that can be checked without reading every weight; see :func:`average`."""
    weights, dtype = _checked_weights(weights, len(paths)), dtype_of_weights(dtype)
    if lora_rank is not None and lora_rank < 1:
        raise ConfigError(f"lora_rank is {lora_rank}, expected 1 or more")
    with ExitStack() as stack:
        members = list[SavedWeights]()
        for path in paths:
            has_base = base is not None or (bool(members) and members[0].files is not None)
            found = open_checkpoint(path, trust_pickle=trust_pickle, rule=rule, has_base=has_base)
            members.append(stack.enter_context(found))
        if rule is not None and not any(map(is_average, paths)):
            raise ConfigError(
                f"rule is {rule!r}, and no checkpoint is a saved state of averages; leave it out"
            )
        if base is None and is_copy_of_masters(paths[0]):
            # Masters have the names of training, and the copy next to them has those of the folder.
            base = paths[0]
        whole = None if base is None else stack.enter_context(open_folder(Path(base)))
        members, whole = without_tied(members, whole)
        notes = require_same_model(members)
        files = _files(members[0], whole)
        refuse_modules(files)
        if whole is not None:
            notes += compare_configs(whole.files, members[0].files)
            members = fit_to_base(members, whole)
        weighted = list(zip(weights, members, strict=True))
        # A single adapter is copied, of any method of peft.
        if members[0].is_adapter and (len(members) > 1 or lora_rank is not None):
            mean = AdapterMean(weighted, dtype, whole, rank=lora_rank)
        elif lora_rank is not None:
            raise ConfigError(f"lora_rank is set, and {paths[0]} is no LoRA adapter")
        else:
            mean = Mean(weighted, dtype, whole)
        is_adapter = any(each and each.is_adapter for each in (members[0], whole))
        yield _Opened(
            mean=mean,
            dtype=dtype,
            shares=[(member, weight / math.fsum(weights)) for weight, member in weighted],
            files=files,
            stem=ADAPTER if is_adapter else MODEL,
            # peft opens a single file only
            shards=plan_shards(mean.specs, math.inf if is_adapter else max_shard_bytes),
            notes=notes,
        )


def _checked_weights(weights: Sequence[float] | None, count: int) -> list[float]:
    """The weights, scaled by a power of two so that the largest is in [1, 2): no product or sum can overflow."""
    if count == 0:
        raise ConfigError("no checkpoint was named; expected one or more")
    if weights is None:
        return [1.0] * count
    if len(weights) != count:
        raise ConfigError(f"{len(weights)} weights for {count} checkpoints; expected one each")
    if not all(math.isfinite(weight) and weight >= 0 for weight in weights) or not max(weights) > 0:
        raise ConfigError(
            f"the weights are {', '.join(map(str, weights))}; expected numbers from 0, not all 0"
        )
    _, exponent = math.frexp(max(weights))
    return [math.ldexp(weight, 1 - exponent) for weight in weights]  # exact


def _files(first: SavedWeights, base: SavedWeights | None) -> Path:
    """The folder that configuration and tokenizer come from."""
    there = [each.files for each in (first, base) if each is not None and each.files is not None]
    configured = [path for path in there if (path / CONFIG).exists() or (path / ADAPTER_CONFIG).exists()]
    for path in configured or there:
        if (path / CONFIG).exists():
            read_json(path / CONFIG)  # an unreadable one is refused before the weights are written
        return path
    raise StateError(f"{first.path} {NO_CONFIGURATION}")

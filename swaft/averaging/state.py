"""The averages of a run on disk, independent of the engine: saved under one engine, opened under any.

    folder/rank-00000.safetensors     one file per rank: its elements of every lane, flat
        rule-0.lane-0.mean              (elements of the rank,) fp32
        rule-0.lane-0.compensation      (elements of the rank,) bf16, for a compensated mean
        metadata["fragments"]           which elements those are: [[parameter, start, end], ...]
    folder/manifest.json              rules, counts, shapes of parameters, and the hash of every file
    folder/COMPLETE                   written last

An element is identified by the name of its parameter and its position in the flattened parameter (`layout.py`), so
a rank that opens the state reads its elements from whichever files hold them. Values are copied, never converted.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
from torch import Tensor

from swaft import options
from swaft.averaging.engines import Engine
from swaft.averaging.layout import Fragment, Range, laid_out, section
from swaft.errors import StateError, first_few
from swaft.storage import FileRecord, Spec, TensorFile, write_tensors
from swaft.storage.files import standing
from swaft.storage.sealed import MANIFEST, read_manifest
from swaft.storage.strict_json import shown
from swaft.storage.together import open_together, write_together

if TYPE_CHECKING:
    from swaft.averaging.host import HostAverages
    from swaft.averaging.host.lanes import Lane
    from swaft.averaging.rules import Rule

KIND = "average"
"""The kind in the manifest of such a folder."""
UNNAMED = "average"
"""The name of a rule that a run was given without one."""
FILES = re.compile(r"(rank-\d{5}\.safetensors|manifest\.json|COMPLETE)(\.tmp)?")
"""The names of a state's files."""
MOST_OPEN = 32
"""Files of a state that are open at a time."""
Steps = Annotated[int, options.Range(low=0, high=1 << 30)]
"""Optimizer steps, up to the limit that a state may claim."""


@dataclass(frozen=True)
class RuleState:
    """How far one rule has got."""

    name: str
    """The rule's name in the run."""
    rule: str
    """Its ``repr``, which describes it completely."""
    count: Steps
    """Members in it."""
    lanes: dict[str, bool]
    """The number of each lane, as text, and whether its mean has a compensation."""
    readout: dict[str, float]
    """The default average, as the share of each lane in it, by lane number as text."""


@dataclass(frozen=True)
class AverageState:
    """Everything about a run's averages except the vectors: the ``content`` of the manifest."""

    rules: list[RuleState]
    total_steps: int
    """Optimizer steps of the whole run."""
    precision: str
    """``compensated`` or ``plain``."""
    applied_steps: Steps
    """Optimizer steps that had changed the weights."""
    moved: bool
    """Whether members were seen to differ."""
    weights: str
    """Sum of the bits of the master weights at that moment, independent of their layout (`sum_of_bits`)."""
    parameters: dict[str, list[int]]
    """Shape of every averaged parameter."""
    aliases: dict[str, str]
    """Other names of tied parameters, each with the name it is averaged under."""

    @classmethod
    def from_json(cls, content: Mapping[str, Any], *, where: Path) -> AverageState:
        """Read a manifest's content.

        Raises:
            StateError: a field is missing, unknown, of the wrong type or out of range; names it.
        """
        state = _checked(cls, content, where)
        rules = [_checked(RuleState, rule, where) for rule in state.rules]
        names = [rule.name for rule in rules]
        if not names or len(set(names)) < len(names):
            raise StateError(f"{where}: rules is {shown(names)}, expected each rule of the run once")
        for rule in rules:
            if not set(rule.readout) <= set(rule.lanes) or set(map(type, rule.readout.values())) - {float}:
                raise StateError(
                    f"{where}: readout of {rule.name!r} is {shown(rule.readout)}, expected lane to share"
                )
        for name, shape in state.parameters.items():
            if not (isinstance(shape, list) and all(type(size) is int and size >= 0 for size in shape)):
                raise StateError(
                    f"{where}: the shape of {name!r} is {shown(shape)}, expected a list of sizes"
                )
        return replace(state, rules=rules)

    def refuse_other_run(self, expected: AverageState, *, where: Path) -> None:
        """Refuse the state of a run with other rules, another precision or length, or another model.

        Raises:
            StateError: says what differs.
        """
        found, wanted = ({rule.name: rule.rule for rule in state.rules} for state in (self, expected))
        if found != wanted:
            found, wanted = (", ".join(f"{k}: {v}" for k, v in rules.items()) for rules in (found, wanted))
            raise StateError(
                f"{where} holds the rules {found}; this run averages by {wanted}. Set them as "
                "they were (recipes: section averaging), or begin a new run"
            )
        for field, mend in (
            (
                "total_steps",
                "the run's number of steps (train.max_steps, the Trainer's max_steps or epochs) as it was (rules "
                "other than Merge and Windows go on past it; if the run has, attach with first_step=0, which the "
                "Trainer's callback cannot)",
            ),
            ("precision", "averaging.precision as it was"),
        ):
            if getattr(self, field) != getattr(expected, field):
                raise StateError(
                    f"{where}: {field} is {getattr(self, field)!r} there and {getattr(expected, field)!r} in this "
                    f"run; set {mend}, or begin a new run"
                )
        here = expected.parameters
        problems = [f"{name!r} is not in it" for name in here if name not in self.parameters]
        problems += [
            f"it has {name!r}, which is not trained here" for name in self.parameters if name not in here
        ]
        problems += [
            f"{name!r} has shape {self.parameters[name]} in it and {shape} here"
            for name, shape in here.items()
            if self.parameters.get(name, shape) != shape
        ]
        if problems:
            raise StateError(f"{where} is the average of another model: {first_few(problems)}")


def _checked(kind: type[Any], found: Any, where: Path) -> Any:
    """A dataclass from a JSON object, once its fields are known to be complete, well-typed and in range."""
    names = [field.name for field in fields(kind)]
    if not isinstance(found, Mapping) or sorted(found) != sorted(names):
        raise StateError(
            f"{where}: found {shown(found)}, expected the fields {', '.join(names)} of an average"
        )
    made = kind(**found)
    for name, fault in options.check(made):
        raise StateError(f"{where}: {name} {fault}")
    return made


def lane_name(rule: int, lane: int | str) -> str:
    """The name of a lane's vectors in a file, without ``.mean`` or ``.compensation``."""
    return f"rule-{rule}.lane-{lane}"


def write_rank(
    folder: Path, rank: int, fragments: Sequence[Fragment], vectors: Mapping[str, Tensor]
) -> dict[str, FileRecord]:
    """Write one rank's file.

    Args:
        folder: of the state; must exist.
        rank: the rank whose file it is.
        fragments: the elements it owns, in shard order.
        vectors: name to (elements,), host.

    Returns:
        The file's record by its name.

    Raises:
        StateError: the file could not be written.
    """
    name = f"rank-{rank:05d}.safetensors"
    metadata = {"fragments": json.dumps([each.range for each in fragments], separators=(",", ":"))}
    specs = {key: Spec.of(vector) for key, vector in vectors.items()}
    return {name: write_tensors(folder / name, specs, lambda key: [vectors[key]], metadata=metadata)}


class RankFiles:
    """The files of a state's ranks, each parsed once, when it is first needed; a context manager that closes them.

    Args:
        folder: of the state.
        names: of its files; those most likely to hold the elements that will be read first.
    """

    def __init__(self, folder: Path, names: Sequence[str]):
        self._folder, self._names = folder, names
        self._held: dict[str, dict[str, list[Fragment]]] = {}
        self._open: dict[str, TensorFile] = {}  # those used last come last

    def read(self, wanted: Sequence[Range], vectors: Mapping[str, Tensor]) -> None:
        """Fill vectors with the elements of given ranges, from whichever files hold them.

        Args:
            wanted: ranges in the order of the vectors' elements.
            vectors: name to (elements,), host, in the dtype they were saved in; written in place.

        Raises:
            StateError: an element is in no file or in two, or a file does not match its header.
        """
        shard, filled = laid_out(wanted), list[tuple[int, int]]()
        missing = numel = sum(place.numel for place in shard)
        for name in self._names:
            if missing <= 0:
                break
            held = self._fragments(name)
            for place in shard:
                for each in held.get(place.name, ()):
                    for part in each.part(place.start - each.start, place.end - each.start):
                        first = place.offset + part.start - place.start
                        for key, vector in vectors.items():
                            self._copy(name, key, part.offset, vector[first : first + part.numel])
                        filled.append((first, part.numel))
                        missing -= part.numel
        position = 0
        for offset, length in [*sorted(filled), (numel, 0)]:
            if offset != position:
                fault = "in no file" if offset > position else "in more than one file"
                first = min(offset, position)
                place = section(shard, first, first + 1)[0]
                raise StateError(
                    f"{self._folder}: element {place.start} of {place.name!r} is {fault}, expected each in one"
                )
            position += length

    def close(self) -> None:
        """Close the files."""
        while self._open:
            self._open.popitem()[1].close()

    def __enter__(self) -> RankFiles:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _opened(self, name: str) -> TensorFile:
        self._open[name] = self._open.pop(name, None) or TensorFile(self._folder / name)
        if len(self._open) > MOST_OPEN:
            self._open.pop(next(iter(self._open))).close()
        return self._open[name]

    def _fragments(self, name: str) -> Mapping[str, Sequence[Fragment]]:
        """The elements that a file holds, by parameter."""
        if name not in self._held:
            held: dict[str, list[Fragment]] = {}
            for each in laid_out(_ranges(self._opened(name))):
                held.setdefault(each.name, []).append(each)
            self._held[name] = held
        return self._held[name]

    def _copy(self, name: str, key: str, offset: int, out: Tensor) -> None:
        file = self._opened(name)
        if (found := file.specs.get(key)) and found.dtype != out.dtype:
            raise StateError(f"{file.path}: {key!r} is {found.dtype}, expected {out.dtype}")
        file.read(key, offset, offset + out.numel(), out=out)


def sum_of_bits(runs: Iterable[Tensor]) -> int:
    """The sum, modulo 2**64, of the words of fp32 tensors: the same however they are ordered or cut."""
    words = (run.detach().reshape(-1).cpu().numpy().view(np.uint32) for run in runs)
    return sum(int(each.sum(dtype=np.uint64)) for each in words) % (1 << 64)


def _ranges(file: TensorFile) -> Iterator[Range]:
    """The elements that a file holds, in the order of its vectors."""
    try:
        ranges = json.loads(file.metadata["fragments"])
    except (KeyError, ValueError, RecursionError) as error:
        raise StateError(f"{file.path}: metadata.fragments is not JSON: {error!r}") from error
    for each in ranges if isinstance(ranges, list) else [ranges]:
        types = list(map(type, each)) if isinstance(each, list) else []
        if types != [str, int, int] or not 0 <= each[1] <= each[2]:
            raise StateError(
                f"{file.path}: metadata.fragments holds {each!r:.80}, expected [parameter, start, end]"
            )
        name, start, end = each
        yield name, start, end


def save_averages(
    engine: Engine, averages: HostAverages, path: str | PathLike[str], applied_steps: int, *, overwrite: bool
) -> None:
    """Write every rank's lanes into a folder, which is complete once all ranks have written (collective).

    Arguments and errors as for `WeightAverager.save_state`; ``applied_steps`` is the optimizer steps taken so far.
    """
    ranks, fragments = engine.ranks, engine.fragments
    with ranks.together():  # a member may be incomplete on one rank
        held = {name: lanes.held() for name, lanes in averages.lanes.items()}  # they do not move now
    state = _description(engine, averages, applied_steps, held)
    vectors = {
        name: vector
        for i, lanes in enumerate(held.values())
        for index, lane in lanes.items()
        for name, vector in _vectors(lane_name(i, index), lane).items()
    }
    write_together(
        ranks,
        path,
        kind=KIND,
        write=lambda folder: write_rank(folder, ranks.rank, fragments, vectors),
        content=asdict(state),
        overwrites=FILES if overwrite else None,
    )


def load_averages(
    engine: Engine, averages: HostAverages, path: str | PathLike[str], *, same_weights: bool
) -> int:
    """Fill the lanes with this rank's elements of a saved state, whatever layout it was saved in (collective).

    Arguments and errors as for `WeightAverager.load_state`. An error found before the first vector is read leaves
    the lanes unchanged. Returns the number of optimizer steps taken when the state was saved.
    """
    folder = standing(Path(os.path.realpath(path)))  # saving follows links, too
    manifest = open_together(engine.ranks, folder, kind=KIND)
    files = sorted(manifest.files)
    if not files:
        raise StateError(f"{folder}/manifest.json: files is empty, expected one of every rank that saved")
    # If the layout has not changed, a rank's own file holds all it needs.
    own = engine.ranks.rank % len(files)
    files = files[own:] + files[:own]
    found = AverageState.from_json(manifest.content, where=folder / MANIFEST)
    expected = _description(engine, averages, 0, {})
    found.refuse_other_run(expected, where=folder)
    if same_weights and found.weights != expected.weights:
        raise StateError(
            f"{folder} was saved with other weights, after {found.applied_steps} optimizer steps, than the model "
            "has now; load the checkpoint it belongs to first (model and optimizer), or pass load_state(..., "
            "same_weights=False) to use different weights on purpose"
        )
    lanes = averages.lanes
    for rule in found.rules:
        plan = lanes[rule.name].plan
        members = range(min(rule.count, plan.num_members))  # no lane is created after the planned members
        moved = sorted({str(update.lane) for n in members for update in plan.updates(n)})
        if sorted(rule.lanes) != moved:
            raise StateError(
                f"{folder}/manifest.json: after {rule.count} members {rule.name!r} has the lanes "
                f"{sorted(rule.lanes)}, expected {moved}"
            )
    wanted = [fragment.range for fragment in engine.fragments]

    def filled(number: int, rule: RuleState) -> Iterator[tuple[int, Lane]]:
        for index in rule.lanes:
            lane = lanes[rule.name].empty_lane(int(index))
            saved.read(wanted, _vectors(lane_name(number, index), lane))
            yield int(index), lane

    with engine.ranks.together(), RankFiles(folder, files) as saved:
        for number, rule in enumerate(found.rules):
            lanes[rule.name].restore(rule.count, filled(number, rule))
    averages.changes.restart(moved=found.moved)
    return found.applied_steps


def _description(
    engine: Engine, averages: HostAverages, applied_steps: int, held: Mapping[str, Mapping[int, Lane]]
) -> AverageState:
    """The description of the averages, with the lanes they hold (collective)."""
    names, rules = engine.canonical_names(), []
    for name, lanes in averages.lanes.items():
        there = held.get(name, {})
        shares = lanes.plan.readout(lanes.count) if there else {}
        rules.append(
            RuleState(
                name=name,
                rule=repr(lanes.plan.rule),
                count=lanes.count,
                readout={str(index): float(share) for index, share in sorted(shares.items())},
                lanes={str(index): lane.compensation is not None for index, lane in there.items()},
            )
        )
    return AverageState(
        rules=rules,
        total_steps=int(next(iter(averages.lanes.values())).plan.total_steps),
        precision="compensated" if averages.compensated else "plain",
        applied_steps=applied_steps,
        moved=engine.ranks.sum([averages.changes.seen])[0] > 0,
        weights=weights_now(engine),
        parameters={name: list(engine.full_shape(p)) for name, p in engine.trainable.items()},
        aliases={name: first for name, first in names.items() if first != name and first in engine.trainable},
    )


def refuse_other_rule(folder: Path, rule: Rule, *, precision: str) -> None:
    """Refuse a state that a run with one rule could not continue, judged by its manifest alone.

    A state of rules that a script has named itself is left to `load_averages`, which knows them.

    Raises:
        StateError: the manifest is damaged, or the rule or precision is another; says what differs.
    """
    found = AverageState.from_json(read_manifest(folder, kind=KIND).content, where=folder / MANIFEST)
    if [each.name for each in found.rules] == [UNNAMED]:
        rules = [replace(found.rules[0], rule=repr(rule))]
        found.refuse_other_run(replace(found, rules=rules, precision=precision), where=folder)


@contextmanager
def same_weights(engine: Engine) -> Iterator[str]:
    """:func:`weights_now`, summed once for everything inside, which must not change the weights (collective)."""
    engine.known_sum = weights_now(engine)
    try:
        yield engine.known_sum
    finally:
        engine.known_sum = None


def weights_now(engine: Engine) -> str:
    """The sum of the bits of the last weights, also while averaged ones are swapped in (collective)."""
    if engine.known_sum is not None:
        return engine.known_sum
    return str(sum(engine.ranks.gather(sum_of_bits(engine.live()))) % (1 << 64))


def _vectors(name: str, lane: Lane) -> dict[str, Tensor]:
    """A lane's vectors, by their names in a file."""
    vectors = {f"{name}.mean": lane.mean}
    if lane.compensation is not None:
        vectors[f"{name}.compensation"] = lane.compensation
    return vectors

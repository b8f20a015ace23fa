"""The averages of a run on disk, in no engine's layout: saved under one, opened under any.

    folder/rank-00000.safetensors     one file a rank: its elements of every lane, flat
        rule-0.lane-0.mean              (elements of the rank,) fp32
        rule-0.lane-0.compensation      (elements of the rank,) bf16, beside a compensated mean
        metadata["fragments"]           which elements those are: [[parameter, start, end], ...]
    folder/manifest.json              rules, counts, shapes of parameters, and the hash of every file
    folder/COMPLETE                   last of all

An element is known by the name of its parameter and its place in the flattened parameter (`layout.py`), so whoever
opens the state takes what it owns from whichever files hold it. Values are copied, never converted.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_origin, get_type_hints

from torch import Tensor

from swaft.averaging.engines import Engine
from swaft.averaging.layout import Fragment, Range, range_at
from swaft.averaging.rules import Rule
from swaft.errors import StateError
from swaft.storage import FileRecord, TensorFile, TensorFileWriter
from swaft.storage.files import standing
from swaft.storage.sealed import MANIFEST
from swaft.storage.together import open_together, write_together

if TYPE_CHECKING:
    from swaft.averaging.host import HostAverages
    from swaft.averaging.host.lanes import Lane, Lanes

KIND = "average"
"""What the manifest of such a folder calls itself."""
FILES = re.compile(r"(rank-\d{5}\.safetensors|manifest\.json|COMPLETE)(\.tmp)?")
"""What the files of a state are called."""
MOST_STEPS = 1 << 30
"""Optimizer steps that a state may claim."""


@dataclass(frozen=True)
class RuleState:
    """How far one rule has come."""

    name: str
    """What the run calls it."""
    rule: str
    """Its ``repr``, which says all that it is."""
    count: int
    """Members in it."""
    lanes: dict[str, bool]
    """Number of each lane there is, as text, and whether a compensation lies beside its mean."""
    readout: dict[str, float]
    """The average, where nothing is selected, as the share of each lane in it, by its number as text."""


@dataclass(frozen=True)
class AverageState:
    """All of a run's averages but the vectors themselves: the ``content`` of the manifest."""

    rules: list[RuleState]
    total_steps: int
    """Optimizer steps of the whole run."""
    precision: str
    """``compensated`` or ``plain``."""
    applied_steps: int
    """Optimizer steps that had changed the weights."""
    moved: bool
    """Whether members were seen to differ."""
    weights: str
    """Sum of the bits of the master weights at that moment, whatever their layout (`sum_of_bits`)."""
    parameters: dict[str, list[int]]
    """Shape of every averaged parameter."""
    aliases: dict[str, str]
    """Other names of tied parameters, and the one they are averaged under."""

    def to_json(self) -> dict[str, Any]:
        """Plain lists and dictionaries."""
        return asdict(self)

    @classmethod
    def from_json(cls, content: Mapping[str, Any], *, where: Path) -> AverageState:
        """Read a manifest's content.

        Raises:
            StateError: a field is missing, unknown or of the wrong type, naming it.
        """
        fields = _fields(cls, content, where=where)
        if not fields["rules"]:
            raise StateError(f"{where}: rules is {fields['rules']!r}, expected a list of the run's rules")
        rules = [RuleState(**_fields(RuleState, rule, where=where)) for rule in fields["rules"]]
        fields["rules"] = rules
        state = cls(**fields)
        if len({rule.name for rule in rules}) != len(rules):
            raise StateError(f"{where}: rules holds one name twice, expected each once")
        for rule in rules:
            shares = rule.readout.values()
            if not set(rule.readout) <= set(rule.lanes) or not all(type(share) is float for share in shares):
                raise StateError(
                    f"{where}: readout of {rule.name!r} is {rule.readout!r:.80}, expected lane to share"
                )
        for name, number in [
            ("applied_steps", state.applied_steps),
            *(("count", rule.count) for rule in rules),
        ]:
            if not 0 <= number <= MOST_STEPS:
                raise StateError(f"{where}: {name} is {number}, expected 0 to {MOST_STEPS:,}")
        for name, shape in state.parameters.items():
            if not (isinstance(shape, list) and all(type(size) is int and size >= 0 for size in shape)):
                raise StateError(f"{where}: the shape of {name!r} is {shape!r}, expected a list of sizes")
        return state

    def refuse_other_run(self, expected: AverageState, *, where: Path) -> None:
        """Refuse the state of a run with other rules, another precision or length, or of another model.

        Raises:
            StateError: naming what differs.
        """
        found, wanted = ({rule.name: rule.rule for rule in state.rules} for state in (self, expected))
        if found != wanted:
            found, wanted = (", ".join(f"{k}: {v}" for k, v in rules.items()) for rules in (found, wanted))
            raise StateError(
                f"{where} holds the rules {found}; this run averages by {wanted}. Set section averaging as it was, "
                "or begin a new run"
            )
        for field, setting in (("total_steps", "train.max_steps"), ("precision", "averaging.precision")):
            if getattr(self, field) != getattr(expected, field):
                raise StateError(
                    f"{where}: {field} is {getattr(self, field)!r} there and {getattr(expected, field)!r} in this "
                    f"run; set {setting} as it was, or begin a new run"
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
            more = f", and {len(problems) - 3} more like these" if len(problems) > 3 else ""
            raise StateError(f"{where} is the average of another model: {'; '.join(problems[:3])}{more}")


def lane_name(rule: int, lane: int | str) -> str:
    """What the vectors of a lane are called in a file, ``.mean`` and ``.compensation`` apart."""
    return f"rule-{rule}.lane-{lane}"


def write_rank(
    folder: Path, rank: int, fragments: Sequence[Fragment], vectors: Mapping[str, Tensor]
) -> dict[str, FileRecord]:
    """Write one rank's file.

    Args:
        folder: of the state; it exists.
        rank: whose file.
        fragments: the elements it owns, in shard order.
        vectors: name to (elements,), host.

    Returns:
        The file's record by its name.

    Raises:
        StateError: it could not be written.
    """
    name = f"rank-{rank:05d}.safetensors"
    # safetensors wants every tensor at a multiple of its elements' size.
    ordered = dict(sorted(vectors.items(), key=lambda item: -item[1].element_size()))
    ranges = [fragment.range for fragment in fragments]
    writer = TensorFileWriter(
        folder / name,
        {key: (vector.dtype, vector.shape) for key, vector in ordered.items()},
        metadata={"fragments": json.dumps(ranges, separators=(",", ":"))},
    )
    with writer:
        for vector in ordered.values():
            writer.write(vector)
    return {name: writer.record}


def read_elements(
    folder: Path, names: Iterable[str], wanted: Sequence[Range], vectors: Mapping[str, Tensor]
) -> None:
    """Fill vectors with the elements of some ranges, from whichever files hold them.

    Args:
        folder: of the state.
        names: of its files; those that are likeliest to hold the elements first.
        wanted: ranges in the order of the vectors' elements.
        vectors: name to (elements,), host, of the type they were saved in; written to.

    Raises:
        StateError: an element is in no file, or in two, or a file is not what its header says.
    """
    places: dict[str, list[tuple[int, int, int]]] = {}
    numel = 0
    for name, start, end in wanted:
        places.setdefault(name, []).append((start, end, numel))
        numel += end - start
    filled: list[tuple[int, int]] = []
    for file_name in names:
        if sum(length for _, length in filled) >= numel:
            break
        with TensorFile(folder / file_name) as file:
            _require_vectors(file, vectors, folder / file_name)
            for held_at, offset, length in _overlaps(_ranges(file, folder / file_name), places):
                for key, vector in vectors.items():
                    file.read(key, held_at, held_at + length, out=vector[offset : offset + length])
                filled.append((offset, length))
    position = 0
    for offset, length in [*sorted(filled), (numel, 0)]:
        if offset != position:
            fault = "in no file" if offset > position else "in more than one file"
            name, element = range_at(wanted, min(offset, position))
            raise StateError(f"{folder}: element {element} of {name!r} is {fault}, expected each in one")
        position += length


def sum_of_bits(runs: Iterable[Tensor]) -> int:
    """The sum, modulo 2**64, of the words of fp32 tensors: the same in whichever order and cuts they come."""
    from swaft.averaging.native import sum_of_words

    pieces = (piece for run in runs for piece in run.detach().reshape(-1).split(1 << 24))
    return sum(int(sum_of_words(piece.cpu().numpy())) for piece in pieces) % (1 << 64)


def _fields(cls: type, found: Any, *, where: Path) -> dict[str, Any]:
    """The fields of a data class that JSON holds, each of its type at the outermost."""
    types = {name: get_origin(hint) or hint for name, hint in get_type_hints(cls).items()}
    if not isinstance(found, Mapping) or sorted(found) != sorted(types):
        names = sorted(found) if isinstance(found, Mapping) else repr(found)
        raise StateError(f"{where}: expected the fields {', '.join(types)} of an average; found {names}")
    for name, expected in types.items():
        if type(found[name]) is not expected:
            raise StateError(f"{where}: {name} is {found[name]!r}, expected {expected.__name__}")
    return dict(found)


def _require_vectors(file: TensorFile, vectors: Mapping[str, Tensor], where: Path) -> None:
    for key, vector in vectors.items():
        if key not in file.names or file.dtype(key) != vector.dtype:
            found = file.dtype(key) if key in file.names else "missing"
            raise StateError(f"{where}: {key!r} is {found}, expected {vector.dtype}")


def _ranges(file: TensorFile, where: Path) -> Iterator[tuple[str, int, int, int]]:
    """What a file holds: (name, start, end, first element in the file's vectors)."""
    try:
        ranges = json.loads(file.metadata["fragments"])
    except (KeyError, ValueError, RecursionError) as error:
        raise StateError(f"{where}: metadata.fragments is no JSON: {error!r}") from error
    position = 0
    for each in ranges if isinstance(ranges, list) else [ranges]:
        if not (
            isinstance(each, list) and list(map(type, each)) == [str, int, int] and 0 <= each[1] <= each[2]
        ):
            raise StateError(
                f"{where}: metadata.fragments holds {each!r:.80}, expected [parameter, start, end]"
            )
        name, start, end = each
        yield name, start, end, position
        position += end - start


def _overlaps(
    held: Iterable[tuple[str, int, int, int]], places: Mapping[str, Sequence[tuple[int, int, int]]]
) -> Iterator[tuple[int, int, int]]:
    """(first element in the file, first element in the vectors, number) of what is both held and wanted."""
    for name, start, end, held_at in held:
        for wanted_start, wanted_end, wanted_at in places.get(name, ()):
            first, last = max(start, wanted_start), min(end, wanted_end)
            if first < last:
                yield held_at + first - start, wanted_at + first - wanted_start, last - first


class Keeper:
    """Brings the averages of a run to disk and back, all ranks' together.

    Args:
        engine: whose model.
        averages: of this rank.
        rules: by name.
        total_steps: optimizer steps of the whole run.
        precision: ``compensated`` or ``plain``.
    """

    def __init__(
        self,
        engine: Engine,
        averages: HostAverages,
        rules: Mapping[str, Rule],
        total_steps: int,
        precision: str,
    ):
        self._engine, self._averages = engine, averages
        self._rules, self._total_steps, self._precision = rules, int(total_steps), precision

    def save(self, path: str | PathLike[str], applied_steps: int, *, overwrite: bool) -> None:
        """Write every rank's lanes into a folder, which is complete once all have (collective).

        Args:
            path: folder to write. Without `overwrite` it must not exist, or be empty.
            applied_steps: optimizer steps so far.
            overwrite: whether a state may be there already; it is replaced by the new one once that is complete.

        Raises:
            StateError: it could not be written; on every rank, and the folder is as it was.
        """
        ranks, fragments = self._engine.ranks, self._engine.fragments
        state, vectors = self._state(applied_steps, held=True), self._vectors()
        write_together(
            ranks,
            path,
            kind=KIND,
            write=lambda folder: write_rank(folder, ranks.rank, fragments, vectors),
            content=state.to_json(),
            overwrites=FILES if overwrite else None,
        )

    def load(self, path: str | PathLike[str], *, same_weights: bool) -> AverageState:
        """Fill the lanes with this rank's elements of a saved state, whatever layout it was saved in (collective).

        The lanes are as before after an error that was found before the first vector was read.

        Args:
            path: folder that :meth:`save` wrote.
            same_weights: whether the model must have the weights beside which the state was saved.

        Raises:
            StateError: the folder is incomplete or damaged, or the state of another run; on every rank.
        """
        folder = standing(Path(path))
        manifest = open_together(self._engine.ranks, folder, kind=KIND)
        files = sorted(manifest.files)
        if not files:
            raise StateError(f"{folder}/manifest.json: files is empty, expected one of every rank that saved")
        # Where nothing has changed, a rank's own file holds all it needs.
        own = self._engine.ranks.rank % len(files)
        files = files[own:] + files[:own]
        found, expected = (
            AverageState.from_json(manifest.content, where=folder / MANIFEST),
            self._state(0, held=False),
        )
        found.refuse_other_run(expected, where=folder)
        if same_weights and found.weights != expected.weights:
            raise StateError(
                f"{folder} was saved beside other weights, after {found.applied_steps} optimizer steps, than the "
                "model has; load the checkpoint it belongs to first (model and optimizer), or say load_state(..., "
                "same_weights=False) where the model is meant to be another"
            )
        lanes = self._averages.lanes
        for rule in found.rules:
            plan = lanes[rule.name].plan
            moved = sorted({str(update.lane) for n in range(rule.count) for update in plan.updates(n)})
            if sorted(rule.lanes) != moved:
                raise StateError(
                    f"{folder}/manifest.json: after {rule.count} members {rule.name!r} has the lanes "
                    f"{sorted(rule.lanes)}, expected {moved}"
                )
        wanted = [fragment.range for fragment in self._engine.fragments]

        def filled(number: int, rule: RuleState) -> Iterator[tuple[int, Lane]]:
            for index in rule.lanes:
                lane = lanes[rule.name].empty_lane(int(index))
                read_elements(folder, files, wanted, _vectors(lane_name(number, index), lane))
                yield int(index), lane

        with self._engine.ranks.together():
            for number, rule in enumerate(found.rules):
                lanes[rule.name].restore(rule.count, filled(number, rule))
        self._averages.changes.restart(moved=found.moved)
        return found

    def _vectors(self) -> dict[str, Tensor]:
        """This rank's vectors of every lane, by name; nothing moves them meanwhile."""
        return {
            name: vector
            for i, each in enumerate(self._averages.lanes.values())
            for index, lane in each.held().items()
            for name, vector in _vectors(lane_name(i, index), lane).items()
        }

    def _state(self, applied_steps: int, *, held: bool) -> AverageState:
        """The description of the averages (collective); of the lanes only where they are not to be replaced."""
        engine = self._engine
        canonical = {id(parameter): name for name, parameter in engine.trainable.items()}
        names = {name: canonical.get(id(p), name) for name, p in engine.named_parameters(aliases=True)}
        return AverageState(
            rules=[
                _rule_state(name, repr(self._rules[name]), each, held=held)
                for name, each in self._averages.lanes.items()
            ],
            total_steps=self._total_steps,
            precision=self._precision,
            applied_steps=applied_steps,
            moved=engine.ranks.sum([self._averages.changes.seen])[0] > 0,
            weights=weights_now(engine),
            parameters={name: list(engine.full_shape(p)) for name, p in engine.trainable.items()},
            aliases={name: averaged for name, averaged in names.items() if averaged != name},
        )


def weights_now(engine: Engine) -> str:
    """The sum of the bits of the last weights, also while others are swapped in (collective)."""
    return str(sum(engine.ranks.gather(sum_of_bits(engine.live()))) % (1 << 64))


def _rule_state(name: str, rule: str, lanes: Lanes, *, held: bool) -> RuleState:
    there = lanes.held() if held else {}
    shares = lanes.plan.readout(lanes.count) if held and lanes.count else {}
    return RuleState(
        name=name,
        rule=rule,
        count=lanes.count,
        readout={str(index): float(share) for index, share in sorted(shares.items())},
        lanes={str(index): lane.compensation is not None for index, lane in there.items()},
    )


def _vectors(name: str, lane: Lane) -> dict[str, Tensor]:
    vectors = {f"{name}.mean": lane.mean}
    if lane.compensation is not None:
        vectors[f"{name}.compensation"] = lane.compensation
    return vectors

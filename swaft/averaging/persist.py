"""The averages of all ranks written together and read together: all of them, or none."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from swaft.averaging.engines import Engine
from swaft.averaging.rules import Rule
from swaft.averaging.state import (
    KIND,
    AverageState,
    RuleState,
    lane_name,
    read_elements,
    require_run,
    require_shapes,
    require_weights,
    sum_of_bits,
    write_rank,
)
from swaft.errors import StateError
from swaft.storage.together import open_together, write_together

if TYPE_CHECKING:
    from swaft.averaging.host.lanes import Lane, Lanes


def describe(
    engine: Engine,
    lanes: Mapping[str, Lanes],
    *,
    rules: Mapping[str, Rule],
    total_steps: int,
    precision: str,
    applied_steps: int,
    moved: bool,
    held: bool,
) -> AverageState:
    """What a manifest tells of a run's averages (collective).

    Args:
        engine: whose model.
        lanes: by name of the rule.
        rules: likewise.
        total_steps: optimizer steps of the whole run.
        precision: ``compensated`` or ``plain``.
        applied_steps: optimizer steps so far.
        moved: whether this rank has seen members differ.
        held: name the lanes too; not where they are about to be replaced.
    """
    canonical = {id(parameter): name for name, parameter in engine.trainable.items()}
    names = {name: canonical.get(id(p), name) for name, p in engine.named_parameters(aliases=True)}
    return AverageState(
        rules=[
            RuleState(
                name=name,
                rule=repr(rules[name]),
                count=each.count,
                readout=_default_readout(each) if held else {},
                lanes={
                    str(i): lane.compensation is not None for i, lane in (each.held() if held else {}).items()
                },
            )
            for name, each in lanes.items()
        ],
        total_steps=int(total_steps),
        precision=precision,
        applied_steps=applied_steps,
        moved=engine.ranks.sum([moved])[0] > 0,
        weights=weights_now(engine),
        parameters={name: list(engine.full_shape(p)) for name, p in engine.trainable.items()},
        aliases={name: averaged for name, averaged in names.items() if averaged != name},
    )


def save_averages(
    engine: Engine, lanes: Mapping[str, Lanes], state: AverageState, path: str | PathLike[str]
) -> None:
    """Write every rank's lanes into a new folder, which is complete once all have (collective).

    Args:
        engine: whose layout.
        lanes: by name of the rule, in the order of ``state.rules``; nothing moves them meanwhile.
        state: what the manifest says.
        path: folder to write. It must not exist, or be empty.

    Raises:
        StateError: it could not be written; on every rank, and nothing is left of it.
    """
    vectors = {
        name: vector
        for i, each in enumerate(lanes.values())
        for index, lane in each.held().items()
        for name, vector in _vectors(lane_name(i, index), lane).items()
    }
    write_together(
        engine.ranks,
        path,
        kind=KIND,
        write=lambda folder: write_rank(folder, engine.ranks.rank, engine.fragments, vectors),
        content=state.to_json(),
    )


def load_averages(
    engine: Engine,
    lanes: Mapping[str, Lanes],
    expected: AverageState,
    path: str | PathLike[str],
    *,
    same_weights: bool,
) -> AverageState:
    """Fill the lanes with this rank's elements of a saved state, whatever layout it was saved in (collective).

    Args:
        engine: whose layout.
        lanes: by name of the rule; they hold what the state holds afterwards, and are as before after an error
            that was found before the first vector was read.
        expected: of this run.
        path: folder that :func:`save_averages` wrote.
        same_weights: whether the model must have the weights beside which the state was saved.

    Raises:
        StateError: the folder is incomplete or damaged, or the state of another run; on every rank.
    """
    folder = Path(path)
    manifest = open_together(engine.ranks, folder, kind=KIND)
    found = AverageState.from_json(manifest.content, where=folder / "manifest.json")
    require_run(found, expected, where=folder)
    require_shapes(found, expected.parameters, where=folder)
    if same_weights:
        require_weights(found, expected.weights, where=folder)
    paired = [(rule, lanes[rule.name]) for rule in found.rules]
    files = sorted(manifest.files)
    if not files:
        raise StateError(f"{folder}/manifest.json: files is empty, expected one of every rank that saved")
    # Where nothing has changed, a rank's own file holds all it needs.
    own = engine.ranks.rank % len(files)
    files = files[own:] + files[:own]
    wanted = [(fragment.name, fragment.start, fragment.end) for fragment in engine.fragments]

    def filled(number: int, each: Lanes, held: Mapping[str, bool]) -> Iterator[tuple[int, Lane]]:
        for index in held:
            lane = each.empty_lane(int(index))
            read_elements(folder, files, wanted, _vectors(lane_name(number, index), lane))
            yield int(index), lane

    for rule, each in paired:
        _require_lanes(rule, each, where=folder)
    with engine.ranks.together():
        for number, (rule, each) in enumerate(paired):
            each.restore(rule.count, filled(number, each, rule.lanes))
    return found


def weights_now(engine: Engine) -> str:
    """The sum of the bits of the last weights, also while others are swapped in (collective)."""
    return str(sum(engine.ranks.gather(sum_of_bits(engine.live()))) % (1 << 64))


def _default_readout(lanes: Lanes) -> dict[str, float]:
    if lanes.count == 0:
        return {}
    return {str(index): float(share) for index, share in sorted(lanes.plan.readout(lanes.count).items())}


def _require_lanes(rule: RuleState, lanes: Lanes, *, where: Path) -> None:
    moved = {update.lane for n in range(rule.count) for update in lanes.plan.updates(n)}
    expected = sorted(map(str, moved))
    if sorted(rule.lanes) != expected:
        raise StateError(
            f"{where}/manifest.json: after {rule.count} members {rule.name!r} has the lanes {sorted(rule.lanes)}, "
            f"expected {expected}"
        )


def _vectors(name: str, lane: Lane) -> dict[str, Tensor]:
    vectors = {f"{name}.mean": lane.mean}
    if lane.compensation is not None:
        vectors[f"{name}.compensation"] = lane.compensation
    return vectors

"""The averages of all ranks written together and read together: all of them, or none."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from swaft.averaging.engines import Engine
from swaft.averaging.rules import Rule
from swaft.averaging.state import (
    KIND,
    AverageState,
    RuleState,
    lane_name,
    read_elements,
    sum_of_bits,
    write_rank,
)
from swaft.errors import StateError
from swaft.storage.files import standing
from swaft.storage.sealed import MANIFEST
from swaft.storage.together import open_together, write_together

if TYPE_CHECKING:
    from swaft.averaging.host import HostAverages
    from swaft.averaging.host.lanes import Lane, Lanes

FILES = re.compile(r"(rank-\d{5}\.safetensors|manifest\.json|COMPLETE)(\.tmp)?")
"""What the files of a state are called."""


class Keeper:
    """Brings the averages of a run to disk, or into a dictionary, and back.

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
        *,
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
        wanted = [fragment.range for fragment in self._engine.fragments]
        return self._take_in(
            manifest.content,
            lambda vectors: read_elements(folder, files, wanted, vectors),
            same_weights=same_weights,
            where=folder,
        )

    def pack(self, applied_steps: int) -> dict[str, Any]:
        """The averages of a run of one rank: what :meth:`save` writes, its vectors being those of the lanes."""
        return {
            "state": self._state(applied_steps, held=True).to_json(),
            "fragments": [fragment.range for fragment in self._engine.fragments],
            "vectors": self._vectors(),
        }

    def unpack(self, packed: Mapping[str, Any]) -> AverageState:
        """Fill the lanes with what :meth:`pack` gave.

        Raises:
            StateError: it is of another run, or of one whose optimizer held the parameters in another order.
        """
        where = Path("the state dict of a WeightAverager")
        if list(map(tuple, packed["fragments"])) != [each.range for each in self._engine.fragments]:
            raise StateError(
                f"{where} holds the parameters in another order than this run's optimizer; expected the same model "
                "and optimizer groups, or a folder that averager.save_state wrote"
            )

        def read(vectors: Mapping[str, Tensor]) -> None:
            for name, vector in vectors.items():
                vector.copy_(packed["vectors"][name])

        return self._take_in(packed["state"], read, same_weights=True, where=where)

    def _take_in(
        self,
        content: Mapping[str, Any],
        read: Callable[[Mapping[str, Tensor]], None],
        *,
        same_weights: bool,
        where: Path,
    ) -> AverageState:
        """Fill the lanes, once the description of a state fits this run (collective)."""
        found, expected = AverageState.from_json(content, where=where / MANIFEST), self._state(0, held=False)
        found.refuse_other_run(expected, where=where)
        if same_weights and found.weights != expected.weights:
            raise StateError(
                f"{where} was saved beside other weights, after {found.applied_steps} optimizer steps, than the "
                "model has; load the checkpoint it belongs to first (model and optimizer), or say load_state(..., "
                "same_weights=False) where the model is meant to be another"
            )
        lanes = self._averages.lanes
        for rule in found.rules:
            plan = lanes[rule.name].plan
            moved = sorted({str(update.lane) for n in range(rule.count) for update in plan.updates(n)})
            if sorted(rule.lanes) != moved:
                raise StateError(
                    f"{where}/manifest.json: after {rule.count} members {rule.name!r} has the lanes "
                    f"{sorted(rule.lanes)}, expected {moved}"
                )

        def filled(number: int, rule: RuleState) -> Iterator[tuple[int, Lane]]:
            for index in rule.lanes:
                lane = lanes[rule.name].empty_lane(int(index))
                read(_vectors(lane_name(number, index), lane))
                yield int(index), lane

        with self._engine.ranks.together():
            for number, rule in enumerate(found.rules):
                lanes[rule.name].restore(rule.count, filled(number, rule))
        self._averages.motion.restart(moved=found.moved)
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
            moved=engine.ranks.sum([self._averages.motion.seen])[0] > 0,
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

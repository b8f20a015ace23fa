"""Where the elements of the master weights lie: pure arithmetic on names, ranges and buffers.

An element is identified by parameter name and position in the flattened parameter, never by rank or buffer. A
:class:`Fragment` ties a range of such elements to the buffer that holds them on one rank; the *shard* is the
concatenation of a rank's fragments, without any engine's padding.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from swaft.errors import LayoutError

if TYPE_CHECKING:
    from torch import Tensor


Range = tuple[str, int, int]
"""Elements [start, end) of a flattened parameter: (name, start, end)."""
_WRAPPERS = {"_orig_mod", "_checkpoint_wrapped_module"}
"""What torch.compile and torch's checkpoint wrapper add to the names inside the modules they wrap."""


def clean_name(name: str) -> str:
    """The name that a parameter, buffer or module has in the model without any wrappers."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


@dataclass(frozen=True)
class Fragment:
    """Elements ``[start, end)`` of one flattened parameter, held by one rank."""

    name: str
    """Name of the parameter in the unwrapped model."""
    start: int
    """First element, in the flattened parameter."""
    end: int
    """One past the last element."""
    buffer: int
    """Index of the master buffer that holds the elements."""
    offset: int
    """Where they begin in that buffer, in elements."""

    @property
    def numel(self) -> int:
        """Elements in the fragment."""
        return self.end - self.start

    @property
    def range(self) -> Range:
        """Which elements they are, independent of where they lie."""
        return self.name, self.start, self.end

    def part(self, first: int, last: int) -> list[Fragment]:
        """Its elements from ``first`` up to ``last``, counted from its start: one fragment, or none."""
        first, last = max(first, 0), min(last, self.numel)
        if first >= last:
            return []
        held = self.start + first, self.start + last
        return [Fragment(self.name, *held, self.buffer, self.offset + first)]


@dataclass(frozen=True)
class Span:
    """A run of elements that is contiguous both in one master buffer and in the shard."""

    buffer: int
    """Index of the master buffer."""
    offset: int
    """First element in that buffer."""
    shard_offset: int
    """First element in the shard."""
    numel: int
    """Elements in the run."""

    def of(self, buffers: Sequence[Tensor]) -> Tensor:
        """The run in flat buffers of this geometry, as a view."""
        return buffers[self.buffer].narrow(0, self.offset, self.numel)


def numel_of(spans: Iterable[Span]) -> int:
    """Total number of elements in spans."""
    return sum(span.numel for span in spans)


def laid_out(ranges: Iterable[Range]) -> list[Fragment]:
    """Ranges as fragments of one buffer that holds them end to end."""
    fragments, offset = [], 0
    for name, start, end in ranges:
        fragments.append(Fragment(name, start, end, 0, offset))
        offset += end - start
    return fragments


def section(fragments: Iterable[Fragment], first: int, last: int) -> list[Fragment]:
    """The elements from ``first`` up to ``last`` of a shard, given as its fragments."""
    taken, position = [], 0
    for each in fragments:
        taken += each.part(first - position, last - position)
        position += each.numel
    return taken


def slice_of(fragments: Iterable[Fragment], rank: int, world_size: int) -> list[Fragment]:
    """One rank's slice of elements that ``world_size`` ranks all hold.

    Args:
        fragments: the elements, in the same order on all these ranks.
        rank: which slice.
        world_size: number of slices; they differ by at most one element.
    """
    held = list(fragments)
    total = sum(fragment.numel for fragment in held)
    return section(held, total * rank // world_size, total * (rank + 1) // world_size)


def merge(fragments: Iterable[Fragment]) -> list[Span]:
    """The shard as a few long runs: neighbouring fragments with no padding between them become one span."""
    spans: list[Span] = []
    shard_offset = 0
    for fragment in fragments:
        last = spans[-1] if spans else None
        if last and last.buffer == fragment.buffer and last.offset + last.numel == fragment.offset:
            spans[-1] = Span(last.buffer, last.offset, last.shard_offset, last.numel + fragment.numel)
        else:
            spans.append(Span(fragment.buffer, fragment.offset, shard_offset, fragment.numel))
        shard_offset += fragment.numel
    return spans


def cut(spans: Iterable[Span], max_numel: int) -> list[list[Span]]:
    """Group spans into chunks of exactly ``max_numel`` elements (the last may be smaller), splitting as needed.

    A chunk's spans are in shard order, without gaps in the shard.
    """
    groups: list[list[Span]] = []
    room = 0
    for span in spans:
        done = 0
        while done < span.numel:
            if room == 0:
                groups.append([])
                room = max_numel
            take = min(room, span.numel - done)
            groups[-1].append(Span(span.buffer, span.offset + done, span.shard_offset + done, take))
            done, room = done + take, room - take
    return groups


def check_coverage(fragments_by_rank: Sequence[Sequence[Fragment]], numels: Mapping[str, int]) -> None:
    """Prove that the ranks together own every trainable element exactly once.

    Args:
        fragments_by_rank: each rank's fragments.
        numels: elements of every trainable parameter, by name.

    Raises:
        LayoutError: an element is owned by no rank or by two, or does not exist.
    """
    ranges: dict[str, list[tuple[int, int, int]]] = {name: [] for name in numels}
    for rank, fragments in enumerate(fragments_by_rank):
        for fragment in fragments:
            if fragment.name not in ranges:
                raise LayoutError(f"rank {rank} owns elements of {fragment.name!r}, which is not trainable")
            ranges[fragment.name].append((fragment.start, fragment.end, rank))
    for name, owned in ranges.items():
        position = 0
        for start, end, rank in sorted(owned):
            if start != position:
                fault = "by no rank" if start > position else "twice"
                raise LayoutError(
                    f"elements {min(start, position)}..{max(start, position)} of {name!r} are owned {fault} "
                    f"(rank {rank} owns {start}..{end}); expected every element exactly once"
                )
            position = end
        if position != numels[name]:
            raise LayoutError(
                f"{position} of the {numels[name]} elements of {name!r} are owned; expected every element "
                "exactly once"
            )

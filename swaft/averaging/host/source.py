"""How a member reaches the arithmetic: read in place if the masters are in host memory, staged otherwise.

Staging uses a ring of pinned blocks. Copies run on a separate stream, after the optimizer step that wrote the
masters, and each is followed by an event. The optimizer may write again once the last copy has been issued and the
training stream waits for its event.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from operator import attrgetter
from typing import Any

import numpy as np
import torch
from torch import Tensor

from swaft.averaging import native
from swaft.averaging.host.lanes import Table
from swaft.averaging.host.machine import Workers
from swaft.averaging.layout import Span, cut, numel_of
from swaft.errors import LayoutError

MAX_BLOCKS = 8
"""Blocks of the ring: enough for copies to run while earlier blocks are being averaged."""
LARGEST = 2.0**126
"""Weights this large count as not finite: the difference of two of them could overflow in the arithmetic."""
MIN_BLOCK_NUMEL = 1 << 16
"""Smallest block: 256 KiB."""


DTYPE = attrgetter("dtype")


class HostSource:
    """Masters in host memory: the arithmetic reads them where they are.

    Args:
        spans: where the shard lies in the master buffers.
        workers: whose threads share the work.
    """

    def __init__(self, spans: Sequence[Span], workers: Workers):
        self._workers = workers
        self._spans, self._parts = spans, shares(spans, workers)
        self._described: object = None
        self._tables: list[Table] = []

    def mark_ready(self) -> Any:
        """An event after which the masters are complete, as the calling thread left them; None on the host."""
        return None

    def order_after_copies(self) -> None:
        """Order what the calling thread does next to the masters after the copies issued so far."""

    def open(self, masters: list[Tensor], ready: Any, released: Callable[[], None]) -> None:
        """Begin a member: take the addresses of the masters, again if their storage has moved.

        Args:
            masters: flat fp32 buffers, complete once ``ready`` has happened.
            ready: from :meth:`mark_ready`.
            released: called once, when the masters may change, subject to `order_after_copies`.
        """
        self._released = released
        addresses = list(map(Tensor.data_ptr, masters))
        described = (addresses, list(map(Tensor.numel, masters)), list(map(DTYPE, masters)))
        if described != self._described:
            require_geometry(masters, self._spans)
            self._described, self._tables = described, [table(part, addresses) for part in self._parts]

    def all_finite(self) -> bool:
        """Whether every owned element of the member is finite and below `LARGEST` in size."""
        return all(self._workers.run(native.all_finite, self._tables))

    def tables(self) -> Iterator[list[Table]]:
        """The member in pieces, with one table per thread; here there is one piece, and the masters are in use
        until its end.
        """
        if self._tables:
            yield self._tables
        self._released()

    def close(self) -> None:
        """Drop references to the masters' storage, of which this source holds only addresses, and to the pipeline:
        in a cycle, closed averages would stay in memory until the next garbage collection.
        """
        vars(self).pop("_released", None)


class StagedSource:
    """Masters on a device: they pass through a ring of pinned blocks.

    Args:
        spans: where the shard lies in the master buffers.
        workers: whose threads share the work.
        device: where the masters are.
        api: `torch.cuda` or another device module with streams and events.
        limit_bytes: maximum memory of the ring.
        lent: the engine may free the masters' storage between members, so no view of it is kept.
    """

    def __init__(
        self,
        spans: Sequence[Span],
        workers: Workers,
        *,
        device: torch.device,
        api: Any,
        limit_bytes: int,
        lent: bool = False,
    ):
        block_numel, blocks = ring_of(numel_of(spans), limit_bytes)
        self._spans, self._chunks = spans, cut(spans, block_numel)
        self._api, self._device, self._lent = api, device, lent
        pinned = device.type != "cpu"
        self._blocks = [
            torch.empty(block_numel, dtype=torch.float32, device="cpu", pin_memory=pinned)
            for _ in range(blocks)
        ]
        self._stream = api.Stream(device=device)
        self._copied = [api.Event() for _ in range(blocks)]
        self._parts = [
            [
                table(part, [0])
                for part in shares([Span(0, 0, chunk[0].shard_offset, numel_of(chunk))], workers)
            ]
            for chunk in self._chunks
        ]
        self._masters: list[Tensor] | None = None
        self._views: list[list[Tensor]] = []
        self._last_copy: Any = None
        self._verdict: Tensor | None = None

    def mark_ready(self) -> Any:
        """See `HostSource`: an event on the calling thread's stream."""
        ready = self._api.Event()
        ready.record(self._api.current_stream(self._device))
        return ready

    def order_after_copies(self) -> None:
        """Let the calling thread's stream wait, on the device, for the copy issued last."""
        if self._last_copy is not None:
            self._api.current_stream(self._device).wait_event(self._last_copy)

    def open(self, masters: list[Tensor], ready: Any, released: Callable[[], None]) -> None:
        """Make the copy stream wait for the masters, and start as many copies as there are blocks."""
        self._api.set_device(self._device)  # a thread starts on device 0, and would create a context there
        if masters is not self._masters:
            require_geometry(masters, self._spans)
            self._masters = masters
            self._views = [[span.of(masters) for span in chunk] for chunk in self._chunks]
        with self._api.stream(self._stream):
            self._stream.wait_event(ready)
            views = [view for chunk in self._views for view in chunk]
            if views:
                norms = torch._foreach_norm(views, torch.inf)  # pyright: ignore[reportPrivateImportUsage]
                self._verdict = torch.stack(norms)
        self._released = released
        for i in range(min(len(self._blocks), len(self._chunks))):
            self._copy(i)
        if len(self._chunks) <= len(self._blocks):
            released()

    def all_finite(self) -> bool:
        """Whether every owned element is finite: one reduction on the device."""
        if self._verdict is None:
            return True
        with self._api.stream(self._stream):  # the thread's default stream would be the training stream
            return bool((self._verdict < LARGEST).all())

    def tables(self) -> Iterator[list[Table]]:
        """The member block by block, in shard order, each block as soon as it has arrived."""
        ring = len(self._blocks)
        for i, part in enumerate(self._parts):
            self._copied[i % ring].synchronize()
            base = self._blocks[i % ring].data_ptr()
            yield [(addresses + base, offsets, numels) for addresses, offsets, numels in part]
            if i + ring < len(self._chunks):
                self._copy(i + ring)
                if i + ring == len(self._chunks) - 1:
                    self._released()

    def close(self) -> None:
        """As for `HostSource`; unless the masters' storage is lent, the next member reuses the views of it."""
        vars(self).pop("_released", None)
        self._verdict = None
        if self._lent:
            self._masters, self._views = None, []

    def _copy(self, i: int) -> None:
        views, slot = self._views[i], i % len(self._blocks)
        block = self._blocks[slot][: numel_of(self._chunks[i])]
        targets = list(block.split([view.numel() for view in views]))
        with self._api.stream(self._stream), torch.no_grad():
            torch._foreach_copy_(targets, views, non_blocking=True)  # pyright: ignore[reportPrivateImportUsage]
            self._copied[slot].record(self._stream)
        self._last_copy = self._copied[slot]


Source = HostSource | StagedSource


def require_geometry(masters: Sequence[Tensor], spans: Sequence[Span]) -> None:
    """Refuse master buffers that do not contain the spans: compiled loops would read past them.

    Raises:
        LayoutError: a buffer is missing, too short, not flat, or not fp32.
    """
    for span in spans:
        master = masters[span.buffer] if span.buffer < len(masters) else None
        end = span.offset + span.numel
        if (
            master is None
            or master.numel() < end
            or master.dtype != torch.float32
            or not master.is_contiguous()
        ):
            found = "missing" if master is None else f"{master.numel()} elements of {master.dtype}"
            raise LayoutError(
                f"master buffer {span.buffer} is {found}, expected at least {end} elements of torch.float32, as "
                "when the averager was attached; attach a new averager after the optimizer is rebuilt"
            )


def ring_bytes(numel: int, limit_bytes: int) -> int:
    """Pinned memory of the ring for a shard, in bytes."""
    block_numel, blocks = ring_of(numel, limit_bytes)
    return 4 * block_numel * blocks


def ring_of(numel: int, limit_bytes: int) -> tuple[int, int]:
    """The ring for a shard: (block_numel, blocks), i.e. elements per block and number of blocks.

    The size of a block in bytes is a power of two, because torch rounds pinned blocks up to one. A small shard gets
    enough blocks for one member; a large shard gets all that is allowed.
    """
    largest = 1 << ((limit_bytes // MAX_BLOCKS // 4).bit_length() - 1)
    wanted = 1 << max(0, (-(-numel // MAX_BLOCKS) - 1).bit_length())
    block_numel = min(largest, max(wanted, MIN_BLOCK_NUMEL))
    return block_numel, max(1, min(MAX_BLOCKS, -(-numel // block_numel)))


def shares(spans: Sequence[Span], workers: Workers) -> list[list[Span]]:
    """Spans in equal parts, one per thread."""
    return cut(spans, max(1, -(-numel_of(spans) // workers.threads)))


def table(chunk: Sequence[Span], addresses: Sequence[int]) -> Table:
    """The runs of a chunk, as addresses in buffers that start at ``addresses``, and positions in the shard."""
    runs = [(addresses[s.buffer] + 4 * s.offset, s.shard_offset, s.numel) for s in chunk]
    where, offsets, numels = np.array(runs, dtype=np.int64).T.copy()
    return where, offsets, numels

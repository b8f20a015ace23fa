"""One rank's share of an average, in host memory, updated from the master buffers in bounded chunks.

It knows neither engines nor rules: it is given flat buffers and a weight. Steady-state work is a loop over
chunks of flat memory; no gather, no allocation, no loop over parameters.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from swaft.averaging.arithmetic import make_scratch, update_mean_
from swaft.averaging.layout import Span, cut

CHUNK = 1 << 17
"""Elements handled at a time: 1 MiB in fp64, so that the passes of one update stay in the processor's cache."""


class HostAverage:
    """A running mean of one rank's shard of the masters: 6 bytes an element, fp32 and a bf16 compensation.

    Args:
        spans: where the shard lies in the master buffers.
        chunk_numel: elements handled at a time; the bits of the result do not depend on it.
    """

    def __init__(self, spans: Iterable[Span], *, chunk_numel: int = CHUNK):
        self._chunks = cut(spans, chunk_numel)
        numel = sum(chunk.numel for chunk in self._chunks)
        self.mean = torch.zeros(numel, dtype=torch.float32)
        self.compensation = torch.zeros(numel, dtype=torch.bfloat16)
        self.count = 0
        self._staging = torch.empty(min(chunk_numel, numel), dtype=torch.float32)
        self._scratch = make_scratch(self._staging.numel())
        self._views_of: list[Tensor] | None = None
        self._views: list[list[Tensor]] = []

    @torch.no_grad()
    def add(self, masters: list[Tensor], weight: float) -> None:
        """Take the masters in as one more member: ``mean <- mean + weight * (masters - mean)``.

        Args:
            masters: flat fp32 buffers, on any device, in the geometry of the spans.
            weight: share of the new member, in (0, 1].
        """
        for i, chunk in enumerate(self._chunks):
            window = slice(chunk.shard_offset, chunk.shard_offset + chunk.numel)
            update_mean_(
                self.mean[window],
                self.compensation[window],
                self._load(i, masters),
                weight,
                scratch=self._scratch,
            )
        self.count += 1

    @torch.no_grad()
    def is_finite(self, masters: list[Tensor]) -> bool:
        """Whether every owned element of the masters is finite."""
        sums = [self._load(i, masters).sum(dtype=torch.float64) for i in range(len(self._chunks))]
        return not sums or bool(torch.stack(sums).isfinite().all())

    @torch.no_grad()
    def squared_distance(self, masters: list[Tensor]) -> float:
        """Sum over the shard of (mean - masters)², in float64."""
        total = 0.0
        for i, chunk in enumerate(self._chunks):
            mean = self.mean[chunk.shard_offset : chunk.shard_offset + chunk.numel]
            total += float((mean - self._load(i, masters)).double().square().sum())
        return total

    def _load(self, i: int, masters: list[Tensor]) -> Tensor:
        """Chunk ``i`` of the masters as one flat fp32 host tensor: a view where it is one already."""
        if masters is not self._views_of:
            self._views = [
                [masters[s.buffer].narrow(0, s.offset, s.numel) for s in chunk.spans]
                for chunk in self._chunks
            ]
            self._views_of = masters
        views = self._views[i]
        staging = self._staging[: self._chunks[i].numel]
        on_host = views[0].device.type == "cpu"
        if len(views) == 1:
            return views[0] if on_host else staging.copy_(views[0])
        return torch.cat(views, out=staging) if on_host else staging.copy_(torch.cat(views))

"""One rank's averages in host memory, kept behind the training thread."""

from __future__ import annotations

from swaft.averaging.host.averages import HostAverages

__all__ = ["HostAverages"]

"""Settings of the whole suite."""

from __future__ import annotations

from hypothesis import settings

settings.register_profile(
    "swaft", deadline=None
)  # busy machines take their time; wrong answers are the fault
settings.load_profile("swaft")

"""Which driver a GPU has. Apart, because what reports it should need nothing else of the command line."""

from __future__ import annotations

from pathlib import Path

_FILE = Path("/proc/driver/nvidia/version")


def driver_version() -> str | None:
    """Of NVIDIA's driver, where Linux says it."""
    words = _FILE.read_text().split() if _FILE.is_file() else []
    return next((word for word in words if word.count(".") and word.replace(".", "").isdigit()), None)

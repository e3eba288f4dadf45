"""The version of the installed distribution."""

from __future__ import annotations

from importlib import metadata


def version() -> str:
    """Version of haast; '0+source' if it runs from a source tree that was never installed."""
    try:
        return metadata.version("haast")
    except metadata.PackageNotFoundError:
        return "0+source"

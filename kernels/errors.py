"""What kernels refuse.

Kernels know nothing of the engine's errors, but theirs can be caught like those: a refusal says what was
found and what was expected, and has the stable ``code`` that the engine's errors have.
"""

from __future__ import annotations


class UnsupportedError(ValueError):
    """An argument that no kernel here takes: its type, size or layout. Raised on the host, before anything
    is launched."""

    code = "unsupported_operation"


def require(holds: bool, operation: str, message: str) -> None:
    """Raise UnsupportedError unless ``holds``; message: what was found, and what was expected."""
    if not holds:
        raise UnsupportedError(f"{operation}: {message}")

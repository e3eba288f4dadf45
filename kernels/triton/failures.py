"""What a launch that goes wrong raises: torch says what the device says, triton what its compiler says."""

from __future__ import annotations

from typing import Final

from triton import TritonError

FAILURES: Final[tuple[type[Exception], ...]] = (RuntimeError, TritonError)

"""NVTX ranges around public calls, for Nsight Systems: decided at import, so that they cost nothing when off."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any, TypeVar

from mlacore import switches

Function = TypeVar("Function", bound=Callable[..., Any])


def marked(name: str) -> Callable[[Function], Function]:
    """Decorator: the range `name`, in the domain ``mlacore``, around every call, where ``MLACORE_NVTX=1``.

    Without that switch it leaves the function as it is; nvtx itself wraps nothing unless a profiler is attached. With
    the switch but without the ``nvtx`` package a warning says so.
    """
    annotate = _annotate()
    return (lambda function: function) if annotate is None else annotate(name, domain="mlacore")


@functools.cache
def _annotate() -> Any:
    """``nvtx.annotate``, or None where ranges are off."""
    if not switches.marks_ranges():
        return None
    try:
        import nvtx
    except ImportError as error:
        message = f"MLACORE_NVTX=1, but nvtx cannot be imported ({error}): pip install nvtx"
        warnings.warn(message, RuntimeWarning, stacklevel=3)
        return None
    return nvtx.annotate

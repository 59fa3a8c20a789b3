"""NVTX ranges around public calls, for Nsight Systems: decided at import, so that they cost nothing when off."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, TypeVar

from mlacore import switches

Function = TypeVar("Function", bound=Callable[..., Any])


def marked(name: str) -> Callable[[Function], Function]:
    """Decorator: the range `name`, in the domain ``mlacore``, around every call, where ``MLACORE_NVTX=1``.

    Without that switch it returns the function itself; with it, but without the ``nvtx`` package, it also warns.
    """

    def mark(function: Function) -> Function:
        if not switches.marks_ranges():
            return function
        try:
            import nvtx
        except ImportError as error:
            warnings.warn(
                f"MLACORE_NVTX=1, but nvtx cannot be imported ({error}): pip install nvtx", RuntimeWarning, stacklevel=2
            )
            return function
        return nvtx.annotate(name, domain="mlacore")(function)

    return mark

"""The package's environment variables that choose between values; a value that is none of them warns and counts as
unset."""

from __future__ import annotations

import ctypes
import logging
import os
import warnings
from typing import TypeVar

Value = TypeVar("Value")

_getenv = ctypes.PyDLL(None).getenv
_getenv.restype = ctypes.c_char_p

_LEVELS = {name.lower(): level for name, level in logging.getLevelNamesMapping().items() if level}


def compiles_at_import() -> bool:
    """``MLACORE_COMPILE``: ``eager`` (default) or ``lazy``."""
    return _choice("MLACORE_COMPILE", {"eager": True, "lazy": False}, True)


def checks_indices() -> bool:
    """``MLACORE_CHECK``: ``1`` validates lengths and page ids on every call."""
    # Asked on every call: os.environ takes ten times longer to say that a variable is unset, and keeps C's in step.
    return _getenv(b"MLACORE_CHECK") is not None and _choice("MLACORE_CHECK", {"1": True, "0": False}, False)


def marks_ranges() -> bool:
    """``MLACORE_NVTX``: ``1`` puts NVTX ranges around public calls; read once, at import."""
    return _choice("MLACORE_NVTX", {"1": True, "0": False}, False)


def log_level() -> int | None:
    """``MLACORE_LOG``: a level of `logging` by name; None leaves the log to the caller's own set-up."""
    values: dict[str, int | None] = {**_LEVELS}
    return _choice("MLACORE_LOG", values, None)


def _choice(variable: str, values: dict[str, Value], default: Value) -> Value:
    text = os.environ.get(variable, "").lower()
    if text and text not in values:
        warnings.warn(f"{variable}: got {text!r}, expected one of {', '.join(values)}", RuntimeWarning, stacklevel=3)
    return values.get(text, default)

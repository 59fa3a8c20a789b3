"""Paged Multi-head Latent Attention decode without PyTorch: Hopper kernels for GPU arrays, NumPy for the rest."""

from __future__ import annotations

import importlib
import logging
import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mlacore.attention import merge_states, mla_decode
    from mlacore.block_tables import OutOfPagesError, OutOfSequencesError
    from mlacore.cache import PagedKVCache
    from mlacore.plan import DecodePlan, plan_decode
    from mlacore.reference import mla_decode_reference

__version__ = "0.1.0"
__all__ = [
    "DecodePlan",
    "OutOfPagesError",
    "OutOfSequencesError",
    "PagedKVCache",
    "__version__",
    "merge_states",
    "mla_decode",
    "mla_decode_reference",
    "plan_decode",
]

# Public name -> module that defines it, imported at first use.
_HOMES = {
    "DecodePlan": "mlacore.plan",
    "OutOfPagesError": "mlacore.block_tables",
    "OutOfSequencesError": "mlacore.block_tables",
    "PagedKVCache": "mlacore.cache",
    "merge_states": "mlacore.attention",
    "mla_decode": "mlacore.attention",
    "mla_decode_reference": "mlacore.reference",
    "plan_decode": "mlacore.plan",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _follow_log_switch() -> None:
    """MLACORE_LOG=debug (or another level) shows the package's log on stderr; without it the caller's setup decides."""
    if level := os.environ.get("MLACORE_LOG"):
        logger = logging.getLogger("mlacore")
        logger.setLevel(level.upper())
        logger.addHandler(logging.StreamHandler())


def _load_kernels() -> None:
    """Compile or load the default kernels where a Hopper GPU is there, so that no first call waits for the compiler."""
    if os.environ.get("MLACORE_COMPILE", "eager") == "lazy":
        return
    from mlacore import driver

    if driver.hopper_devices():
        try:
            driver.load_default_kernels()
        except ImportError as error:  # NumPy arrays still work; the first GPU call raises this again
            logging.getLogger("mlacore").warning("no GPU kernels: %s", error)


_follow_log_switch()
_load_kernels()

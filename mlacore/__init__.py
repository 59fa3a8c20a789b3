"""Paged Multi-head Latent Attention decode without PyTorch: Hopper kernels for GPU arrays, NumPy for the rest."""

from __future__ import annotations

import importlib
import logging
from typing import TYPE_CHECKING, Any

from mlacore import switches

if TYPE_CHECKING:
    from mlacore.attention import merge_states, mla_decode
    from mlacore.cache import PagedKVCache
    from mlacore.host_tables import OutOfPagesError, OutOfSequencesError
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
    "OutOfPagesError": "mlacore.host_tables",
    "OutOfSequencesError": "mlacore.host_tables",
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
    if (level := switches.log_level()) is not None:
        logger = logging.getLogger("mlacore")
        logger.setLevel(level)
        logger.addHandler(logging.StreamHandler())


def _load_kernels() -> None:
    """Compile or load the default kernels where a Hopper GPU is there, so that no first call waits for the compiler."""
    if not switches.compiles_at_import():
        return
    from mlacore import driver

    try:
        if driver.hopper_devices():
            driver.load_default_kernels()
    except Exception as error:  # whatever it is, NumPy arrays and `python -m mlacore info` must keep working
        # The first GPU call raises it again.
        logging.getLogger("mlacore").warning("no GPU kernels: %s (python -m mlacore info tells more)", error)


_follow_log_switch()
_load_kernels()

"""The CUDA driver library through ctypes: loaded and initialised once, its errors by name, its current context."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
from collections.abc import Iterator
from typing import SupportsInt

_initialised_in: list[int] = []  # the process that initialised the driver; a forked child inherits a useless one


def library() -> ctypes.CDLL | None:
    """The initialised driver library, None on a machine without one.

    Raises
    ------
    RuntimeError
        In a fork of the process that initialised it.
    """
    if _initialised_in and _initialised_in != [os.getpid()]:
        raise RuntimeError(
            "CUDA was initialised before this process was forked, and does not work in a fork: start processes with "
            "the spawn method, or set MLACORE_COMPILE=lazy and leave the GPU alone before forking"
        )
    return _initialised_library()


@functools.cache
def _initialised_library() -> ctypes.CDLL | None:
    try:
        found = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    if found.cuInit(0) != 0:
        return None
    _initialised_in[:] = [os.getpid()]  # by assignment: threads may come here at once
    return found


def required() -> ctypes.CDLL:
    """`library`; RuntimeError on a machine without one."""
    found = library()
    if found is None:
        raise RuntimeError("no NVIDIA driver answers (libcuda.so.1); python -m mlacore info tells what is there")
    return found


@functools.cache
def keeping_gil() -> ctypes.PyDLL:
    """`required`, for calls that wait for nothing: one that lets go of the GIL may get it back milliseconds later."""
    found = required()
    return ctypes.PyDLL(found._name, handle=found._handle)


def check(status: SupportsInt, what: str) -> None:
    """Raise RuntimeError, naming the error, unless a driver call's status is success."""
    if int(status) == 0:  # a binding's enumeration, or ctypes' int
        return
    name = ctypes.c_char_p()
    required().cuGetErrorName(int(status), ctypes.byref(name))
    raise RuntimeError(f"{what} failed: {name.value.decode() if name.value else int(status)}")


@contextlib.contextmanager
def primary_context(device: int) -> Iterator[None]:
    """Make the context that a device's arrays live in current, for this thread."""
    driver = required()
    check(driver.cuCtxPushCurrent_v2(_retained_context(device)), f"entering the context of device {device}")
    try:
        yield
    finally:
        driver.cuCtxPopCurrent_v2(ctypes.byref(ctypes.c_void_p()))


@functools.cache
def _retained_context(device: int) -> ctypes.c_void_p:
    """A device's primary context, which CuPy shares; kept for as long as the process lives."""
    driver, handle, context = required(), ctypes.c_int(), ctypes.c_void_p()
    check(driver.cuDeviceGet(ctypes.byref(handle), device), f"finding device {device}")
    check(driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), handle), f"retaining the context of device {device}")
    return context

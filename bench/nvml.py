"""SM clock, power and energy of a GPU while it works, through NVML, the driver's management library."""

from __future__ import annotations

import ctypes
from typing import Any, NamedTuple

_CLOCK_SM = 1
_FIELD_POWER_INSTANT = 186  # milliwatts; nvmlDeviceGetPowerUsage is a mean over the last second
_HANDLE_BY_BUS_ID = "nvmlDeviceGetHandleByPciBusId_v2"


class Reading(NamedTuple):
    """What NVML says at one moment; None where it does not say."""

    sm_mhz: float | None
    watts: float | None


class _FieldValue(ctypes.Structure):
    _fields_ = (
        ("field_id", ctypes.c_uint),
        ("scope_id", ctypes.c_uint),
        ("timestamp_us", ctypes.c_longlong),
        ("latency_us", ctypes.c_longlong),
        ("value_type", ctypes.c_uint),
        ("status", ctypes.c_uint),
        ("value", ctypes.c_ulonglong),  # a union; this field fills its low 32 bits
    )


class Meter:
    """Reads one GPU each time it is called: 0.2 ms or so on the host, nothing on the device.

    Parameters
    ----------
    pci_bus_id : str
        As CUDA gives it, ``0000:1b:00.0``.
    library : ctypes.CDLL, optional
        NVML; loaded if None.

    Raises
    ------
    OSError
        If there is no NVML, or it does not know the GPU.
    """

    def __init__(self, pci_bus_id: str, library: Any = None) -> None:
        self._nvml = library or ctypes.CDLL("libnvidia-ml.so.1")
        self._gpu = ctypes.c_void_p()
        status = self._nvml.nvmlInit_v2()
        if status == 0:
            status = getattr(self._nvml, _HANDLE_BY_BUS_ID)(pci_bus_id.encode(), ctypes.byref(self._gpu))
        if status != 0:
            raise OSError(f"NVML error {status} for the GPU at {pci_bus_id}")

    def joules(self) -> float | None:
        """What the GPU has taken since the driver was loaded, in J; NVML moves it on every 0.1 s. None if unknown."""
        millijoules = ctypes.c_ulonglong()
        status = self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._gpu, ctypes.byref(millijoules))
        return millijoules.value / 1000 if status == 0 else None

    def limit_watts(self) -> float | None:
        """The power limit in force, in W; None if unknown."""
        milliwatts = ctypes.c_uint()
        status = self._nvml.nvmlDeviceGetEnforcedPowerLimit(self._gpu, ctypes.byref(milliwatts))
        return milliwatts.value / 1000 if status == 0 else None

    def __call__(self) -> Reading:
        """The present SM clock in MHz and power in W."""
        clock = ctypes.c_uint()
        field = _FieldValue(field_id=_FIELD_POWER_INSTANT)
        has_clock = self._nvml.nvmlDeviceGetClockInfo(self._gpu, _CLOCK_SM, ctypes.byref(clock)) == 0
        has_power = self._nvml.nvmlDeviceGetFieldValues(self._gpu, 1, ctypes.byref(field)) == 0 and field.status == 0
        return Reading(
            float(clock.value) if has_clock else None, (field.value & 0xFFFFFFFF) / 1000 if has_power else None
        )


def open_meter(pci_bus_id: str) -> Meter | None:
    """A `Meter`, or None where NVML is missing or does not answer."""
    try:
        return Meter(pci_bus_id)
    except (OSError, AttributeError):  # no library, no such GPU, no such function
        return None

"""Arrays in and out: which side an array lives on, element types by name, zero-copy import to CuPy.

NumPy arrays stay as they are. Anything on a GPU becomes a `cupy.ndarray` over the same memory, by DLPack (bfloat16 has
no typestr in ``__cuda_array_interface__``) or, failing that, by ``__cuda_array_interface__``.
"""

from __future__ import annotations

import contextlib
import ctypes
import sys
from collections.abc import Iterator
from typing import Any

import ml_dtypes
import numpy as np

bfloat16 = np.dtype(ml_dtypes.bfloat16)
float16 = np.dtype(np.float16)
float32 = np.dtype(np.float32)
int32 = np.dtype(np.int32)

GPU_DTYPES = (bfloat16, float16)  # what the tensor cores take
CPU_DTYPES = (*GPU_DTYPES, float32)
_BY_NAME = {dtype.name: dtype for dtype in CPU_DTYPES}

_DLPACK_CUDA = (2, 13)  # kDLCUDA, kDLCUDAManaged
_DLPACK_READ_ONLY = 1  # of the flags in a capsule of DLPack 1.0
_WANTED = "a NumPy array or a GPU array (CuPy, or anything with __dlpack__ or __cuda_array_interface__)"


def as_dtype(dtype: Any) -> np.dtype:
    """The element type of a name (``"bfloat16"``, ``"float16"``, ``"float32"``), dtype or scalar type.

    Raises
    ------
    TypeError
        If it is none of the three.
    """
    try:
        resolved = _BY_NAME[dtype] if isinstance(dtype, str) else np.dtype(dtype)
    except (KeyError, TypeError):
        resolved = None
    if resolved not in CPU_DTYPES:
        raise TypeError(f"dtype: got {dtype!r}, expected {', '.join(_BY_NAME)} (by name or as a dtype)")
    return resolved


def is_numpy(array: Any) -> bool:
    """Whether `array` is a NumPy array."""
    return isinstance(array, np.ndarray)


def cupy_type() -> Any:
    """`cupy.ndarray`, None before CuPy is imported: arrays of this very type are taken as they are. Quick."""
    # An instance exists only once CuPy is imported; another thread may be about to.
    return getattr(sys.modules.get("cupy"), "ndarray", None)


def is_gpu(array: Any) -> bool:
    """Whether `array` lives in CUDA device memory, of whichever library. Imports nothing."""
    if is_cupy(array):
        return True
    if hasattr(array, "__dlpack_device__"):
        return int(array.__dlpack_device__()[0]) in _DLPACK_CUDA
    return hasattr(array, "__cuda_array_interface__")


def on_numpy(**arrays: Any) -> bool:
    """True if all arguments are NumPy arrays, False if all are GPU arrays.

    Raises
    ------
    TypeError
        If one is neither, or both sides occur: nothing is ever copied between host and device behind the caller's back.
    """
    host = [name for name, array in arrays.items() if is_numpy(array)]
    device = [name for name, array in arrays.items() if name not in host and is_gpu(array)]
    for name, array in arrays.items():
        if name not in host and name not in device:
            where = " in CPU memory (numpy.asarray views it)" if hasattr(array, "__dlpack_device__") else ""
            raise TypeError(f"{name}: got {type(array).__name__}{where}, expected {_WANTED}")
    if host and device:
        raise TypeError(
            f"{', '.join(host)}: got NumPy, expected GPU arrays, as {', '.join(device)} came on a GPU "
            f"(one call takes either; nothing is copied between host and device)"
        )
    return bool(host)


def import_cupy() -> Any:
    """The `cupy` module; ImportError with what to install."""
    try:
        import cupy
    except ImportError as error:
        raise ImportError(
            f"GPU arrays need CuPy, which cannot be imported ({error}): "
            "pip install 'cupy-cuda13x>=14.0.1,<15' 'nvidia-cuda-runtime==13.*'"
        ) from error
    return cupy


def to_device(argument: str, array: Any, stream: Any = None) -> Any:
    """`array` as a `cupy.ndarray` over the same memory.

    Parameters
    ----------
    argument : str
        Name to use in errors.
    array : object
        CuPy array (returned as it is), or an object with ``__dlpack__`` or ``__cuda_array_interface__`` on a GPU.
    stream : cupy.cuda.Stream, optional
        Stream that waits for the exporter's pending work; CuPy's current stream if None.

    Raises
    ------
    TypeError
        If `array` is not on a GPU, or has an element type that CuPy cannot hold.
    """
    if is_cupy(array):
        return array
    if not is_gpu(array):
        raise TypeError(f"{argument}: got {type(array).__name__}, expected a GPU array")
    cupy = import_cupy()
    # CuPy hands the exporter the stream that is current on the array's device, not on the current one.
    with contextlib.nullcontext() if stream is None else on_device(_foreign_device(array), stream):
        try:
            return cupy.from_dlpack(array) if hasattr(array, "__dlpack__") else cupy.asarray(array)
        except (TypeError, ValueError, BufferError) as error:
            raise TypeError(f"{argument}: got {type(array).__name__} that CuPy cannot view: {error}") from error


def all_to_device(named: dict[str, Any], stream: Any = None) -> dict[str, Any]:
    """`to_device` of several arrays. Device and stream are entered once: that takes longer than most imports."""
    foreign = next((array for array in named.values() if not is_cupy(array)), None)
    is_needless = stream is None or foreign is None
    with contextlib.nullcontext() if is_needless else on_device(_foreign_device(foreign), stream):
        return {name: to_device(name, array, stream) for name, array in named.items()}


def check_writable(argument: str, array: Any) -> None:
    """Raise ValueError if `array` must not be written: as NumPy's flags, JAX's arrays, DLPack's flag or
    ``__cuda_array_interface__`` say. A CuPy array no longer knows what it was imported from."""
    if is_numpy(array):
        is_read_only = not array.flags.writeable
    elif is_cupy(array) or torch_of(array) is not None:
        is_read_only = False
    elif (jax := sys.modules.get("jax")) is not None and isinstance(array, jax.Array):
        is_read_only = True  # its capsules do not always say so
    elif hasattr(array, "__dlpack__"):
        is_read_only = _dlpack_is_read_only(array)
    else:
        is_read_only = bool(array.__cuda_array_interface__["data"][1])
    if is_read_only:
        raise ValueError(f"{argument}: got a read-only array, expected a writable one")


def _dlpack_is_read_only(array: Any) -> bool:
    try:
        capsule = array.__dlpack__(stream=-1, max_version=(1, 0))  # no synchronisation
    except (TypeError, BufferError):
        return False  # from before DLPack 1.0, which has no such flag; or no capsule at all, which the import reports
    if not _capsule.PyCapsule_IsValid(capsule, _VERSIONED):
        return False
    address = _capsule.PyCapsule_GetPointer(capsule, _VERSIONED)
    return bool(_ManagedTensor.from_address(address).flags & _DLPACK_READ_ONLY)


class _ManagedTensor(ctypes.Structure):
    """The head of a ``DLManagedTensorVersioned``."""

    _fields_ = (
        ("major", ctypes.c_uint32),
        ("minor", ctypes.c_uint32),
        ("manager", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
        ("flags", ctypes.c_uint64),
    )


_VERSIONED = b"dltensor_versioned"
_capsule = ctypes.PyDLL(None)
_capsule.PyCapsule_IsValid.argtypes = _capsule.PyCapsule_GetPointer.argtypes = (ctypes.py_object, ctypes.c_char_p)
_capsule.PyCapsule_GetPointer.restype = ctypes.c_void_p


def torch_of(array: Any) -> Any:
    """The `torch` module if `array` is one of its tensors, else None. Imports nothing."""
    torch = sys.modules.get("torch")
    return torch if torch is not None and isinstance(array, torch.Tensor) else None


def current_stream_of(array: Any) -> Any:
    """The stream, as CuPy's, on which the library of a GPU array would work with it now.

    torch has its own idea of it; for other libraries it is CuPy's current stream, which DLPack orders after theirs.
    """
    if (torch := torch_of(array)) is not None:
        return as_stream(torch.cuda.current_stream(array.device).cuda_stream)
    if is_cupy(array):
        return as_stream(None, array.data.device_id)
    return as_stream(None, _foreign_device(array))


def to_library_of(model: Any, array: Any) -> Any:
    """The CuPy array `array` as an array of the library of `model`, over the same memory; as it is where that library
    does not say how (``__array_namespace__``, or ``from_dlpack`` in its top module)."""
    if is_cupy(model):
        return array
    if hasattr(model, "__array_namespace__"):
        namespace = model.__array_namespace__()
    else:
        namespace = sys.modules.get(type(model).__module__.partition(".")[0])
    from_dlpack = getattr(namespace, "from_dlpack", None)
    return array if from_dlpack is None else from_dlpack(array)


def _foreign_device(array: Any) -> int:
    """CUDA ordinal of another library's array; the current device where it does not say."""
    if hasattr(array, "__dlpack_device__"):
        return int(array.__dlpack_device__()[1])
    return int(import_cupy().cuda.runtime.getDevice())


def device_of(array: Any) -> int | None:
    """CUDA ordinal of a CuPy array; None for NumPy."""
    return None if is_numpy(array) else array.data.device_id


def device_name(device: int | None) -> str:
    """How errors name a device: ``cuda:0``, or ``NumPy``."""
    return "NumPy" if device is None else f"cuda:{device}"


def as_stream(stream: Any, device: int = -1) -> Any:
    """A CuPy stream from a CuPy stream, a ``cudaStream_t`` as int, ``__cuda_stream__``, or None: the stream current on
    `device`, where -1 stands for the current device.

    Raises
    ------
    TypeError
        If it is none of these.
    """
    # Twice as quick as an import that has nothing left to do; where another thread is at it, the attribute comes last.
    cuda = getattr(sys.modules.get("cupy"), "cuda", None) or import_cupy().cuda
    if stream is None:
        return cuda.get_current_stream(device)
    if isinstance(stream, (cuda.Stream, cuda.ExternalStream)):
        return stream
    if isinstance(stream, int):
        stream = _RawStream(stream)
    if not hasattr(stream, "__cuda_stream__"):
        raise TypeError(
            f"stream: got {type(stream).__name__}, expected a CuPy stream, a cudaStream_t as int, an object with "
            f"__cuda_stream__, or None"
        )
    return cuda.Stream.from_external(stream)


def check_no_stream(stream: Any) -> None:
    """Raise TypeError for a stream that comes with NumPy arrays."""
    if stream is not None:
        raise TypeError(f"stream: got {type(stream).__name__}, expected None (NumPy arrays have no stream)")


@contextlib.contextmanager
def on_device(device: int, stream: Any) -> Iterator[Any]:
    """The `cupy` module, with `device` and `stream` current: what is allocated here belongs to that stream."""
    cupy = import_cupy()
    if cupy.cuda.runtime.getDevice() == device and cupy.cuda.get_current_stream(device) == stream:
        yield cupy  # as nearly always, and entering both takes longer than an allocation
        return
    with cupy.cuda.Device(device), stream:
        yield cupy


class _RawStream:
    """A ``cudaStream_t`` that speaks the CUDA stream protocol."""

    def __init__(self, handle: int) -> None:
        self._handle = handle

    def __cuda_stream__(self) -> tuple[int, int]:
        return (0, self._handle)


def is_cupy(array: Any) -> bool:
    """Whether `array` is a CuPy array. Imports nothing."""
    # Asking sys.modules keeps this free for NumPy users.
    ndarray = cupy_type()
    return ndarray is not None and isinstance(array, ndarray)

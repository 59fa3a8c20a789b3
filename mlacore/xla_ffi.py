"""Handlers of XLA's foreign function interface (FFI) in Python: C callbacks by ctypes, so that nobody needs a compiler.

XLA calls a handler with the address of a call frame: the addresses of its arguments and results, its attributes, and
an API to ask for stream and device. The offsets below are those of ``xla/ffi/api/c_api.h`` (where
``jax.ffi.include_dir()`` says) on 64-bit machines. Minor versions of that API only add fields at the end of structs; a
new major version is refused by XLA, as the handler answers with major version 0.

A handler has one attribute, a string that says all that is fixed about the call. A callback costs a few µs: most of it
is reading the addresses, one by one.
"""

from __future__ import annotations

import ctypes
import functools
import struct
from collections.abc import Callable
from typing import Any

# (what is fixed, addresses of arguments, addresses of results, device, stream); the device is None on a CPU
Call = Callable[[bytes, list[int], list[int], Any, int], None]

_METADATA = 1  # the extension by which XLA asks what a handler is
_OLDEST_API = (0, 1)  # for a runtime that asks before it shows its API
_INVALID_ARGUMENT, _INTERNAL = 3, 13

# XLA_FFI_CallFrame: extension, api, context; then count and pointers of arguments, results and attributes.
_read_frame = struct.Struct("=8x 3Q 8x 16x Q 8x Q 16x Q 8x Q 16x 24x Q").unpack
_FRAME_BYTES = 168
_read_extension = struct.Struct("=8x i 4x 8x Q").unpack  # XLA_FFI_Metadata_Extension: type, metadata
_METADATA_VERSION_OFFSET = 24
# Calls on one stream share scratch memory, so XLA may not capture them into graphs that run some side by side.
_NO_TRAITS = 0
_pack_metadata = struct.Struct("=2i I").pack  # XLA_FFI_Metadata: version, traits
_read_span = struct.Struct("=2Q").unpack  # XLA_FFI_ByteSpan: pointer, length
_BUFFER_DATA_OFFSET = 24  # of XLA_FFI_Buffer

# XLA_FFI_Api; all of these functions are older than the oldest jaxlib allowed.
_API_VERSION_OFFSET = 32
_ERROR_CREATE, _ERROR_GET_MESSAGE, _ERROR_DESTROY, _STREAM_GET, _DEVICE_ORDINAL_GET = 48, 56, 64, 80, 184

# Arguments of the functions of the API: size of the struct, extension, context or error, and what is answered.
_ASK = struct.Struct("=4Q")
_ANSWER_OFFSET = 24
_STREAM_BYTES, _DEVICE_BYTES, _MESSAGE_BYTES, _DESTROY_BYTES = 32, 28, 32, 24
_NEW_ERROR = struct.Struct("=3Q i")  # size, extension, message, code

_Function = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p)  # keeps the GIL: these return at once
_Handler = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p)
_string_at = ctypes.string_at
_uint64_at = ctypes.c_uint64.from_address

_addresses = [struct.Struct(f"={count}Q").unpack for count in range(16)]
_keep: list[Any] = []  # callbacks live as long as the process: XLA never forgets a handler


def handler(call: Call, *, on_gpu: bool) -> int:
    """Address of a handler that does `call`; what that raises becomes the error of XLA's execution.

    Parameters
    ----------
    call : callable
        Takes the attribute, the addresses of arguments and results, the device's ordinal and the stream's handle; on a
        CPU the last two are None and 0. XLA calls it on threads of its own, several at once.
    on_gpu : bool
        Whether there are a stream and a device to ask for.
    """

    def run(frame: int) -> int | None:
        extension, api, context, num_arguments, arguments, num_results, results, attributes = _read_frame(
            _string_at(frame, _FRAME_BYTES)
        )
        try:
            if extension and _answer_metadata(extension, api):
                return None
            span, length = _read_span(_string_at(_uint64_at(attributes).value, 16))
            device, stream = _api(api).device_and_stream(context) if on_gpu else (None, 0)
            call(
                _string_at(span, length),
                _data(num_arguments, arguments),
                _data(num_results, results),
                device,
                stream,
            )
        except BaseException as error:  # whatever it is, it must not leave a callback
            return _api(api).error(error)
        return None

    callback = _Handler(run)
    _keep.append(callback)
    address = ctypes.cast(callback, ctypes.c_void_p).value
    assert address is not None
    return address


def _data(count: int, pointers: int) -> list[int]:
    """Addresses of the memory of `count` XLA_FFI_Buffer."""
    return [
        _uint64_at(buffer + _BUFFER_DATA_OFFSET).value for buffer in _addresses[count](_string_at(pointers, 8 * count))
    ]


def _answer_metadata(extension: int, api: int) -> bool:
    """Answer XLA's question what a handler is, if it is that."""
    kind, metadata = _read_extension(_string_at(extension, 32))
    if kind != _METADATA:
        return False
    # Whatever minor version XLA has, it has not moved a field.
    version = struct.unpack("=2i", _string_at(api + _API_VERSION_OFFSET, 8)) if api else _OLDEST_API
    answer = _pack_metadata(_OLDEST_API[0], version[1], _NO_TRAITS)
    ctypes.memmove(metadata + _METADATA_VERSION_OFFSET, answer, len(answer))
    return True


class _Api:
    """What a handler asks of the XLA runtime that called it."""

    def __init__(self, address: int) -> None:
        offsets = _STREAM_GET, _DEVICE_ORDINAL_GET, _ERROR_CREATE, _ERROR_GET_MESSAGE, _ERROR_DESTROY
        self._get_stream, self._get_device, self._create, self._get_message, self._destroy = (
            _Function(_uint64_at(address + offset).value) for offset in offsets
        )
        self._frames: list[tuple[Any, int, Any, Any]] = []  # not in use; a list's pop and append are atomic

    def device_and_stream(self, context: int) -> tuple[int, int]:
        """Ordinal of the device and handle of the stream of an execution."""
        try:
            frame = self._frames.pop()
        except IndexError:
            memory = ctypes.create_string_buffer(_ASK.size)
            address = ctypes.addressof(memory)
            answer = address + _ANSWER_OFFSET
            frame = memory, address, _uint64_at(answer), ctypes.c_int32.from_address(answer)
        memory, address, stream_answer, device_answer = frame
        _ASK.pack_into(memory, 0, _STREAM_BYTES, 0, context, 0)
        if error := self._get_stream(address):
            raise RuntimeError(f"XLA gives no stream: {self._message(error)}")
        stream = stream_answer.value
        _ASK.pack_into(memory, 0, _DEVICE_BYTES, 0, context, 0)
        if error := self._get_device(address):
            raise RuntimeError(f"XLA gives no device: {self._message(error)}")
        device = device_answer.value
        self._frames.append(frame)
        return device, stream

    def error(self, error: BaseException) -> int:
        """An XLA_FFI_Error that says what `error` does; XLA destroys it."""
        try:
            text = f"{type(error).__name__}: {error}"
        except Exception:  # its __str__: nothing may leave a callback, or XLA takes it for a success
            text = type(error).__name__
        message = ctypes.create_string_buffer(text.encode(errors="replace"))
        code = _INVALID_ARGUMENT if isinstance(error, (TypeError, ValueError)) else _INTERNAL
        request = _NEW_ERROR.pack(_NEW_ERROR.size, 0, ctypes.addressof(message), code)
        return self._create(request)

    def _message(self, error: int) -> str:
        request = ctypes.create_string_buffer(_ASK.pack(_MESSAGE_BYTES, 0, error, 0), _ASK.size)
        self._get_message(ctypes.addressof(request))
        message = _string_at(_uint64_at(ctypes.addressof(request) + _ANSWER_OFFSET).value).decode(errors="replace")
        self._destroy(_ASK.pack(_DESTROY_BYTES, 0, error, 0))
        return message


_api = functools.lru_cache(maxsize=None)(_Api)  # XLA's API lives as long as the process

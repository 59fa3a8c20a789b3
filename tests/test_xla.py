"""XLA's side without XLA: handlers called through call frames laid out here, and what their calls launch on a GPU.

The frames follow ``xla/ffi/api/c_api.h``; `test_jax.py` holds handlers against XLA itself.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import json
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from pretended_gpu import FakeDriver, gpu_array, kernel_on_host

from mlacore import driver, mla_decode, params, plan_decode, xla_ffi, xla_targets
from mlacore import plan as plans
from mlacore.arrays import bfloat16, int32
from mlacore.cache_layout import RowTransform
from mlacore.cache_numpy import write_rows
from mlacore.dispatch import KernelShape
from mlacore.launch import pack_addresses

POINTER, SIZE = ctypes.c_void_p, ctypes.c_size_t


def struct(*fields: tuple[str, Any]) -> type[ctypes.Structure]:
    return type("Struct", (ctypes.Structure,), {"_fields_": list(fields)})


HEAD = (("struct_size", SIZE), ("extension", POINTER))
Buffer = struct(*HEAD, ("dtype", ctypes.c_int), ("data", POINTER), ("rank", ctypes.c_int64), ("dims", POINTER))
List = struct(*HEAD, ("size", ctypes.c_int64), ("types", POINTER), ("items", POINTER))
Attributes = struct(*HEAD, ("size", ctypes.c_int64), ("types", POINTER), ("names", POINTER), ("items", POINTER))
Span = struct(("pointer", POINTER), ("length", SIZE))
CallFrame = struct(
    *HEAD,
    ("api", POINTER),
    ("context", POINTER),
    ("stage", ctypes.c_int),
    ("arguments", List),
    ("results", List),
    ("attributes", Attributes),
)
Version = struct(*HEAD, ("major", ctypes.c_int), ("minor", ctypes.c_int))
Metadata = struct(("struct_size", SIZE), ("version", Version), ("traits", ctypes.c_uint32))
Extension = struct(*HEAD[:1], ("kind", ctypes.c_int), ("next", POINTER), ("metadata", POINTER))
Api = struct(*HEAD, ("version", Version), ("internal", POINTER), ("functions", POINTER * 18))
ErrorCreate = struct(*HEAD, ("message", ctypes.c_char_p), ("code", ctypes.c_int))
ErrorMessage = struct(*HEAD, ("error", POINTER), ("message", POINTER))
ErrorDestroy = struct(*HEAD, ("error", POINTER))
StreamGet = struct(*HEAD, ("context", POINTER), ("stream", POINTER))
DeviceGet = struct(*HEAD, ("context", POINTER), ("device", ctypes.c_int32))
ERROR_CREATE, ERROR_MESSAGE, ERROR_DESTROY, STREAM_GET, DEVICE_GET = 0, 1, 2, 4, 17
LAST_FIELD = {ErrorCreate: "code", ErrorMessage: "message", ErrorDestroy: "error", DeviceGet: "device"}


def struct_size(kind: Any) -> int:
    """Bytes up to the end of the last field, without the padding behind it."""
    name, field = kind._fields_[-1]
    return getattr(kind, name).offset + ctypes.sizeof(field)


_keep: list[Any] = []  # handlers remember a runtime's API by its address, as XLA's never goes away


class Runtime:
    """As much of XLA as calls a handler: one device, one stream."""

    def __init__(self, *, stream: int = 0x5770, device: int = 0) -> None:
        self.errors: list[tuple[str, int]] = []
        self.destroyed: list[int] = []
        self.fails = 0  # what the functions that give stream and device answer
        self.text = ctypes.create_string_buffer(b"no such thing")
        self._keep: list[Any] = []
        _keep.append(self)
        self.api = Api(ctypes.sizeof(Api), None, Version(24, None, 0, 7))

        def create(request: Any) -> int:
            self.errors.append((request.message.decode(), request.code))
            return 0xE0 + len(self.errors)

        def message(request: Any) -> None:
            assert request.error == self.fails
            request.message = ctypes.addressof(self.text)

        def destroy(request: Any) -> None:
            self.destroyed.append(request.error)

        def get_stream(request: Any) -> int:
            assert request.context == 0xC0
            request.stream = stream
            return self.fails

        def get_device(request: Any) -> int:
            assert request.context == 0xC0
            request.device = device
            return self.fails

        self._function(ERROR_CREATE, ErrorCreate, create)
        self._function(ERROR_MESSAGE, ErrorMessage, message)
        self._function(ERROR_DESTROY, ErrorDestroy, destroy)
        self._function(STREAM_GET, StreamGet, get_stream)
        self._function(DEVICE_GET, DeviceGet, get_device)

    def _function(self, index: int, kind: Any, body: Any) -> None:
        def checked(address: int) -> int:
            request = kind.from_address(address)
            assert request.struct_size == struct_size(kind)
            assert not request.extension
            return body(request) or 0

        function = ctypes.PYFUNCTYPE(POINTER, POINTER)(checked)
        self._keep.append(function)
        self.api.functions[index] = ctypes.cast(function, POINTER).value

    def call(self, handler: int, spec: bytes, arguments: list[int], results: list[int]) -> int | None:
        """The error that the handler returns."""
        text = ctypes.create_string_buffer(spec, len(spec))
        span = Span(ctypes.addressof(text), len(spec))
        attributes = (POINTER * 1)(ctypes.addressof(span))
        keep, lists = [], []
        for data in (arguments, results):
            buffers = [Buffer(struct_size(Buffer), None, 11, address, 0, None) for address in data]
            pointers = (POINTER * len(data))(*(ctypes.addressof(buffer) for buffer in buffers))
            keep += [buffers, pointers]
            lists.append(List(40, None, len(data), None, ctypes.addressof(pointers)))
        frame = CallFrame(
            struct_size(CallFrame),
            None,
            ctypes.addressof(self.api),
            0xC0,
            3,
            *lists,
            Attributes(48, None, 1, None, None, ctypes.addressof(attributes)),
        )
        return ctypes.CFUNCTYPE(POINTER, POINTER)(handler)(ctypes.addressof(frame))

    def metadata(self, handler: int, *, shows_api: bool = True, kind: int = 1) -> tuple[int, int, int]:
        """What a handler says of itself: version and traits."""
        answer = Metadata(struct_size(Metadata), Version(24, None, -1, -1), 99)
        extension = Extension(ctypes.sizeof(Extension), kind, None, ctypes.addressof(answer))
        api = ctypes.addressof(self.api) if shows_api else None
        empty = List(40, None, 0, None, None)
        attributes = Attributes(48, None, 0, None, None, None)
        frame = CallFrame(struct_size(CallFrame), ctypes.addressof(extension), api, None, 3, empty, empty, attributes)
        assert ctypes.CFUNCTYPE(POINTER, POINTER)(handler)(ctypes.addressof(frame)) is None
        return answer.version.major, answer.version.minor, answer.traits


# ---- handlers ------------------------------------------------------------------------------------------------------


def test_layout_of_the_frame():
    assert (ctypes.sizeof(CallFrame), CallFrame.arguments.offset, CallFrame.attributes.offset) == (168, 40, 120)
    assert ctypes.sizeof(Api) == 192


@pytest.mark.parametrize("on_gpu", [False, True])
def test_a_call_gets_what_xla_has(on_gpu):
    calls: list[Any] = []
    runtime = Runtime(stream=0x1234, device=5)
    handler = xla_ffi.handler(lambda *given: calls.append(given), on_gpu=on_gpu)
    for count in (0, 1, 9):
        arguments, results = [0x1000 + i for i in range(count)], [0x2000 + i for i in range(count + 1)]
        assert runtime.call(handler, b"all that is fixed", arguments, results) is None
        where = (5, 0x1234) if on_gpu else (None, 0)
        assert calls.pop() == (b"all that is fixed", arguments, results, *where)


def test_metadata():
    handler = xla_ffi.handler(lambda *_: None, on_gpu=True)
    assert Runtime().metadata(handler) == (0, 7, 0)
    assert Runtime().metadata(handler, shows_api=False) == (0, 1, 0)


@pytest.mark.parametrize(
    ("error", "code"),
    [(ValueError("q: got 3"), 3), (TypeError("x"), 3), (RuntimeError("µ"), 13), (KeyboardInterrupt(), 13)],
)
def test_an_exception_becomes_an_error(error, code):
    def fail(*_: Any) -> None:
        raise error

    runtime = Runtime()
    assert runtime.call(xla_ffi.handler(fail, on_gpu=True), b"", [], []) == 0xE1
    assert runtime.errors == [(f"{type(error).__name__}: {error}", code)]


def test_an_error_that_cannot_be_told():
    class Mute(Exception):
        def __str__(self):
            raise RuntimeError

    for error, text in ((Mute(), "Mute"), (ValueError("\ud800"), "ValueError: ?")):
        runtime = Runtime()

        def fail(*_, error=error):
            raise error

        assert runtime.call(xla_ffi.handler(fail, on_gpu=True), b"", [], []) == 0xE1
        assert runtime.errors[0][0] == text


def test_no_stream():
    runtime, calls = Runtime(), []
    runtime.fails = 0xBAD
    assert runtime.call(xla_ffi.handler(lambda *given: calls.append(given), on_gpu=True), b"", [], []) == 0xE1
    assert runtime.errors == [("RuntimeError: XLA gives no stream: no such thing", 13)]
    assert (runtime.destroyed, calls) == ([0xBAD], [])


# ---- launches on a pretended GPU -----------------------------------------------------------------------------------


@pytest.fixture
def fake(fake: FakeDriver, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeDriver]:
    forget()
    monkeypatch.setattr(xla_targets.arrays, "on_device", allocating)
    yield fake
    forget()


@contextlib.contextmanager
def allocating(device: int, stream: Any) -> Iterator[Any]:
    """In place of CuPy with that device and stream."""
    assert stream.device_id in (-1, device)
    allocate = functools.partial(gpu_array, device=device)
    yield SimpleNamespace(empty=allocate, zeros=allocate, int32=np.int32, uint32=np.uint32)


def forget() -> None:
    xla_targets._scratches.clear()
    for remembered in (xla_targets.prepare_plan, xla_targets.prepare_decode, xla_targets.prepare_append):
        remembered.cache_clear()


SCRATCH = ("partial_out", "partial_lse", "merge_counters", "merge_abandoned", "launches")


def decode_spec(plan: Any, layer: int | None = None, **changes: Any) -> bytes:
    pool = (12, 64, 1, 576) if layer is None else (3, 12, 64, 1, 576)
    names = ("batch", "seq_len_q", "num_heads", "num_kv_heads", "causal", "num_workers", "max_splits", "kernel")
    fixed = {
        "q": (3, 2, 128, 576),
        "kv_cache": pool,
        "layer": layer,
        "block_table": (3, 4),
        "dtype": "bfloat16",
        "softmax_scale": 0.125,
        "plan": {name: getattr(plan, name) for name in names},
    }
    return xla_targets.spec(**fixed | changes).encode()


@pytest.mark.parametrize("layer", [None, 2])
@pytest.mark.parametrize("device", [0, 1])
def test_decode_launches_what_an_eager_call_does(fake, layer, device):
    fake.current = None if device else 0  # XLA's threads need not have a context
    lengths = gpu_array((3,), int32, device=device)
    call = [gpu_array(*given, device=device) for given in (((3, 2, 128, 576), bfloat16), ((12, 64, 1, 576), bfloat16))]
    call += [gpu_array((3, 4), int32, device=device), lengths]
    options = {"softmax_scale": 0.125, "causal": True}
    fields = plans.plan_shape(3, device, *plans.check_plan_options(128, 2, 1, True, None, False, None))
    states = plans.scratch(fields["num_workers"], 1, fields["kernel"])
    memory = {name: gpu_array(shape, np.uint32, device=device) for name, shape in states.items()}
    memory |= {"work": gpu_array((133, 2), int32, device=device), "splits": gpu_array((3, 2), int32, device=device)}
    plan = plans.DecodePlan(**fields, device=device, **memory)
    out, lse = gpu_array((3, 2, 128, 512), bfloat16, device=device), gpu_array((3, 128, 2), np.float32, device=device)
    mla_decode(*call, plan=plan, out=out, lse=lse, **options)
    eager = fake.launches[-1]
    fake.launches.clear()

    q, pool, table = (array.data.ptr for array in call[:3])
    layer_bytes = 0 if layer is None else layer * 12 * 64 * 576 * 2
    xla_targets.DECODE.on_gpu(
        decode_spec(plan, layer),
        [q, pool - layer_bytes, table, lengths.data.ptr, plan.work.data.ptr, plan.splits.data.ptr],
        [out.data.ptr, lse.data.ptr],
        device,
        0x5770,
    )
    (launched,) = fake.launches
    assert (launched.stream, launched.device, launched.grid) == (0x5770, device, eager.grid)
    assert (launched.function, launched.leading, launched.overlaps_previous) == (eager.function, eager.leading, True)
    got, expected = launched.fields(params.DECODE_PARAMS), eager.fields(params.DECODE_PARAMS)
    assert {name for name in got if got[name] != expected[name]} == set(SCRATCH)
    own = xla_targets._scratch(device, 0x5770, plan.num_workers, 1, 256, plan.kernel)
    assert pack_addresses(*(got[name] for name in SCRATCH)) == own
    assert own != xla_targets._scratch(device, 0x5771, plan.num_workers, 1, 256, plan.kernel), "one for each stream"


def test_scratch_memory_is_for_plans_of_one_shape(fake):
    """Others leave in it what a launch neither writes nor clears (cuda/cells.cuh)."""
    shapes = [
        (stream, workers, kv_heads, rows, kernel)
        for stream in (0x5770, 0x5771)
        for workers in (132, 7)
        for kv_heads in (1, 2)
        for rows in (8, 16)
        for kernel in (KernelShape(16, 1, 1), KernelShape(32, 1, 1))
    ]
    found = {shape: xla_targets._scratch(0, *shape) for shape in shapes}
    assert len(set(found.values())) == len(shapes)
    for shape in reversed(shapes):
        assert xla_targets._scratch(0, *shape) == found[shape]
        made = xla_targets._scratches[0, *shape].arrays
        assert [array.shape for array in made] == list(plans.scratch(shape[1], shape[2], shape[4]).values())


def test_a_failed_launch_is_an_error(fake):
    plan = plan_decode(gpu_array((3,), int32), num_heads=128, seq_len_q=2)
    runtime = Runtime(stream=0x99)
    handler = xla_ffi.handler(xla_targets.DECODE.on_gpu, on_gpu=True)
    arguments, results = [256 * i for i in range(1, 7)], [0x8000, 0x9000]
    assert runtime.call(handler, decode_spec(plan), arguments, results) is None
    assert [launched.stream for launched in fake.launches[1:]] == [0x99]
    fake.status = 719
    assert runtime.call(handler, decode_spec(plan), arguments, results) == 0xE1
    assert runtime.errors == [("RuntimeError: kernel launch failed: CUDA_ERROR_719", 13)]


def test_plan_launches_what_an_eager_call_does(fake):
    lengths = gpu_array((3,), int32)
    plan = plan_decode(lengths, num_heads=16)
    (eager,) = fake.launches
    fake.launches.clear()
    spec = xla_targets.spec(batch=3, num_workers=plan.num_workers, max_splits=0).encode()
    addresses = [lengths.data.ptr], [plan.work.data.ptr, plan.splits.data.ptr]
    xla_targets.PLAN.on_gpu(spec, *addresses, 0, 0x5770)
    (launched,) = fake.launches
    assert (launched.record, launched.function, launched.stream) == (eager.record, eager.function, 0x5770)


def append_spec(layer: int | None, normalises: bool, rope_positions: int) -> bytes:
    return xla_targets.spec(
        kv_cache=(4, 16, 1, 576) if layer is None else (2, 4, 16, 1, 576),
        layer=layer,
        dtype="bfloat16",
        num_tokens=5,
        normalises=normalises,
        norm_eps=1e-5,
        rope_positions=rope_positions,
        rope_interleaved=False,
    ).encode()


@pytest.mark.parametrize("layer", [None, 1])
@pytest.mark.parametrize("normalises", [False, True])
@pytest.mark.parametrize("rotates", [False, True])
def test_append_on_either_side_writes_the_same_rows(fake, layer, normalises, rotates):
    """The launch's own parameters, run through the kernel built for the host, against the CPU's call."""
    rng = np.random.default_rng(0)
    pools = [np.zeros((4, 16, 1, 576) if layer is None else (2, 4, 16, 1, 576), bfloat16) for _ in range(3)]
    where = np.array([[3, -1, 63, 16, 64], [3, 0, 7, 1, 2]], np.int64)
    ckv, kpe = (rng.standard_normal((5, width)).astype(bfloat16) for width in (512, 64))
    weight = rng.standard_normal(512).astype(bfloat16)
    tables = [rng.standard_normal((8, 32)).astype(np.float32) for _ in range(2)]
    options = [weight] * normalises + tables * rotates
    spec = append_spec(layer, normalises, 8 if rotates else 0)
    inputs = [array.ctypes.data for array in (where, ckv, kpe, *options)]
    xla_targets.APPEND.on_cpu(spec, [pools[0].ctypes.data, *inputs], [pools[0].ctypes.data], None, 0)

    xla_targets.APPEND.on_gpu(spec, [pools[1].ctypes.data, *inputs], [pools[1].ctypes.data], 0, 0x5770)
    (launched,) = fake.launches
    assert launched.stream == 0x5770
    record = ctypes.create_string_buffer(launched.record, len(launched.record))
    arguments = (ctypes.c_void_p * 1)(ctypes.addressof(record))
    kernel_on_host("cache_write.bfloat16")(arguments, *launched.grid[:2], launched.block[0])

    cos, sin = tables if rotates else (None, None)
    transform = RowTransform(weight if normalises else None, 1e-5, cos, sin, False)
    write_rows(pools[2] if layer is None else pools[2][1], where, ckv, kpe, transform)
    assert pools[0].tobytes() == pools[2].tobytes()
    np.testing.assert_allclose(pools[1].astype(np.float32), pools[2].astype(np.float32), rtol=2**-7, atol=2e-6)
    assert pools[2].any()


def test_specs_say_all_and_are_text():
    plan = plans.DecodePlan(3, 1, 16, 1, False, 4, None, None, None, kernel=plans.dispatch.choose(16, 3, None))
    fixed = json.loads(decode_spec(plan))
    assert fixed["plan"]["kernel"] == [16, 1, 1]
    assert xla_targets._plan_of(fixed, 7).kernel == plan.kernel
    assert fixed["softmax_scale"] == 0.125


def test_driver_takes_addresses_in_the_order_of_the_struct():
    assert driver._DECODE_ADDRESSES[1] == "kv", "whose address the tensor map is made for"

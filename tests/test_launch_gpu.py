"""Prepared launches on the device: threads, contexts, streams. Needs a Hopper GPU."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from cases import Case, make_inputs

from mlacore import attention, launch, mla_decode, plan_decode

pytestmark = pytest.mark.gpu


@pytest.fixture
def cupy() -> Any:
    import cupy

    return cupy


class Call:
    """One batch with its own plan and buffers."""

    def __init__(self, seed: int, cupy: Any) -> None:
        self.inputs = make_inputs(Case(4, 1, 2000, 16, varlen=True, seed=seed), cupy)
        self.plan = plan_decode(self.inputs.cache_seqlens, num_heads=16)
        self.out = cupy.empty((4, 1, 16, 512), self.inputs.q.dtype)
        self.lse = cupy.empty((4, 16, 1), np.float32)

    def run(self, stream: Any = None) -> None:
        mla_decode(*self.inputs, plan=self.plan, out=self.out, lse=self.lse, stream=stream)

    def bits(self) -> tuple[bytes, bytes]:
        return self.out.get().tobytes(), self.lse.get().tobytes()

    def forget(self) -> None:
        self.lse.fill(np.nan)


def in_threads(*work: Callable[[], None]) -> None:
    """Each in a new thread, all at once; raises what one raised."""
    failures: list[BaseException] = []

    def guarded(task: Callable[[], None]) -> None:
        try:
            task()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=guarded, args=(task,)) for task in work]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]


@pytest.mark.parametrize("own_stream", [False, True])
def test_a_new_thread_launches(own_stream, cupy):
    """No context is current in it, for prepared launches and for first ones."""
    call = Call(0, cupy)
    call.run()
    expected = call.bits()
    stream = cupy.cuda.Stream(non_blocking=True) if own_stream else None
    for is_first in (False, True):
        call.forget()
        cupy.cuda.Device().synchronize()
        if is_first:
            attention._prepared.clear()
            call.plan = dataclasses.replace(call.plan)  # the same arrays, and no call yet
            launch.tensor_maps.cache_clear()
        in_threads(lambda: call.run(stream))
        cupy.cuda.Device().synchronize()
        assert call.bits() == expected


def test_threads_launch_at_once(cupy):
    calls = [Call(seed, cupy) for seed in range(4)]
    for call in calls:
        call.run()
    expected = [call.bits() for call in calls]
    assert len(set(expected)) == len(calls)
    streams = [cupy.cuda.Stream(non_blocking=True) for _ in calls]
    for call in calls:
        call.forget()
    cupy.cuda.Device().synchronize()

    def work(call: Call, stream: Any) -> None:
        for _ in range(200):
            call.plan.update(call.inputs.cache_seqlens, stream=stream)
            call.run(stream)

    in_threads(*(lambda c=call, s=stream: work(c, s) for call, stream in zip(calls, streams, strict=True)))
    cupy.cuda.Device().synchronize()
    assert [call.bits() for call in calls] == expected


def test_every_kind_of_stream(cupy):
    call = Call(0, cupy)
    call.run()
    expected = call.bits()
    stream = cupy.cuda.Stream(non_blocking=True)
    for given in (stream, stream.ptr, cupy.cuda.Stream.null, 0, 1, 2, None):
        call.forget()
        cupy.cuda.Device().synchronize()
        call.run(given)
        cupy.cuda.Device().synchronize()
        assert call.bits() == expected


def test_new_plans_and_pools_take_a_prepared_launch(cupy):
    """Only addresses differ: a second pool, lengths and plan, as the next layer and the next step bring."""
    first, second = Call(0, cupy), Call(0, cupy)
    pool = second.inputs.kv_cache.copy()
    pool[...] = 0
    second.inputs = second.inputs._replace(kv_cache=pool)
    attention._prepared.clear()
    first.run()
    second.run()
    assert len(attention._prepared) == 1
    assert (second.out.astype(np.float32) == 0).all()
    assert (first.out.astype(np.float32) != 0).any()

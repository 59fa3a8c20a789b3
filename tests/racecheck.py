"""What compute-sanitizer's racecheck reports of the decode kernels, and what of it is none.

racecheck does not follow barriers of a part of the block (256 of 384 threads here), which order these exchanges, and
not all waits for mbarriers. A report is a line "Race reported between A" and lines "and B". Now and then it knows no
name for a place that it names in another run, or no place at all: such reports are judged by the names of all runs so
far, and the run is to be repeated.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

ORDERED_BY_NAMED_BARRIERS = [
    {"publish_probabilities", "take_probabilities"},
    {"write_item"},
    {"exchange_products"},
    {"exchange_products", "write_final"},  # the same memory, once the last tile's products have been read
    {"merge_slice", "sum_of_parts"},
    {"next_abandoned"},
]
ORDERED_BY_MBARRIERS = [{"announce", "is_many"}]  # merge.ready
# What sets flags that others poll: merge.cuh's `standing`, and `items_done`, which orders nothing.
SETS_POLLED_FLAGS = {"st_release_shared", "st_relaxed_shared"}


class Names(dict[str, set[str]]):
    """Functions that runs have named, by offset in the kernel."""

    def of(self, function: str, offset: str) -> str:
        found = self.get(offset, set())
        return next(iter(found)) if not is_name(function) and len(found) == 1 else function


class Access(NamedTuple):
    is_write: bool
    function: str  # "" if unknown; the kernel's if racecheck knows no better
    offset: str


def is_name(function: str) -> bool:
    return bool(function) and not function.startswith("mla_decode")


def accesses_of(report: str) -> Iterator[Access]:
    for kind, place in re.findall(r"(Read|Write) access at (.*)", report):
        function, _, offset = re.sub(r"\[\d+ hazards\]", "", place).partition("+0x")
        while re.search(r"<[^<>]*>", function):
            function = re.sub(r"<[^<>]*>", "", function)  # template arguments
        yield Access(kind == "Write", function.split("(")[0].split("::")[-1].strip(), offset.split(" ")[0])


def unexpected(log: str, names: Names) -> list[str]:
    """The reports of a run that are none of the above; `names` learns from it."""
    assert "RACECHECK SUMMARY" in log, log[-3000:]
    reports = [(list(accesses_of(text)), text) for text in log.split("Race reported between")[1:]]
    for access in (access for accesses, _ in reports for access in accesses):
        if is_name(access.function):
            names.setdefault(access.offset, set()).add(access.function)
    found = []
    for accesses, text in reports:
        functions = {names.of(access.function, access.offset) for access in accesses}
        writers = {names.of(access.function, access.offset) for access in accesses if access.is_write}
        is_polled = bool(writers) and writers <= SETS_POLLED_FLAGS
        if functions not in [*ORDERED_BY_NAMED_BARRIERS, *ORDERED_BY_MBARRIERS] and not is_polled:
            found.append(f"{' and '.join(sorted(functions))}: {text[:1000]!r}")
    return found

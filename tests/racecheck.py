"""What compute-sanitizer's racecheck reports of the decode kernels, and what of it is none.

racecheck does not follow barriers of a part of the block (256 of 384 threads here), which order these exchanges, and
not all waits for mbarriers. A report is a line "Race reported between A" and lines "and B", whose places have an offset
into the kernel and often no name: functions come from nvdisasm. Now and then there is no place at all: run it again.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

ORDERED_BY_NAMED_BARRIERS = [
    {"publish_probabilities", "take_probabilities"},
    {"write_item"},
    {"exchange_products"},
    {"exchange_products", "write_final"},  # the same memory, once the last tile's products have been read
    {"merge_slice", "sum_of_parts"},
    {"next_abandoned"},
]
# By merge.ready: who shares the items; what others then set and poll.
ORDERED_BY_MBARRIERS = [{"announce", "is_many"}, {"announce", "ld_acquire_shared"}, {"announce", "st_relaxed_shared"}]
# What sets flags that others poll: merge.cuh's `standing`, and `items_done`, which orders nothing.
SETS_POLLED_FLAGS = {"st_release_shared", "st_relaxed_shared"}

DEFINITION = re.compile(r"\s*(?:extern|template<.*>|__device__|__global__|MLA_SCHEDULE_FUNCTION)\b[^(=]*?(\w+)\(")


class Access(NamedTuple):
    is_write: bool
    offset: int | None  # bytes into the kernel


def functions_of_source(text: str) -> list[str]:
    """For each line of a CUDA source, the device function it stands in ("" before the first)."""
    names = [""]
    for line in text.splitlines():
        head = DEFINITION.match(line)
        names.append(head[1] if head else names[-1])
    return names[1:]


def functions_of_kernel(disassembly: str, sources: Path) -> dict[int, str]:
    """The function behind each instruction on shared memory, by offset: of ``nvdisasm -c --print-line-info-inline``."""
    by_file: dict[str, list[str]] = {}
    place, found = "", {}
    is_first = True  # of the lines that tell a place: the innermost function
    for line in disassembly.splitlines():
        if told := re.match(r'\s*//## File "(?:[^"]*/)?([^"/]+)", line (\d+)', line):
            if is_first:
                file, number = told[1], int(told[2])
                if file not in by_file:
                    by_file[file] = functions_of_source((sources / file).read_text())
                place = by_file[file][number - 1] if number <= len(by_file[file]) else ""
            is_first = False
        elif told := re.match(r"\s*/\*([0-9a-f]+)\*/(.*)", line):
            is_first = True
            if re.search(r"\b(LDSM?|STSM?|ATOMS|REDS)\b", told[2]):
                found[int(told[1], 16)] = place
    return found


def accesses_of(report: str) -> Iterator[Access]:
    for kind, place in re.findall(r"(Read|Write) access at (.*)", report):
        offset = re.search(r"\+0x([0-9a-f]+)", place)
        yield Access(kind == "Write", int(offset[1], 16) if offset else None)


def is_ordered(accesses: Sequence[Access], functions: dict[int, str]) -> bool:
    """Whether these accesses, if they are this kernel's, are known to be ordered."""
    if any(access.offset not in functions for access in accesses):
        return False
    writers = {functions[access.offset] for access in accesses if access.is_write}
    both = {functions[access.offset] for access in accesses}
    is_polled = bool(writers) and writers <= SETS_POLLED_FLAGS
    return is_polled or both in [*ORDERED_BY_NAMED_BARRIERS, *ORDERED_BY_MBARRIERS]


def unexpected(log: str, kernels: dict[str, dict[int, str]]) -> tuple[list[str], list[str]]:
    """Reports of a run that are none of the above, and those without a place.

    `kernels` has `functions_of_kernel` for each variant that ran. Reports tell a kernel's name at best; hardly two
    variants of one have instructions on shared memory at all the offsets of a report.
    """
    assert "RACECHECK SUMMARY" in log, log[-3000:]
    found, placeless = [], []
    for text in log.split("Race reported between")[1:]:
        accesses = list(accesses_of(text))
        named = re.search(r"access at (mla_decode\w*)\+0x", text)
        possible = {name: it for name, it in kernels.items() if not named or name.split(".")[0] == named[1]}
        if len(accesses) < 2 or any(access.offset is None for access in accesses):
            placeless.append(text[:1000])
        elif not any(is_ordered(accesses, functions) for functions in possible.values()):
            names = [
                f"{name}: {[functions[access.offset] for access in accesses]}"
                for name, functions in possible.items()
                if all(access.offset in functions for access in accesses)
            ]
            found.append(f"{'; '.join(names)}: {text[:1000]!r}")
    return found, placeless

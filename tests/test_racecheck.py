"""How reports of compute-sanitizer's racecheck are judged; tests/test_decode_gpu.py makes them."""

from __future__ import annotations

import re

import pytest
from racecheck import functions_of_kernel, functions_of_source, unexpected

from mlacore import jit

HEAD = "========= Error: Race reported between "
TAIL = "=========\n========= RACECHECK SUMMARY: some hazards displayed\n"
FUNCTIONS = {
    0xB380: "write_item",
    0xB400: "write_item",
    0x2B50: "take_probabilities",
    0x9B30: "publish_probabilities",
    0x9980: "ld_acquire_shared",
    0x20B50: "st_release_shared",
    0x500: "start_out",
}
OTHER = {0xB380: "exchange_products", 0x880: "exchange_products", 0x890: "load_kv"}
KERNELS = {"mla_decode_sm90.rows64": FUNCTIONS, "mla_decode_swapped_sm90.rows16": OTHER}


def log_of(*reports: tuple[str, ...]) -> str:
    return "".join(HEAD + "\n=========     and ".join(lines) + " [64 hazards]\n" for lines in reports) + TAIL


SUMS = (
    "Write access at Consumer::write_item(const Item &, unsigned int)+0xb380 in mla_decode_sm90.cu:355",
    "Read access at Consumer::write_item(const Item &, unsigned int)+0xb400 in mla_decode_sm90.cu:361",
)
UNNAMED_SUMS = ("Write access at mla_decode_sm90+0xb380", "Read access at mla_decode_sm90+0xb400")
PROBABILITIES = ("Write access at mla_decode_sm90+0x9b30", "Read access at take_probabilities()+0x2b50")
FLAGS = (
    "Read access at mla_decode_sm90+0x9980",
    "Write access at st_release_shared(unsigned int, unsigned int)+0x20b50 in ptx.cuh:156",
)
OTHERS_PRODUCTS = ("Write access at mla_decode_swapped_sm90+0xb380", "Read access at exchange_products()+0x880")


def test_known_exchanges_and_polled_flags_pass() -> None:
    assert unexpected(log_of(), KERNELS) == ([], [])
    log = log_of(SUMS, FLAGS, UNNAMED_SUMS, PROBABILITIES, OTHERS_PRODUCTS)
    assert unexpected(log, KERNELS) == ([], [])


@pytest.mark.parametrize(
    "accesses",
    [
        ("Write access at mla_decode_sm90+0xb380", "Read access at mla_decode_sm90+0x2b50"),  # two exchanges
        ("Write access at start_out()+0x500", "Read access at ld_acquire_shared(unsigned int)+0x9980"),
        ("Write access at mla_decode_sm90+0xb380", "Read access at mla_decode_sm90+0xb410"),  # no such instruction
        ("Write access at mla_decode_swapped_sm90+0xb380", "Read access at mla_decode_swapped_sm90+0x890"),
        ("Write access at take_probabilities()+0x2b50", "Read access at exchange_products()+0x880"),  # of two kernels
        # Known of the other kernel:
        ("Write access at mla_decode_sm90+0xb380", "Read access at exchange_products()+0x880"),
        (FLAGS[1], "Write access at Consumer::write_item()+0xb380"),
    ],
)
def test_anything_else_is_told(accesses: tuple[str, str]) -> None:
    found, placeless = unexpected(log_of(SUMS, accesses, FLAGS), KERNELS)
    assert len(found) == 1
    assert placeless == []


def test_reports_without_a_place_are_told_apart() -> None:
    found, placeless = unexpected(log_of(SUMS, ("Read access at ", "Write access at "), ("",)), KERNELS)
    assert found == []
    assert len(placeless) == 2


def test_functions_are_found_by_line() -> None:
    sources = {path.name: functions_of_source(path.read_text()) for path in jit.source_dir().glob("*.cu*")}
    assert {"publish_probabilities", "take_probabilities", "write_item"} <= set(sources["mla_decode_sm90.cu"])
    assert {"exchange_products", "write_final"} <= set(sources["mla_decode_swapped_sm90.cu"])
    assert {"announce", "is_many", "merge_slice", "sum_of_parts", "next_abandoned"} <= set(sources["merge.cuh"])
    assert {"st_release_shared", "st_relaxed_shared"} <= set(sources["ptx.cuh"])


def test_disassembly_gives_the_innermost_function_of_shared_accesses() -> None:
    path = jit.source_dir() / "mla_decode_sm90.cu"
    lines = path.read_text().splitlines()

    def line_of(pattern: str) -> int:
        return next(i for i, line in enumerate(lines, 1) if re.search(pattern, line))

    inner, outer = line_of(r"sums\[group\]\[row"), line_of(r"^\s*consumer\.write_item|write_item\(item")
    disassembly = f"""
\t//## File "/elsewhere/{path.name}", line {inner} inlined at "/elsewhere/{path.name}", line {outer}
\t//## File "/elsewhere/{path.name}", line {outer}
        /*b350*/                   IMAD.SHL.U32 R14, R6, 0x4, RZ ;
        /*b360*/              @!P2 STS [R17+0x38200], R18 ;
.L_x_424:
\t//## File "/elsewhere/{path.name}", line {line_of(r"= sums.0.")}
        /*1b3a0*/                  LDS.128 R10, [R14+0x38300] ;
        /*1b3b0*/                  LDGSTS.E [R14+0x38300], [R2] ;
"""
    assert functions_of_kernel(disassembly, jit.source_dir()) == {0xB360: "write_item", 0x1B3A0: "write_item"}

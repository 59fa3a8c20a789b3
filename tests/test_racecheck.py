"""How reports of compute-sanitizer's racecheck are judged; tests/test_decode_gpu.py makes them."""

from __future__ import annotations

from racecheck import Names, unexpected

HEAD = "========= Error: Race reported between "
TAIL = "=========\n========= RACECHECK SUMMARY: some hazards displayed\n"


def log_of(*reports: tuple[str, ...]) -> str:
    return "".join(HEAD + "\n=========     and ".join(lines) + " [64 hazards]\n" for lines in reports) + TAIL


SUMS = (
    "Write access at Consumer::write_item(const Item &, unsigned int)+0xb380 in mla_decode_sm90.cu:355",
    "Read access at Consumer::write_item(const Item &, unsigned int)+0xb400 in mla_decode_sm90.cu:361",
)
UNNAMED_SUMS = ("Write access at mla_decode_sm90+0xb380", "Read access at mla_decode_sm90+0xb400")
FLAGS = (
    "Read access at mla_decode_sm90+0x19900",
    "Write access at st_release_shared(unsigned int, unsigned int)+0x20b50 in ptx.cuh:156",
)


def test_known_exchanges_and_polled_flags_pass() -> None:
    assert unexpected(log_of(), Names()) == []
    assert unexpected(log_of(SUMS, FLAGS), Names()) == []
    merge = "SplitMerge<Bf16, HeadsOnN<(unsigned int)16>, 256, 5>::next_abandoned(const SplitGroup &, int) const"
    assert unexpected(log_of((f"Write access at {merge}+0x10", f"Read access at {merge}+0x20 in x:1")), Names()) == []


def test_names_that_one_run_lacks_come_from_another() -> None:
    names = Names()
    [report] = unexpected(log_of(UNNAMED_SUMS), names)
    assert report.startswith("mla_decode_sm90: ")
    assert unexpected(log_of(SUMS), names) == []
    assert unexpected(log_of(UNNAMED_SUMS), names) == []


def test_anything_else_is_told() -> None:
    names = Names()
    assert unexpected(log_of(SUMS), names) == []
    for accesses in (
        ("Write access at Consumer::write_item()+0xb380", "Read access at load_kv()+0x80"),
        ("Write access at Consumer::start_out()+0x80", "Read access at ld_acquire_shared(unsigned int)+0x90"),
        ("Write access at mla_decode_sm90+0xb380", "Read access at mla_decode_sm90+0xb410"),
        (FLAGS[1], "Write access at Consumer::write_item()+0xb380"),
        ("Read access at ", "Write access at "),
    ):
        assert len(unexpected(log_of(SUMS, accesses, FLAGS), names)) == 1, accesses

"""What bench/cache.py publishes, and that its host part measures."""

from __future__ import annotations

import json

import pytest

from bench import cache as bench

RESULT = {
    "date": "2026-01-02",
    "device": "NVIDIA H100",
    "rows": [bench.row("GPU", "write, 128 tokens", 2.345, "µs", "1.10×"), bench.row("host", "x", 12345.6, "K pages/s")],
}


def test_table():
    assert bench.table(RESULT).splitlines() == [
        "**NVIDIA H100**, 2026-01-02.",
        "",
        "| where | what | measured | |",
        "|---|---|---:|---|",
        "| GPU | write, 128 tokens | 2.35 µs | 1.10× |",
        "| host | x | 12,346 K pages/s |  |",
    ]


def test_section_is_replaced_and_nothing_else(tmp_path):
    begin, end = bench.MARKERS
    path = tmp_path / "README.md"
    path.write_text(f"before\n{begin}old\n{end}\nbehind\n")
    bench.write_readme(path, RESULT)
    bench.write_readme(path, RESULT)
    assert path.read_text() == f"before\n{begin}{bench.table(RESULT)}\n{end}\nbehind\n"
    path.write_text("no section")
    with pytest.raises(SystemExit, match="expected one section"):
        bench.write_readme(path, RESULT)


def test_newest_prefers_a_gpu(tmp_path):
    with pytest.raises(SystemExit, match=r"run python -m bench\.cache first"):
        bench.newest(tmp_path)
    on_cpu = RESULT | {"date": "2026-09-09", "device": "CPU", "rows": RESULT["rows"][1:]}
    for name, result in (("a.json", on_cpu), ("b.json", RESULT)):
        (tmp_path / name).write_text(json.dumps(result))
    assert bench.newest(tmp_path) == RESULT


def test_host_part_measures():
    rows = bench.host_rows()
    assert all(row["value"] > 0 and row["where"] == "host" for row in rows)
    assert any("K pages/s" in row["text"] for row in rows)


def test_readme_shows_the_newest_result():
    section = bench.table(bench.newest(bench.RESULTS))
    assert f"{bench.MARKERS[0]}{section}\n{bench.MARKERS[1]}" in (bench.ROOT / "README.md").read_text()

"""What the benches publish, from a made-up result; the parts of the benches that need no GPU."""

from __future__ import annotations

import copy
import json
import lzma
import sys
import types
from pathlib import Path

import pytest
from cases import PERF

from bench import ceilings, peers, plot, table, timing

README = """# title

<!-- bench:headline -->
old
<!-- /bench:headline -->

text

<!-- bench:full -->
<!-- /bench:full -->
"""


def timing_of(us: float) -> dict:
    return {"us": us, "low_us": us * 0.99, "high_us": us * 1.02, "replays": 20}


def row(kind: str, batch: int, num_heads: int, seq_len_k: int, us: float, floor_us: float, **peer_us: float) -> dict:
    return {
        "kind": kind,
        "batch": batch,
        "seq_len_q": 1,
        "num_heads": num_heads,
        "seq_len_k": seq_len_k,
        "varlen": kind != "latency",
        "flops": 2e11,
        "bytes": 6e8,
        "floor_us": floor_us,
        "mlacore": timing_of(us),
        "peers": {name: timing_of(value) for name, value in peer_us.items()},
    }


@pytest.fixture
def result() -> dict:
    return {
        "schema": 1,
        "when": "2026-03-04T05:06:07+00:00",
        "gpu": {"name": "NVIDIA H100 80GB HBM3", "slug": "nvidia-h100-80gb-hbm3", "driver": "580.1"},
        "ceilings": {"read_gbs": 3071.0, "gemm_tflops": 754.0, "gemm_label": "torch 8192³ bfloat16"},
        "rows": [
            row("compute", 128, 128, 4096, 400.0, 200.0, FlashMLA=320.0, FA3=360.0),
            row("latency", 1, 16, 1000, 12.5, 3.1, FA3=12.5),
            row("latency", 1, 128, 4096, 10.0, 4.0),
        ],
    }


def test_cells_hold_rates_share_and_ratios(result):
    first, second, third = (table.cells(row, ["FlashMLA", "FA3"]) for row in result["rows"])
    assert first == [
        "compute",
        "b=128 s_q=1 h=128 4K var",
        "400.0",
        "3.0%",
        "500",  # 2e11 FLOP in 400 µs
        "1500",  # 6e8 bytes in 400 µs
        "50%",
        "320.0 (0.80)",  # the peer takes 0.8 of our time: it is ahead, and the table says so
        "360.0 (0.90)",
    ]
    assert second[1:3] + second[-2:] == ["b=1 s_q=1 h=16 1000", "12.5", "–", "12.5 (1.00)"]
    assert third[-2:] == ["–", "–"]


def test_plain_table_has_a_line_a_row_and_straight_columns(result):
    lines = table.plain(result).splitlines()
    assert len(lines) == 1 + len(result["rows"])
    assert len({line.index("b=") for line in lines[1:]}) == 1
    assert "FlashMLA µs (×)" in lines[0]


def test_rewrite_replaces_what_is_between_the_markers_and_only_that(result):
    text = table.rewrite(README, [result])
    assert "old" not in text
    assert text.startswith("# title\n\n<!-- bench:headline -->\n**NVIDIA H100 80GB HBM3**, driver 580.1, 2026-03-04")
    assert "\n\ntext\n\n" in text
    headline, full = text.split("text")
    assert "4K" in headline
    assert "1000" not in headline  # not a headline row
    assert "h=16 1000" in full
    assert table.rewrite(text, [result]) == text
    pipes = {line.count("|") for line in full.splitlines() if line.startswith("|")}
    assert len(pipes) == 1


def test_rewrite_says_when_nothing_is_measured():
    assert table.rewrite(README, []).count("Not measured yet") == 2


def test_rewrite_shows_the_plots_that_exist(result):
    assert "![" not in table.rewrite(README, [result], [Path("bench/results/other.png")])
    assert "(bench/results/nvidia-h100-80gb-hbm3.png)" in table.rewrite(
        README, [result], [Path("bench/results/nvidia-h100-80gb-hbm3.png")]
    )


@pytest.mark.parametrize("name", ["headline", "full"])
def test_rewrite_refuses_a_text_without_markers(result, name):
    with pytest.raises(ValueError, match=f"bench:{name}"):
        table.rewrite(README.replace(f"<!-- bench:{name} -->", ""), [result])


def test_an_unmeasured_gemm_is_said_to_be_so(result):
    result["ceilings"] |= {"gemm_tflops": None, "gemm_label": "not measured: no cuBLAS"}
    assert "not measured" in table.hardware_line(result)


def test_newest_result_of_each_gpu_wins(result, tmp_path):
    later, other = copy.deepcopy(result), copy.deepcopy(result)
    later["when"] = "2026-03-05T00:00:00+00:00"
    other["gpu"]["name"] = "NVIDIA A-later-name"
    for name, one in (("a", later), ("b", result), ("c", other)):
        (tmp_path / f"{name}.json").write_text(json.dumps(one))
    assert table.newest_results(tmp_path) == [other, later]


def test_main_rewrites_the_readme(result, tmp_path, capsys):
    readme = tmp_path / "README.md"
    readme.write_text(README)
    (tmp_path / "one.json").write_text(json.dumps(result))
    assert table.main(["--results", str(tmp_path), "--readme", str(readme)]) == 0
    assert "500" in readme.read_text()
    assert "1 GPU(s), rewritten" in capsys.readouterr().out


def test_headline_rows_are_measured_cases():
    measured = {(case.kind, case.batch, case.seq_len_q, case.num_heads, case.seq_len_k) for case in PERF}
    assert set(table.HEADLINE) <= measured


def test_plot_is_a_png_with_every_bar(result, tmp_path):
    pytest.importorskip("matplotlib", reason="needs the bench extra")
    path = tmp_path / "plot.png"
    plot.draw(result, path)
    data = path.read_bytes()
    assert data.startswith(b"\x89PNG")
    assert len(data) > 10_000


def test_plot_command_writes_one_file_a_gpu(result, tmp_path):
    pytest.importorskip("matplotlib", reason="needs the bench extra")
    (tmp_path / "one.json").write_text(json.dumps(result))
    assert plot.main(["--results", str(tmp_path)]) == 0
    assert [path.name for path in tmp_path.glob("*.png")] == ["nvidia-h100-80gb-hbm3.png"]


def test_load_only_kernel_compiles_and_takes_the_shared_memory_we_pass():
    nvrtc = pytest.importorskip("cuda.bindings.nvrtc", reason="needs the cu13 extra")
    source = Path(ceilings.__file__).with_name("load_only.cu").read_text()
    source += f'\nstatic_assert(sizeof(SharedPlan) == {ceilings.LOAD_ONLY_SHARED_BYTES}, "as the host passes");\n'
    _, program = nvrtc.nvrtcCreateProgram(source.encode(), b"load_only.cu", 0, None, None)
    options = [b"-arch=sm_90", b"-std=c++17"]
    (status,) = nvrtc.nvrtcCompileProgram(program, len(options), options)
    _, size = nvrtc.nvrtcGetProgramLogSize(program)
    log = bytes(size)
    nvrtc.nvrtcGetProgramLog(program, log)
    assert int(status) == 0, log.decode()


def test_peers_are_unpacked_and_absent_ones_explained(tmp_path):
    (tmp_path / "one.so.xz").write_bytes(lzma.compress(b"library"))
    unpacked = peers._find(tmp_path, "one.so")
    assert unpacked is not None
    assert unpacked.read_bytes() == b"library"
    assert peers._find(tmp_path, "other.so") is None
    found = peers.Peers(tmp_path)
    assert found.found == []
    assert set(found.missing) == {"FlashMLA", "FA3"}


def test_graphs_take_turns(monkeypatch):
    clock = {"ms": 0.0}
    order: list[str] = []

    class Event:
        def record(self, stream):
            self.at = clock["ms"]

        def synchronize(self):
            pass

    cuda = types.SimpleNamespace(Event=Event, get_elapsed_time=lambda start, end: end.at - start.at)
    monkeypatch.setitem(sys.modules, "cupy", types.SimpleNamespace(cuda=cuda))

    def graph(name: str, ms: float):
        def replay() -> None:
            order.append(name)
            clock["ms"] += ms

        return replay

    budget = timing.Budget(rounds=2, seconds=0, min_replays=3, max_replays=5, warmup=1)
    stream = types.SimpleNamespace(synchronize=lambda: None)
    measured = timing.time_in_turns({"ours": graph("ours", 1.0), "theirs": graph("theirs", 3.0)}, 10, stream, budget)
    assert order == (["ours"] * 4 + ["theirs"] * 4) * 2  # one to warm up, three that count
    assert measured["ours"] == timing.Timing(100.0, 100.0, 100.0, 6)
    assert measured["theirs"].us == pytest.approx(300.0)

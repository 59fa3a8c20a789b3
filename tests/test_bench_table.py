"""What the benches publish, from a made-up result; figures, tables, README and plot."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path

import pytest
from cases import PERF

from bench import figures, plot, table

README = """# title

<!-- bench:headline -->
old
<!-- /bench:headline -->

text

<!-- bench:full -->
<!-- /bench:full -->
"""


def timing_of(us: float, **more: float) -> dict:
    return {"us": us, "low_us": us * 0.99, "high_us": us * 1.02, "replays": 20} | more


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
def bare_result() -> dict:
    """Without NVML, and nothing but the cases."""
    return {
        "schema": figures.SCHEMA,
        "when": "2026-03-04T05:06:07+00:00",
        "gpu": {"name": "NVIDIA H100 80GB HBM3", "slug": "nvidia-h100-80gb-hbm3", "driver": "580.1"},
        "ceilings": {"read_gbs": 3071.0, "gemm_tflops": 754.0, "gemm_label": "torch 8192³ bfloat16"},
        "rows": [
            row("compute", 128, 128, 4096, 400.0, 200.0, FlashMLA=320.0, FA3=360.0),
            row("latency", 1, 16, 1000, 12.5, 3.1, FA3=12.5),
            row("latency", 1, 128, 4096, 10.0, 4.0),
        ],
    }


@pytest.fixture
def result(bare_result) -> dict:
    """The same with all that is measured by default."""
    new = copy.deepcopy(bare_result)
    new["gpu"] |= {"num_sms": 132}
    new["ceilings"] |= {"gemm_burst_tflops": 798.0, "gemm_sm_mhz": 1500.0, "gemm_watts": 699.6}
    for one, tiles in zip(new["rows"], (20_000, 16, 128), strict=True):
        one |= {"tiles": tiles, "dtype": "bfloat16", "shortest": None}
        one["mlacore"] |= {"sm_mhz": 1700.0, "watts": 650.4}
    new["host"] = [
        {"batch": 1024, "num_heads": 16, "eager_us": 11.26, "graph_us": 1.04, "update_us": 8.0, "plan_us": 2.96}
    ]
    new["routes"] = [{"route": "CuPy arrays", "us": 5.12}, {"route": "in jax.jit", "us": 11.98}]
    return new


@pytest.fixture
def both(result) -> list[dict]:
    """Two GPUs."""
    other = copy.deepcopy(result)
    other["gpu"] |= {"name": "NVIDIA H200", "slug": "nvidia-h200"}
    other["rows"][0]["mlacore"]["us"] = 250.0
    return [result, other]


# ---- figures -------------------------------------------------------------------------------------------------------


def test_label_names_what_sets_a_case_apart(result):
    one = result["rows"][0]
    assert figures.label(one) == "b=128 s_q=1 h=128 4K var"
    assert figures.label(one | {"seq_len_k": 1 << 20, "varlen": False}) == "b=128 s_q=1 h=128 1M"
    mixed = one | {"seq_len_k": 100_000, "shortest": 100, "varlen": False, "dtype": "float16"}
    assert figures.label(mixed) == "b=128 s_q=1 h=128 100..100000 fp16"


def test_labels_tell_the_cases_apart():
    rows = [
        {
            "kind": case.kind,
            "batch": case.batch,
            "seq_len_q": case.seq_len_q,
            "num_heads": case.num_heads,
            "seq_len_k": case.seq_len_k,
            "varlen": case.varlen,
            "dtype": case.dtype,
            "shortest": case.shortest,
        }
        for case in PERF
    ]
    assert len({(one["kind"], figures.label(one)) for one in rows}) == len(PERF)


def test_cycles_a_tile(result):
    many, few, _ = result["rows"]
    # 400 µs at 1700 MHz are 680,000 cycles on each of 132 SMs, for 20,000 tiles.
    assert figures.tile_cycles(many, 132) == pytest.approx(680_000 * 132 / 20_000)
    assert figures.tile_cycles(few, 132) is None  # 16 rows: most of a tile would be padding
    many["mlacore"]["sm_mhz"] = None
    assert figures.tile_cycles(many, 132) is None


@pytest.fixture
def weighed(result) -> dict:
    """With the energy of its first row."""
    result["ceilings"] |= {"rest_watts": 100.0, "limit_watts": 700.0}
    result["ceilings"]["gemm_energy"] = {"us": 1000.0, "watts": 700.0, "millijoules": 700.0, "flops": 1e12}
    names = {"mlacore": (400.0, 260.0), "FA3": (450.0, 325.0), "load only": (200.0, 80.0)}
    result["rows"][0]["energy"] = {
        name: {"us": us, "watts": mj / us * 1e3, "millijoules": mj} for name, (us, mj) in names.items()
    }
    return result


def test_time_at_the_power_limit(weighed):
    # Above 100 W, 1e12 FLOP take 600 mJ, so 2e11 take 120; the loads take 60; the limit leaves 600 W.
    assert figures.energy_us(weighed["rows"][0], weighed["ceilings"]) == pytest.approx(300.0)
    assert figures.energy_us(weighed["rows"][1], weighed["ceilings"]) is None
    assert figures.energy_us(weighed["rows"][0], weighed["ceilings"] | {"rest_watts": None}) is None


def test_lead_is_over_the_better_peer(result):
    first, second, third = result["rows"]
    assert (figures.better_peer(first), figures.lead(first)) == ("FlashMLA", 0.8)
    assert (figures.better_peer(second), figures.lead(second)) == ("FA3", 1.0)
    assert (figures.better_peer(third), figures.lead(third)) == (None, None)


def test_summary_has_geometric_means_and_the_worst_case():
    rows = [
        row("compute", 128, 128, 4096, 100.0, 50.0, A=100.0, B=120.0),
        row("compute", 128, 128, 16384, 100.0, 98.0, A=400.0, B=401.0),
        row("tp", 128, 64, 16384, 100.0, 90.0, A=200.0),
        row("tp", 128, 16, 16384, 100.0, 20.0),
        row("few", 128, 8, 4096, 10.0, 9.0),
    ]
    groups = {one.group: one for one in figures.summarise(rows)}
    assert list(groups) == [
        "compute",
        "tp",
        "few",
        figures.MANY_ROWS,
        f"{figures.MANY_ROWS}, below 16K",
        f"{figures.MANY_ROWS}, from 16K",
        "few, below 16K",
    ]
    compute, tp, few, many, below, above = (groups[name] for name in list(groups)[:6])
    assert compute.count == 2
    assert (compute.lead.mean, compute.lead.worst) == (pytest.approx(2.0), 1.0)  # of 1 and 4
    assert compute.lead.where == figures.label(rows[0])
    assert compute.share.mean == pytest.approx(math.sqrt(0.5 * 0.98))
    assert tp.lead.mean == pytest.approx(2.0)  # of the one case with a peer
    assert (tp.share.worst, tp.share.where) == (0.2, figures.label(rows[3]))
    assert few.lead is None
    assert many.lead.mean == pytest.approx(2.0)  # of 1, 4 and 2: not of the 16 heads
    assert (many.count, below.count, above.count) == (3, 1, 2)


# ---- tables --------------------------------------------------------------------------------------------------------


def test_full_table_holds_rates_share_cycles_and_ratios(result):
    titles, first, second, third = table.full_lines(result)
    assert titles[7:] == ["cycles a tile", "MHz", "W", "FlashMLA µs (×)", "FA3 µs (×)"]
    assert first == [
        "compute",
        "b=128 s_q=1 h=128 4K var",
        "400.0",
        "3.0%",
        "500",  # 2e11 FLOP in 400 µs
        "1500",  # 6e8 bytes in 400 µs
        "50%",
        "4488 (48%)",  # 2176 would be the tensor pipe's own time
        "1700",
        "650",
        "320.0 (0.80)",  # the peer takes 0.8 of our time: it is ahead, and the table says so
        "360.0 (0.90)",
    ]
    assert second[1:3] + second[7:8] + second[-2:] == ["b=1 s_q=1 h=16 1000", "12.5", "–", "–", "12.5 (1.00)"]
    assert third[-2:] == ["–", "–"]


def test_energy_table(weighed, bare_result):
    assert table.energy_lines(weighed) == [
        ["case", "µs", "W", "mJ", "FA3 mJ (×)", "product + loads, µs at the limit"],
        ["b=128 s_q=1 h=128 4K var", "400.0", "650", "260", "325 (1.25)", "300.0"],
    ]
    assert "power at rest 100 W, limit 700 W" in table.rewrite(README, [weighed])
    assert "325 (1.25)" in table.plain(weighed)
    assert "Energy of a call" not in table.rewrite(README, [bare_result])


def test_batch_invariant_time_stands_beside_ours(result):
    result["rows"][1]["batch_invariant"] = timing_of(15.0)
    result["rows"][2]["batch_invariant"] = None  # not timed
    titles, *rows = table.full_lines(result)
    column = titles.index("batch-invariant µs (÷)")
    assert [row[column] for row in rows] == ["–", "15.0 (1.20)", "–"]


def test_columns_without_a_figure_are_left_out(bare_result):
    titles = table.full_lines(bare_result)[0]
    assert titles[6:] == ["share of floor", "FlashMLA µs (×)", "FA3 µs (×)"]


def test_plain_text_has_straight_columns_and_every_part(result):
    cases, summary, host, routes = table.plain(result).split("\n\n")
    lines = cases.splitlines()
    assert len(lines) == 1 + len(result["rows"])
    assert len({line.index("b=") for line in lines[1:]}) == 1
    assert "FlashMLA µs (×)" in lines[0]
    assert "0.80 at b=128" in summary
    assert host.split()[-6:] == ["16", "1024", "11.3", "1.0", "8.0", "3.0"]
    assert routes.splitlines() == ["one call     host", "CuPy arrays  5.1 ", "in jax.jit   12.0"]


def test_plain_text_of_no_rows_is_a_line_of_titles(result):
    assert table.plain(result | {"rows": [], "host": [], "routes": []}).startswith("kind")


def test_routes_are_published_where_they_were_measured(result, bare_result):
    parts = table.full(result, None)
    at = parts.index("One call by each route, µs:")
    assert parts[at + 1].splitlines()[2:] == ["| CuPy arrays | 5.1 |", "| in jax.jit | 12.0 |"]
    assert "One call by each route, µs:" not in table.full(bare_result, None)


def test_headline_sets_the_gpus_side_by_side(both):
    titles, first, second = table.headline_lines(both)
    assert titles[2:] == [
        f"{name} {what}" for name in ("H100", "H200") for what in ("µs", "of floor", "better peer (×)")
    ]
    assert first[2:] == ["400.0", "50%", "FlashMLA 320.0 (0.80)", "250.0", "80%", "FlashMLA 320.0 (1.28)"]
    assert second[1:] == ["b=1 s_q=1 h=128 4K", *["10.0", "40%", "–"] * 2]
    both[1]["rows"] = both[1]["rows"][:1]
    assert table.headline_lines(both)[2][2:] == ["10.0", "40%", "–", "–", "–", "–"]


def test_two_gpus_of_one_name_keep_their_full_names(both):
    both[1]["gpu"]["name"] = "NVIDIA H100 PCIe"
    titles = table.headline_lines(both)[0]
    assert "NVIDIA H100 PCIe µs" in titles
    assert "NVIDIA H100 80GB HBM3 µs" in titles


def test_lead_line_is_generated(result):
    line = table.lead_line(result, "H100")
    assert line.endswith("on H100, geometric mean (worst): compute 0.80 (0.80), latency 1.00 (1.00).")
    assert table.lead_line(result | {"rows": result["rows"][2:]}, "H100") == ""


def test_hardware_line_has_both_matrix_rates(result, bare_result):
    assert "754 TFLOP/s (torch 8192³ bfloat16, in a burst 798, 1500 MHz, 700 W)." in table.hardware_line(result)
    assert "754 TFLOP/s (torch 8192³ bfloat16)." in table.hardware_line(bare_result)
    result["ceilings"] = {"read_gbs": 1.0, "gemm_tflops": None, "gemm_label": "not measured: no cuBLAS"}
    assert table.hardware_line(result).endswith("matrix product not measured: no cuBLAS.")


# ---- README --------------------------------------------------------------------------------------------------------


def test_rewrite_replaces_what_is_between_the_markers_and_only_that(both):
    text = table.rewrite(README, both)
    assert "old" not in text
    assert text.startswith("# title\n\n<!-- bench:headline -->\n**NVIDIA H100 80GB HBM3**, driver 580.1, 2026-03-04")
    assert "\n\ntext\n\n" in text
    headline, full = text.split("text")
    assert "4K" in headline
    assert "1000" not in headline  # not a headline row
    assert full.count("h=16 1000") == 2 * 3  # each GPU's full table, and as the worst case of two figures
    assert full.count("<details>") == full.count("</details>") == 2
    assert table.rewrite(text, both) == text
    for block in text.split("\n\n"):
        assert len({line.count("|") for line in block.splitlines() if line.startswith("|")}) <= 1


def test_rewrite_shows_a_bare_result(bare_result):
    text = table.rewrite(README, [bare_result])
    assert "400.0" in text
    assert "Beside the kernel" not in text


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


def test_newest_result_of_each_gpu_wins(result, tmp_path):
    later, other, unknown = (copy.deepcopy(result) for _ in range(3))
    later["when"] = "2026-03-05T00:00:00+00:00"
    other["gpu"]["name"] = "NVIDIA A-later-name"
    unknown |= {"when": "2027-01-01T00:00:00+00:00", "schema": figures.SCHEMA + 1}
    files = {"a": later, "b": result, "c": other, "d": unknown, "e": ["no result"], "f": {"rows": []}}
    for name, one in files.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(one))
    assert table.newest_results(tmp_path) == [other, later]


def test_main_rewrites_the_readme(result, tmp_path, capsys):
    readme = tmp_path / "README.md"
    readme.write_text(README)
    (tmp_path / "one.json").write_text(json.dumps(result))
    assert table.main(["--results", str(tmp_path), "--readme", str(readme)]) == 0
    assert "500" in readme.read_text()
    assert "1 GPU(s), rewritten" in capsys.readouterr().out


def test_readme_holds_what_the_results_say():
    """The committed README is the committed results' own."""
    plots = [Path("bench/results") / path.name for path in sorted(table.RESULTS.glob("*.png"))]
    text = (table.ROOT / "README.md").read_text()
    assert table.rewrite(text, table.newest_results(table.RESULTS), plots) == text


def test_headline_rows_are_measured_cases():
    measured = {(case.kind, case.batch, case.seq_len_q, case.num_heads, case.seq_len_k) for case in PERF}
    assert set(table.HEADLINE) <= measured


def test_plot_is_a_png_with_every_bar(result, tmp_path):
    pytest.importorskip("matplotlib", reason="needs the plot extra")
    path = tmp_path / "plot.png"
    plot.draw(result, path)
    data = path.read_bytes()
    assert data.startswith(b"\x89PNG")
    assert len(data) > 10_000


def test_plot_command_writes_one_file_a_gpu(both, tmp_path):
    pytest.importorskip("matplotlib", reason="needs the plot extra")
    for one in both:
        (tmp_path / f"{one['gpu']['slug']}.json").write_text(json.dumps(one))
    assert plot.main(["--results", str(tmp_path)]) == 0
    assert sorted(path.name for path in tmp_path.glob("*.png")) == ["nvidia-h100-80gb-hbm3.png", "nvidia-h200.png"]

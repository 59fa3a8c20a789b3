"""The command line: what `info` says with and without libraries, the demo on the CPU, and its arithmetic."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from mlacore import bench_command, demo, demo_steps, info, jit
from mlacore.__main__ import main

READY = info.Environment(
    driver_version="580.95.05",
    driver_cuda=(13, 0),
    gpus=(info.Gpu("NVIDIA H100 80GB HBM3", (9, 0), 132),),
    nvrtc=info.Library("13.0"),
    cupy=info.Library("14.2.0"),
    numba_cuda=info.Library("0.30.4"),
    cache_dir=Path("/nonexistent/mlacore"),
    kernels=(("mla_plan", True), ("mla_decode_sm90.bfloat16", False)),
)


def changed(**fields: object) -> info.Environment:
    return info.Environment(**{name: getattr(READY, name) for name in info.Environment.__slots__} | fields)


def test_info_of_a_ready_machine_names_no_problem():
    text = info.report(READY)
    assert "NVIDIA H100 80GB HBM3, compute capability 9.0, 132 SMs" in text
    assert "580.95.05, CUDA 13.0" in text
    assert "1 of 2 built" in text
    assert "not built  mla_decode_sm90.bfloat16" in text
    assert info.problems(READY) == []


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"driver_cuda": None, "gpus": ()}, r"no NVIDIA driver"),
        ({"gpus": ()}, r"CUDA_VISIBLE_DEVICES"),
        ({"gpus": (info.Gpu("NVIDIA A100", (8, 0), 108),)}, r"compute capability 9\.0; found NVIDIA A100 \(8\.0\)"),
        ({"driver_cuda": (12, 4), "nvrtc": info.Library("12.9")}, r"CUDA 12\.4: install driver 570"),
        ({"driver_cuda": (12, 8)}, r"CUDA 12\.8, NVRTC is 13\.0: install the cu12 extra .* or driver 580"),
        (
            {"driver_cuda": (12, 9), "nvrtc": info.Library(None, "not installed")},
            r"NVRTC: .* 'nvidia-cuda-nvrtc-cu12>=12\.8",
        ),
        (
            {"cupy": info.Library(None, "not installed")},
            r"CuPy: not installed; \S+ -m pip install 'cupy-cuda13x",
        ),
        ({"nvrtc": info.Library(None, "not installed")}, r"NVRTC: .* 'nvidia-cuda-nvrtc==13"),
        ({"numba_cuda": info.Library(None, "not installed")}, r"Numba-CUDA: .* 'numba-cuda\[cu13\]"),
    ],
)
def test_info_names_what_is_missing_and_how_to_get_it(fields, expected):
    (problem,) = info.problems(changed(**fields))
    assert re.search(expected, problem)
    assert problem in info.report(changed(**fields))


def test_a_driver_of_cuda_12_does_with_libraries_of_cuda_12():
    assert info.problems(changed(driver_cuda=(12, 8), nvrtc=info.Library("12.9"))) == []


def test_packages_named_are_the_extras_own():
    extras = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    declared = {requirement for extra in ("cu12", "cu13", "numba") for requirement in extras[extra]}
    declared.add("numba-cuda[cu12]>=0.30,<0.31")
    named = {name for packages in info._PACKAGES.values() for text in packages for name in re.findall(r"'(.*?)'", text)}
    assert named == declared


def test_a_second_gpu_that_is_no_hopper_is_no_problem():
    assert info.problems(changed(gpus=(*READY.gpus, info.Gpu("NVIDIA T400", (7, 5), 6)))) == []


def test_info_works_with_the_base_install_alone():
    blocked = "import sys; sys.modules.update(dict.fromkeys(('cupy', 'numba', 'cuda', 'cuda.bindings', 'tqdm')));"
    code = blocked + "from mlacore.__main__ import main; sys.exit(main(['info']))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert done.returncode == 0, done.stderr
    assert re.search(r"^NVRTC +missing$", done.stdout, re.MULTILINE)
    assert re.search(r"^CuPy +missing$", done.stdout, re.MULTILINE)
    assert "0 of " in done.stdout
    assert "pip install" in done.stdout
    assert "Ready: NumPy arrays" in done.stdout


def test_a_library_that_breaks_on_import_is_reported_not_raised():
    def broken() -> str:
        raise OSError("cannot open shared object")

    found = info._library(broken)
    assert found.version is None
    assert "OSError: cannot open shared object" in found.problem


def test_demo_decodes_and_checks_on_the_cpu(capsys):
    assert main(["demo", "--device", "cpu", "--batch", "3", "--max-length", "200", "--steps", "4"]) == 0
    text = capsys.readouterr().out
    assert "DeepSeek-V2-Lite" in text
    assert "3 of 3 sequences" in text
    assert float(re.search(r"([\d.e+-]+) relative", text).group(1)) < demo.ERROR_LIMIT


def test_demo_steps_are_the_same_either_way(capsys):
    arguments = ["demo", "--graph", "--device", "cpu", "--batch", "2", "--max-length", "100", "--steps", "20"]
    assert main(arguments) == 0
    text = capsys.readouterr().out
    assert re.search(r"eager +[\d,]+ µs a step", text)
    assert re.search(r"replayed +[\d,]+ µs a step", text)
    assert "after 20 steps outputs and cache are the same, bit by bit" in text


def test_demo_steps_that_differ_are_told(monkeypatch, capsys):
    states = iter([[b"a"], [b"b"]])
    monkeypatch.setattr(demo_steps.Decoder, "state", lambda self: next(states))
    assert demo_steps.run(device="cpu", batch=1, max_length=10, steps=1) == 1
    assert "after 4 steps outputs and cache are DIFFERENT" in capsys.readouterr().out


def test_demo_fails_when_the_result_is_wrong(monkeypatch, capsys):
    exact = demo.mlacore.mla_decode_reference
    monkeypatch.setattr(demo.mlacore, "mla_decode_reference", lambda *a, **k: (1.01 * exact(*a, **k)[0], None))
    assert demo.run(device="cpu", batch=2, max_length=100, steps=1) == 1
    assert "FAILED" in capsys.readouterr().out


def test_demo_refuses_a_gpu_that_is_not_there(monkeypatch, capsys):
    monkeypatch.setattr(info, "collect", lambda: changed(driver_cuda=None, gpus=()))
    assert main(["demo", "--device", "gpu"]) == 1
    assert "no NVIDIA driver" in capsys.readouterr().out


def test_demo_reproduces_the_quoted_cache_figures():
    text = demo.cache_report(demo.DEEPSEEK_V3, tokens=1_000_000)
    assert "576 / 32,768 = 1.76%" in text
    assert "57 times smaller" in text
    assert "207,360" in text  # DeepSeek-V2: 60 layers, 576 values, 6 bits
    assert "3,112,960: 6.66%" in text  # DeepSeek 67B: 95 layers, 8 KV heads of 128, K and V, 16 bits
    assert "34,560 / 194,560 values = 17.8%" in text
    assert "MLA 70.27 GB" in text  # 61 layers of 1,152 bytes
    assert "28.12%" in text
    assert "14.06%" in demo.cache_report(demo.DEEPSEEK_V2_LITE, tokens=1)


COMMANDS = [["info"], ["demo"], ["check"], ["compile"], ["export"], ["bench"]]


@pytest.mark.parametrize("command", [[], *COMMANDS])
def test_help_is_there(command, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([*command, "--help"])
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    assert "usage: python -m mlacore" in text
    assert len(text.split()) > 30, "a usage line alone is no help"


def test_help_of_all_names_every_command(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    text = capsys.readouterr().out
    for (command,) in COMMANDS:
        assert re.search(rf"^    {command} +\w", text, re.MULTILINE)


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["nonsense"],
        ["demo", "--batch", "0"],
        ["demo", "--device", "tpu"],
        ["check", "--seed", "-1"],
        ["export"],
        ["compile", "--none"],
    ],
)
def test_wrong_arguments_are_refused(arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    assert capsys.readouterr().err


# ---- compile --all -------------------------------------------------------------------------------------------------


@pytest.fixture
def fake_compiler(tmp_path, monkeypatch):
    """Two variants, a cache folder of their own, and a compiler that only counts; returns the folder and the counts."""
    compiled: list[str] = []

    def compile(variant: jit.Variant) -> jit.Compiled:
        compiled.append(variant.name)
        return jit.Compiled(b"\x7fELF" + variant.name.encode(), "")

    monkeypatch.setenv("MLACORE_CACHE_DIR", str(tmp_path / "cubins"))
    monkeypatch.setattr(jit, "VARIANTS", {name: jit.VARIANTS[name] for name in ("mla_plan", "cache_copy")})
    monkeypatch.setattr(jit, "nvrtc_version", lambda: (13, 0))
    monkeypatch.setattr(jit, "compile", compile)
    return tmp_path / "cubins", compiled


def test_compile_all_builds_what_is_missing(fake_compiler, capsys):
    folder, compiled = fake_compiler
    jit.cubin(jit.VARIANTS["cache_copy"])
    assert main(["compile", "--all"]) == 0
    assert compiled == ["cache_copy", "mla_plan"]
    text = capsys.readouterr().out
    assert re.search(r"mla_plan .*built$", text, re.MULTILINE)
    assert re.search(r"cache_copy .*already there$", text, re.MULTILINE)
    assert f"2 kernels in {folder}" in text
    assert len(list(folder.glob("*.cubin"))) == 2
    assert main(["compile", "--all"]) == 0
    assert len(compiled) == 2


def test_compile_all_fails_where_nothing_can_be_kept(fake_compiler, capsys, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("MLACORE_CACHE_DIR", str(tmp_path / "file" / "cubins"))
    assert main(["compile", "--all"]) == 1
    assert re.search(r"file/cubins: mla_plan cannot be kept there \(MLACORE_CACHE_DIR", capsys.readouterr().err)


# ---- bench ---------------------------------------------------------------------------------------------------------


def test_bench_says_how_to_get_it_without_a_checkout(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(bench_command, "__file__", str(tmp_path / "site-packages" / "mlacore" / "bench_command.py"))
    assert main(["bench"]) == 2
    assert "clone the repository" in capsys.readouterr().err


def test_bench_passes_its_options_on_and_draws(monkeypatch, tmp_path, capsys):
    import bench.decode
    import bench.plot

    seen, drawn = [], []

    def fake(options: list[str]) -> int:
        seen.append(options)
        if "--output" in options:
            Path(options[options.index("--output") + 1]).write_text('{"rows": [1]}')
        return 0

    monkeypatch.setattr(bench.decode, "main", fake)
    monkeypatch.setattr(bench.plot, "draw", lambda result, path: drawn.append((result, path)))
    monkeypatch.setattr(bench_command.importlib.util, "find_spec", lambda name: name)
    out, plot = tmp_path / "result.json", tmp_path / "plot.png"
    options = ["--only", "few", "--only", "mtp", "--quick", "--no-peers", "--json", str(out), "--plot", str(plot)]
    assert main(["bench", *options]) == 0
    assert seen.pop() == ["--only", "few", "--only", "mtp", "--quick", "--no-peers", "--output", str(out)]
    assert drawn.pop() == ({"rows": [1]}, plot)
    assert main(["bench", "--quick", "--plot", str(plot)]) == 0  # drawn from a file that nobody asked to keep
    assert not Path(seen.pop()[-1]).exists()
    assert drawn.pop() == ({"rows": [1]}, plot)
    assert main(["bench"]) == 0
    assert seen.pop() == []
    assert not drawn


def test_bench_misses_matplotlib_before_it_measures(monkeypatch, capsys):
    import bench.decode

    monkeypatch.setattr(bench_command.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(bench.decode, "main", lambda options: pytest.fail("measured"))
    assert main(["bench", "--plot", "x.png"]) == 1
    assert "pip install matplotlib" in capsys.readouterr().err


def test_bench_without_a_gpu_says_so(monkeypatch, capsys):
    import bench.environment

    monkeypatch.setattr(bench.environment, "why_not", lambda: "no GPU here")
    assert main(["bench"]) == 2
    assert "no GPU here" in capsys.readouterr().err

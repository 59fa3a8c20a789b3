"""Command line: ``mlacore`` or ``python -m mlacore``, then ``{info,demo,check,compile,export,bench}``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand and return its exit status."""
    arguments = _parser().parse_args(argv)
    return arguments.run(arguments)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m mlacore",
        description="Paged MLA decode for Hopper GPUs and plain NumPy, without PyTorch.",
        epilog="Each command explains itself: python -m mlacore check --help.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    _add_info(commands)
    _add_demo(commands)
    _add_check(commands)
    _add_compile(commands)
    _add_export(commands)
    _add_bench(commands)
    return parser


# ---- info ----------------------------------------------------------------------------------------------------------


def _add_info(commands: argparse._SubParsersAction) -> None:
    command = commands.add_parser(
        "info",
        help="show GPU, libraries, cache folder and kernels; what is missing and how to get it",
        description="Show GPU, driver, NVRTC, CuPy, Numba, the cache folder and which kernels are built; "
        "say what is missing and how to get it. Works without a GPU.",
    )
    command.set_defaults(run=_info)


def _info(arguments: argparse.Namespace) -> int:
    from mlacore import info

    print(info.report(info.collect()))
    return 0


# ---- demo ----------------------------------------------------------------------------------------------------------


def _add_demo(commands: argparse._SubParsersAction) -> None:
    command = commands.add_parser(
        "demo",
        help="run a decode loop over a paged cache and check it",
        description="Fill a paged cache with sequences of different lengths, then decode: each step appends one "
        "token to every sequence and attends. Prints speed against this machine's ceilings, the error against "
        "the float64 reference, and the cache's size against MHA and GQA.",
    )
    _add_device(command)
    command.add_argument(
        "--graph",
        action="store_true",
        help="steps through several layers instead, each launched call by call and then replayed as one CUDA graph",
    )
    command.add_argument(
        "--batch", type=_positive, help="sequences (default: 64 on the GPU, 8 on the CPU; half of that with --graph)"
    )
    command.add_argument(
        "--max-length",
        type=_positive,
        help="longest sequence, tokens (default: 32768 on the GPU, 4096 on the CPU; an eighth with --graph)",
    )
    command.add_argument("--steps", type=_positive, help="decode steps (default: 200, with --graph 256)")
    command.add_argument("--seed", type=int, default=0, help="of lengths and data (default: %(default)s)")
    command.set_defaults(run=_demo)


def _demo(arguments: argparse.Namespace) -> int:
    from mlacore import demo, demo_steps

    run = demo_steps.run if arguments.graph else demo.run
    return run(
        device=arguments.device,
        batch=arguments.batch,
        max_length=arguments.max_length,
        steps=arguments.steps,
        seed=arguments.seed,
    )


# ---- check ---------------------------------------------------------------------------------------------------------


def _add_check(commands: argparse._SubParsersAction) -> None:
    command = commands.add_parser(
        "check",
        help="self-test of this machine in less than two minutes; exit status 1 if it fails",
        description="Decode over paged caches through every kernel shape and hold the results against float64; then, "
        "on a GPU, the speed of two large batches against their floor. Ends in a verdict; the exit status is 1 if an "
        "error is too large. Without a GPU the NumPy backend is checked, and the report says so.",
    )
    _add_device(command)
    command.add_argument("--seed", type=_natural, default=0, help="of the data (default: %(default)s)")
    command.set_defaults(run=_check)


def _check(arguments: argparse.Namespace) -> int:
    from mlacore import selfcheck

    return selfcheck.run(device=arguments.device, seed=arguments.seed)


# ---- compile, export -----------------------------------------------------------------------------------------------


def _add_compile(commands: argparse._SubParsersAction) -> None:
    command = commands.add_parser(
        "compile",
        help="build every kernel variant into the cache; needs NVRTC, no GPU",
        description="Compile every kernel variant for sm_90a into the cache folder (MLACORE_CACHE_DIR) and print the "
        "registers, shared memory and spills of each. Needs NVRTC (the cu13 or cu12 extra) and no GPU.",
    )
    command.add_argument(
        "--all",
        action="store_true",
        help="fill the cache ahead of use, as in an image whose folders are read-only later: build only what is "
        "missing, and fail if the folder cannot keep it",
    )
    command.set_defaults(run=_compile)


def _compile(arguments: argparse.Namespace) -> int:
    from mlacore import jit

    return _build(lambda: (jit.build_all if arguments.all else jit.compile_all)(print))


def _add_export(commands: argparse._SubParsersAction) -> None:
    command = commands.add_parser(
        "export",
        help="write the kernels for C and C++ hosts: cubins, header, manifest, example; needs NVRTC, no GPU",
        description="Write every kernel variant as a cubin for sm_90a into a folder, with mlacore.h (parameter "
        "structs, launch rules), manifest.json (the same for programs) and decode.c, an example that needs libcuda "
        "alone. Needs NVRTC (the cu13 or cu12 extra) and no GPU.",
    )
    command.add_argument("folder", type=Path, metavar="DIR", help="made if it is not there; its files are replaced")
    command.set_defaults(run=_export)


def _export(arguments: argparse.Namespace) -> int:
    from mlacore import export

    return _build(lambda: export.export(arguments.folder, print))


def _build(build: Callable[[], object]) -> int:
    """Exit status of something that compiles and writes files; what it misses goes to stderr."""
    from mlacore import jit

    try:
        build()
    except (ImportError, OSError, jit.CompileError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


# ---- bench ---------------------------------------------------------------------------------------------------------


def _add_bench(commands: argparse._SubParsersAction) -> None:
    command = commands.add_parser(
        "bench",
        help="measure this GPU against its ceilings and the peers found (from a checkout)",
        description="Check and time every case of the bench on this GPU, against the ceilings measured in the same run "
        "and the peers that are installed, and print the table. The bench is part of the repository, not of the wheel. "
        "A complete run goes to bench/results, unless --json names another file.",
    )
    command.add_argument(
        "--only", action="append", metavar="TEXT", help="cases with TEXT in their id (may be repeated)"
    )
    command.add_argument("--quick", action="store_true", help="fewer replays: a first look, not a figure to report")
    command.add_argument("--no-peers", action="store_true", help="leave the peers out")
    command.add_argument("--json", type=Path, metavar="FILE", help="write the result here")
    command.add_argument("--plot", type=Path, metavar="FILE.png", help="draw the share of floor (needs the plot extra)")
    command.set_defaults(run=_bench)


def _bench(arguments: argparse.Namespace) -> int:
    from mlacore import bench_command

    return bench_command.run(
        only=arguments.only or [],
        quick=arguments.quick,
        peers=not arguments.no_peers,
        json_path=arguments.json,
        plot_path=arguments.plot,
    )


# ---- arguments -----------------------------------------------------------------------------------------------------


def _add_device(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--device",
        choices=("auto", "gpu", "cpu"),
        default="auto",
        help="auto: the GPU where a Hopper GPU and its libraries are there, else the CPU (default: %(default)s)",
    )


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def _natural(text: str) -> int:
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"must be at least 0, got {value}")
    return value


if __name__ == "__main__":
    sys.exit(main())

"""Command line: ``python -m mlacore {info,demo,compile}``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand and return its exit status."""
    arguments = _parser().parse_args(argv)
    if arguments.command == "info":
        from mlacore import info

        print(info.report(info.collect()))
        return 0
    if arguments.command == "compile":
        from mlacore import jit

        try:
            jit.compile_all(print)
        except (ImportError, jit.CompileError) as error:
            print(error, file=sys.stderr)
            return 1
        return 0
    if arguments.command == "export":
        from mlacore import export, jit

        try:
            export.export(arguments.folder, print)
        except (ImportError, OSError, jit.CompileError) as error:
            print(error, file=sys.stderr)
            return 1
        return 0
    from mlacore import demo, demo_steps

    run = demo_steps.run if arguments.graph else demo.run
    return run(
        device=arguments.device,
        batch=arguments.batch,
        max_length=arguments.max_length,
        steps=arguments.steps,
        seed=arguments.seed,
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m mlacore",
        description="Paged MLA decode for Hopper GPUs and plain NumPy, without PyTorch.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    commands.add_parser(
        "info",
        help="show GPU, libraries, cache folder and kernels; what is missing and how to get it",
        description="Show GPU, driver, NVRTC, CuPy, Numba, the cache folder and which kernels are built; "
        "say what is missing and how to get it. Works without a GPU.",
    )
    demo = commands.add_parser(
        "demo",
        help="run a decode loop over a paged cache and check it",
        description="Fill a paged cache with sequences of different lengths, then decode: each step appends one "
        "token to every sequence and attends. Prints speed against this machine's ceilings, the error against "
        "the float64 reference, and the cache's size against MHA and GQA.",
    )
    demo.add_argument(
        "--device",
        choices=("auto", "gpu", "cpu"),
        default="auto",
        help="auto: the GPU where a Hopper GPU and its libraries are there, else the CPU (default: %(default)s)",
    )
    demo.add_argument(
        "--graph",
        action="store_true",
        help="steps through several layers instead, each launched call by call and then replayed as one CUDA graph",
    )
    demo.add_argument(
        "--batch", type=_positive, help="sequences (default: 64 on the GPU, 8 on the CPU; half of that with --graph)"
    )
    demo.add_argument(
        "--max-length",
        type=_positive,
        help="longest sequence, tokens (default: 32768 on the GPU, 4096 on the CPU; an eighth with --graph)",
    )
    demo.add_argument("--steps", type=_positive, help="decode steps (default: 200, with --graph 256)")
    demo.add_argument("--seed", type=int, default=0, help="of lengths and data (default: %(default)s)")
    commands.add_parser(
        "compile",
        help="build every kernel variant into the cache; needs NVRTC, no GPU",
        description="Compile every kernel variant for sm_90a into the cache folder and print the registers, shared "
        "memory and spills of each. Needs NVRTC (the cu13 extra) and no GPU.",
    )
    export = commands.add_parser(
        "export",
        help="write the kernels for C and C++ hosts: cubins, header, manifest, example; needs NVRTC, no GPU",
        description="Write every kernel variant as a cubin for sm_90a into a folder, with mlacore.h (parameter "
        "structs, launch rules), manifest.json (the same for programs) and decode.c, an example that needs libcuda "
        "alone. Needs NVRTC (the cu13 extra) and no GPU.",
    )
    export.add_argument("folder", type=Path, metavar="DIR", help="made if it is not there; its files are replaced")
    return parser


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


if __name__ == "__main__":
    sys.exit(main())

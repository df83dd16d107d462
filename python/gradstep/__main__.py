"""The command ``gradstep``, or ``python -m gradstep``: benchmarks and information."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from gradstep import __version__, config
from gradstep.bench import cli as bench


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status: 0 if all is well, 2 for options that make no sense."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser("gradstep", description="Optimizer steps in one sweep over memory.")
    parser.add_argument("--version", action="version", version=f"gradstep {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    bench_parser = commands.add_parser("bench", help="measure optimizer steps, gradstep's and others'")
    bench.add_arguments(bench_parser)
    commands.add_parser("info", help="show version, build, instruction sets, threads, CUDA")
    options = parser.parse_args(arguments)
    if options.command == "info":
        config.show()
        return 0
    try:
        status: int = bench.run(options, arguments)
    except bench.MisuseError as error:
        bench_parser.error(str(error))
    return status


if __name__ == "__main__":
    sys.exit(main())

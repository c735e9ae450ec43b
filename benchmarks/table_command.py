"""The command line of scripts that print the tables they are asked for by name."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import onnxruntime
from real_models import load_scorer
from tool_tables import Bench

Tables = Mapping[str, Callable[[Bench], Iterator[str]]]


def print_tables(description: str | None, tables: Tables, arguments: Sequence[str] | None = None) -> None:
    """Print the tables that the command line names, all by default, as Markdown."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tables", nargs="*", metavar="TABLE", help=f"of {', '.join(tables)}; by default all")
    parser.add_argument("--model", action="append", dest="names", metavar="NAME", help="only models of this name")
    parser.add_argument("--tool", action="append", default=[], metavar="TEXT", help="only tools whose name has this")
    parser.add_argument("--seconds", type=float, default=8.0, help="to time the files of one model at one batch size")
    parser.add_argument("--models", type=Path, help="a folder of large models, for the memory")
    parser.add_argument("--peers", type=Path, default=Path(sys.executable), help="interpreter of the references")
    options = parser.parse_args(arguments)
    unknown = sorted(set(options.tables) - set(tables))
    if unknown:
        parser.error(f"no table `{unknown[0]}`; there are {', '.join(tables)}")
    # On a machine that others use too, what one thread computes is all that repeats.
    options.busy = True
    print(
        f"ONNX Runtime {onnxruntime.__version__}. Milliseconds: processor time of 1 thread, median (speed-up, paired)."
    )
    print("Seconds: whole process, after import, processor time; then peak MB.", flush=True)
    bench = Bench(load_scorer(), options)
    for name in options.tables or tables:
        for line in tables[name](bench):
            print(line, flush=True)

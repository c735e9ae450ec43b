"""What `debug bisect` and `debug reduce` find, and what it takes: broken passes, and a failure in real models.

    python -m benchmarks.debugging [MODEL ...]

The first table has the passes of `tests/broken_passes.py`, each wrong at one node of a network of 351 nodes. The second
has ONNX files, in the middle of which one Add with a constant is made wrong. Prints Markdown; seconds are of the clock,
and of the processor in parentheses, which other programs on the machine change less.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir

import graphopt
from graphopt import walk
from graphopt.authoring import Context, Guarantee, Pass
from graphopt.options import opt
from tests.broken_passes import BROKEN, model, samples


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", type=Path, metavar="MODEL", help="ONNX files")
    options = parser.parse_args()
    print("| fault | at | bisect finds | states judged | s | reduce leaves | candidates | s |")
    print("|---|---|---|---|---|---|---|---|")
    for name, broken, at in BROKEN:
        print(row_of_fault(name, broken, at), flush=True)
    if options.models:
        print("\n| model | nodes | MB | wrong at | reduce leaves | candidates | s |")
        print("|---|---|---|---|---|---|---|")
    for file in options.models:
        print(row_of_model(file), flush=True)


def row_of_fault(name: str, broken: Pass, at: str) -> str:
    found, spent = timed(lambda: graphopt.bisect(model(), broken, evaluation=samples(2)))
    where = ", ".join(found.edit.nodes) if found.edit is not None else "–"
    try:
        reduced, reducing = timed(lambda: graphopt.reduce(model(), broken, data=samples()))
        left = f"{reduced.nodes[1]} of {reduced.nodes[0]} | {reduced.tried} | {reducing}"
    except graphopt.GraphoptError as error:
        left = f"{error.message} | – | –"
    return f"| {name} | `{at}` | `{where}` ({found.kind}) | {len(found.judged)} | {spent} | {left} |"


def row_of_model(file: Path) -> str:
    names = [node.name for node in graphopt.load(file).graph if node.name and constant_operand(node) is not None]
    at = names[len(names) // 2]
    found, spent = timed(lambda: graphopt.reduce(file, Shifted(at=at)))
    return (
        f"| {file.stem} | {found.nodes[0]} | {found.bytes[0] / 1e6:.1f} | `{at}` | {found.nodes[1]} nodes, "
        f"{found.bytes[1]} bytes | {found.tried} | {spent} |"
    )


def timed(run: Callable[[], Any]) -> tuple[Any, str]:
    clock, processor = time.perf_counter(), time.process_time()
    result = run()
    return result, f"{time.perf_counter() - clock:.1f} ({time.process_time() - processor:.1f})"


def constant_operand(node: ir.Node) -> int | None:
    """Return which operand of an Add is a constant, or None."""
    places = (place for place, value in enumerate(node.inputs) if walk.constant_tensor(value) is not None)
    return next(places, None) if walk.is_onnx_op(node, "Add") else None


@dataclass(frozen=True)
class Shifted(Pass):
    """Add 1 to the constant of one Add."""

    at: str = opt("", help="name of the Add")

    name = "shifted"
    guarantee = Guarantee.EQUIVALENT

    def run(self, model: ir.Model, ctx: Context) -> None:
        for node in list(model.graph):
            place = constant_operand(node) if node.name == self.at else None
            tensor = walk.constant_tensor(node.inputs[place]) if place is not None else None
            if place is not None and tensor is not None:
                wrong = ctx.rewriter.const(tensor.numpy() + tensor.numpy().dtype.type(1), "wrong", near=node)
                ctx.rewriter.set_input(node, place, wrong)


if __name__ == "__main__":
    main()

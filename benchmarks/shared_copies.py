"""The part of `share.py` on exact sharing: copies planted in models, and what `share` makes of them."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir
from planted import Copy, content, digest, plant, what_they_hold
from real_models import SHARED

import graphopt
from graphopt import walk

MODELS = SHARED / "assets" / "models"
COPIES = 200
MEGABYTE = 1e6
# What the memory of a pass may be, as a multiple of the largest tensor and above what an empty run takes.
TIMES_LARGEST, BEYOND = 6, 300e6
# Of larger tensors copies are not planted: two hundred of them are another model.
LARGEST_COPIED = 8 << 20

PROCESS = """
import json, sys, time
import graphopt, graphopt.driver, onnxruntime
path, out, passes = sys.argv[1:4]
start = time.perf_counter()
graphopt.optimize(path, passes, output=out, verify="structure")
seconds = time.perf_counter() - start
with open("/proc/self/status") as status:
    peak = next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))
print("\\n" + json.dumps([seconds, peak]))
"""


@dataclass(frozen=True)
class Planted:
    """A model with copies in it.

    Attributes:
        name: What the table calls it.
        path: Its file.
        own: Bytes of the tensors it had before.
        copies: The copies, by name.
        head: Digest of the weight of an untied head, as columns.
    """

    name: str
    path: Path
    own: int
    copies: dict[str, Copy]
    head: str = ""


def tables(large: list[Path]) -> Iterator[str]:
    """Yield the lines of the table: real models with random copies, language models with the head untied.

    Args:
        large: Models beyond those that come with the project; the first one with a table read by Gather and by a
            Transpose is untied too.
    """
    yield "| model | copies | file with | file after | found | bytes exact | `share` | peak memory | may be |"
    yield "|---|---|---|---|---|---|---|---|---|"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for path in [*sorted(MODELS.glob("*.onnx")), *large]:
            case = _with_copies(path, folder)
            if case is not None:
                yield _row(case, "share", folder)
                case.path.unlink()
        for path in large:
            for layout in ("rows", "columns"):
                case = _untied(path, layout, folder)
                if case is None:
                    continue
                for passes in ("share", "simplify,share", "share,O2"):
                    yield _row(case, passes, folder)
                case.path.unlink()


def _with_copies(path: Path, folder: Path) -> Planted | None:
    model = graphopt.load(path)
    own = _stored(model)
    try:
        copies = plant(model, COPIES, seed=0, largest=LARGEST_COPIED)
    except ValueError:  # no weight in float32 that is large enough
        return None
    graphopt.save(model, folder / "in.onnx")
    return Planted(path.stem, folder / "in.onnx", own, copies)


def _untied(path: Path, layout: str, folder: Path) -> Planted | None:
    """Give the head of a language model a copy of its own: as rows, which it transposes, or as columns."""
    model = graphopt.load(path)
    own = _stored(model)
    for value in list(model.graph.initializers.values()):
        readers = {use.node.op_type: use.node for use in value.uses()}
        if readers.keys() != {"Gather", "Transpose"} or value.const_value is None:
            continue
        turn = readers["Transpose"]
        array = value.const_value.numpy()
        copied = ir.tensor(array.copy() if layout == "rows" else np.ascontiguousarray(array.T), name="untied_head")
        copy = ir.Value(name="untied_head", shape=copied.shape, type=ir.TensorType(copied.dtype), const_value=copied)
        model.graph.register_initializer(copy)
        if layout == "rows":
            turn.replace_input_with(0, copy)
        else:
            turn.outputs[0].replace_all_uses_with(copy)
            model.graph.remove(turn, safe=True)
        graphopt.save(model, folder / "in.onnx")
        return Planted(f"{path.stem}, head untied as {layout}", folder / "in.onnx", own, {}, digest(array.T))
    return None


def _row(case: Planted, passes: str, folder: Path) -> str:
    out = folder / "out.onnx"
    seconds, peak = _measured(case.path, out, passes)
    model = graphopt.load(out)
    extra = _stored(model) - case.own
    # The steps of views read shapes and factors; a copy that is left is larger.
    smallest = min((copy.bytes for copy in case.copies.values()), default=case.own // 10)
    found = "all" if extra < max(16 * len(case.copies), 1) + smallest else f"{extra / MEGABYTE:.1f} MB left"
    held = what_they_hold(model, case.copies)
    wrong = sum(held[name] != copy.digest for name, copy in case.copies.items())
    if case.head:
        wrong += case.head != _head(model)
    largest = max(tensor.nbytes for tensor in walk.stored_tensors(graphopt.load(case.path)))
    cells = (
        f"{case.name}" + ("" if passes == "share" else f", `{passes}`"),
        f"{len(case.copies) or 1}",
        _megabytes(_size(case.path)),
        _megabytes(_size(out)),
        found,
        "yes" if not wrong else f"{wrong} wrong",
        f"{seconds:.1f} s",
        f"{(peak - _empty_run()) / MEGABYTE:.0f} MB",
        f"{(TIMES_LARGEST * largest + BEYOND) / MEGABYTE:.0f} MB",
    )
    for file in folder.glob("out*"):
        file.unlink()
    return "| " + " | ".join(cells) + " |"


def _head(model: ir.Model) -> str:
    """Return the digest of the weight of the last product, as columns."""
    products = [node for node in model.graph if node.op_type in ("MatMul", "Gemm")]
    last = products[-1]
    weight = content(model, last.inputs[1])
    return digest(weight.T if last.attributes.get_int("transB", 0) else weight)


def _measured(path: Path, out: Path, passes: str) -> tuple[float, int]:
    """Return seconds and the peak of memory of a run in a process of its own."""
    command = [sys.executable, "-c", PROCESS, str(path), str(out), passes]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    seconds, peak = json.loads(done.stdout.splitlines()[-1])
    return seconds, peak


def _empty_run() -> int:
    """Return the memory of a process that has only imported what a run imports."""
    program = PROCESS.replace("graphopt.optimize(path, passes", "(lambda *_, **__: None)(path, passes")
    done = subprocess.run([sys.executable, "-c", program, "", "", ""], capture_output=True, text=True, check=True)
    return int(json.loads(done.stdout.splitlines()[-1])[1])


def _stored(model: ir.Model) -> int:
    return sum(tensor.nbytes for tensor in walk.stored_tensors(model))


def _size(path: Path) -> int:
    return sum(file.stat().st_size for file in path.parent.glob(f"{path.stem}.onnx*"))


def _megabytes(count: int) -> str:
    return f"{count / MEGABYTE:.1f} MB"

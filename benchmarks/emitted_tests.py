"""Tests that `--emit-test` writes of real models: their size, and which small faults of one layer they notice.

    python benchmarks/emitted_tests.py [NAME ...]

Faults are planted in the written model, one at a time, in layers drawn with a seed: `weight`: every fifth code moves by
one, or floats by 1 %; `bias`: it is lost; `scale`: a DequantizeLinear reads 2 % more; `zero point`: it reads one more.
One counts as noticed when one of the two tests of outputs fails: on this machine, and then as on any other. `noise` is
how far runs are apart that should agree, and what is asked for elsewhere.
"""

from __future__ import annotations

import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from real_models import calibration, load_scorer

import graphopt
from graphopt import walk
from graphopt.regression import recorded_runs
from graphopt.testing import RecordedModel

SAMPLES, TRIALS, THREADS = 64, 6, 2
LEAST_WEIGHT, LEAST_BIAS = 256, 8
KINDS = ("weight", "bias", "scale", "zero point")
RUNS = [
    ("digits", "simplify"),
    ("digits", "quant"),
    ("resnet20", "quant"),
    ("squeezenet", "quant"),
    ("mobilenet", "quant"),
    ("yunet", "quant"),
    ("magika", "quant"),
    ("silero_vad", "simplify"),
    ("silero_vad", "quant"),
    ("stories_lm", "simplify"),
    ("stories_lm", "quant:mode=weights"),
    ("minilm", "quant:mode=dynamic"),
]
_CODES = (ir.DataType.INT8, ir.DataType.UINT8)
_CONVERSIONS = ("QuantizeLinear", "DequantizeLinear")

Change = Callable[[Any], Any]
Array = np.ndarray[Any, Any]


def is_scale(value: ir.Value) -> bool:
    return any(walk.is_onnx_op(use.node, *_CONVERSIONS) and use.idx == 1 for use in value.uses())


def perturbed(array: Array) -> Array:
    flat = array.reshape(-1).copy()
    if array.dtype.kind == "f":
        return (array * (1 + 0.01 * np.random.default_rng(0).standard_normal(array.shape))).astype(array.dtype)
    flat[::5] -= np.sign(flat[::5].astype(np.int16)).astype(array.dtype)
    return flat.reshape(array.shape)


def larger(array: Array) -> Array:
    return (array * 1.02).astype(array.dtype)


def one_more(array: Array) -> Array:
    return array + np.ones((), array.dtype)


def places(model: ir.Model) -> Iterator[tuple[str, ir.Node, int, Change]]:
    """Yield every place a fault can be planted at: its kind, a node and which of its inputs, and what becomes of it."""
    for node in walk.every_node(model):
        for index, value in enumerate(node.inputs):
            tensor = walk.constant_tensor(value) if value is not None else None
            if tensor is None or value is None:
                continue
            size, rank, dtype = tensor.size, len(tensor.shape), tensor.dtype
            if size >= LEAST_WEIGHT and rank >= 2 and dtype in (*_CODES, ir.DataType.FLOAT):
                yield "weight", node, index, perturbed
            is_bias = size >= LEAST_BIAS and rank == 1 and dtype in (ir.DataType.INT32, ir.DataType.FLOAT)
            if is_bias and not is_scale(value) and np.any(tensor.numpy()):
                yield "bias", node, index, np.zeros_like
            if walk.is_onnx_op(node, "DequantizeLinear") and index == 1:
                yield "scale", node, index, larger
            if walk.is_onnx_op(node, "DequantizeLinear") and index == 2 and size == 1 and dtype in _CODES:
                yield "zero point", node, index, one_more


def figures_of(test: Path) -> dict[str, Any]:
    """Return the figures of a written test by name."""
    text = test.read_text().partition("@pytest.fixture")[0]
    values: dict[str, Any] = {"__file__": str(test)}
    exec(compile(text, str(test), "exec"), values)
    return values


def is_noticed(model: Path, record: Path, test: Path, *, here: bool) -> bool:
    """Tell whether the tests of outputs fail, here or on another machine."""
    values = figures_of(test)
    repeats_on = values.get("REPEATS_ON") if here else None
    try:
        found = RecordedModel(model, record)
        if "OFF_THE_RECORD" in values:
            found.assert_outputs("model", values["OFF_THE_RECORD"], repeats_on=repeats_on)
        found.assert_outputs("original", values["OFF_THE_ORIGINAL"])
    except (AssertionError, graphopt.GraphoptError):
        return True
    return False


def noticed(model: Path, record: Path, test: Path) -> dict[str, list[tuple[bool, bool]]]:
    """Plant faults, and return kind to whether each was noticed here, and would be elsewhere."""
    found: dict[str, list[tuple[bool, bool]]] = {}
    every = [place[0] for place in places(graphopt.load(model))]
    broken = model.with_name("broken.onnx")
    for kind in KINDS:
        indices = [index for index, one in enumerate(every) if one == kind]
        for index in np.random.default_rng(0).permutation(indices)[:TRIALS].tolist():
            changed = graphopt.load(model)
            _, node, port, change = list(places(changed))[index]
            tensor = walk.constant_tensor(node.inputs[port])
            assert tensor is not None
            fault = ir.Value(name="fault", const_value=ir.tensor(change(tensor.numpy()), name="fault"))
            assert node.graph is not None
            node.graph.register_initializer(fault)
            node.replace_input_with(port, fault)
            graphopt.save(changed, broken)
            here, elsewhere = (is_noticed(broken, record, test, here=one) for one in (True, False))
            found.setdefault(kind, []).append((here, elsewhere))
    return found


def main() -> None:
    scorer = load_scorer()
    wanted = sys.argv[1:]
    print("| model | pipeline | record | noise → asked elsewhere | weight | bias | scale | zero point |")
    print("|---|---|---|---|---|---|---|---|")
    for name, passes in RUNS:
        if wanted and name not in wanted:
            continue
        with tempfile.TemporaryDirectory() as folder:
            print(row(Path(folder), scorer, name, passes), flush=True)


def row(folder: Path, scorer: Any, name: str, passes: str) -> str:
    source, data = scorer.HERE / "models" / scorer.ASSETS[name][0], calibration(scorer, name, SAMPLES)
    out, test = folder / "out.onnx", folder / "test_out.py"
    graphopt.optimize(source, passes, data=data, output=out, emit_test=test, threads=THREADS, timed=False)
    record, values = folder / "test_out.npz", figures_of(test)
    assert not is_noticed(out, record, test, here=True), "it passes on its own model"
    bounds = values.get("OFF_THE_RECORD", values["OFF_THE_ORIGINAL"]).values()
    asked = min((bound.sqnr_db for bound in bounds if bound.sqnr_db is not None), default=0)
    measured = re.search(r"([\d.-]+)[\s#]+dB\.", test.read_text())
    found = noticed(out, record, test)
    cells = [_counts(found.get(kind, [])) for kind in KINDS]
    kept = sum(array.nbytes for run in recorded_runs.read(record) for array in run.feeds.values())
    size = f"{record.stat().st_size / 1000:.0f} kB (inputs {kept / 1000:.0f} kB)"
    noise = f"{measured[1] if measured else '?'} → {asked:g} dB"
    return f"| {name} | `{passes}` | {size} | {noise} | {' | '.join(cells)} |"


def _counts(found: list[tuple[bool, bool]]) -> str:
    if not found:
        return "–"
    here, elsewhere = (sum(side) for side in zip(*found, strict=True))
    return f"{here}, {elsewhere} of {len(found)}"


if __name__ == "__main__":
    main()

"""What shape inference says of a model, held against what ONNX Runtime computes for every value of its main graph."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort

from graphopt import dims as d
from graphopt import shapes
from graphopt.dims import Atom, Size


@dataclass
class Tally:
    """How much was said of how many values, and what of it was wrong."""

    values: int = 0
    ranks: int = 0
    dims: int = 0
    exact: int = 0
    contents: int = 0
    wrong: list[str] = field(default_factory=list)


def every_output_shown(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return the model with every value its main graph computes as an output."""
    shown = onnx.ModelProto()
    shown.CopyFrom(model)
    have = {value.name for value in shown.graph.output}
    for node in shown.graph.node:
        for name in node.output:
            if name and name not in have:
                shown.graph.output.add().name = name
                have.add(name)
    return shown


def computed(model: onnx.ModelProto, feed: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return every value ONNX Runtime computes on the way, or None where it refuses the model."""
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    try:
        session = ort.InferenceSession(
            every_output_shown(model).SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
        names = [output.name for output in session.get_outputs()]
        values = dict(zip(names, session.run(None, dict(feed)), strict=True))
    except Exception as error:
        # Of a dtype NumPy has no number for, the bindings say so with a plain RuntimeError.
        if not type(error).__module__.startswith("onnxruntime") and not isinstance(error, RuntimeError):
            raise
        return None
    return None if _reduces_nothing(model, {**feed, **values}) else values


def _reduces_nothing(model: onnx.ModelProto, values: Mapping[str, Any]) -> bool:
    """Tell whether a reduction reads an empty tensor: ONNX Runtime 1.31 hands that on as it is, axes and all."""
    reduced = [node.input[0] for node in model.graph.node if node.op_type.startswith("Reduce")]
    return any(isinstance(values.get(name), np.ndarray) and values[name].size == 0 for name in reduced)


def sizes_fed(model: ir.Model, feed: Mapping[str, Any]) -> dict[str, int]:
    """Return what the names of the inputs' dimensions stand for."""
    sizes: dict[str, int] = {}
    for value in model.graph.inputs:
        array = feed.get(value.name or "")
        if isinstance(array, np.ndarray) and value.shape is not None:
            for dim, size in zip(value.shape, array.shape, strict=True):
                if not isinstance(dim, int) and dim.value:
                    assert sizes.setdefault(dim.value, size) == size, "the feed breaks its own names"
    return sizes


def check(model: ir.Model, feed: Mapping[str, Any], truth: Mapping[str, Any], tally: Tally) -> None:
    """Hold what was inferred of each value against what came out; an unknown size must be the same everywhere."""
    sizes = sizes_fed(model, feed)
    unknown: dict[Atom, int] = {}
    for node in model.graph:
        for value in node.outputs:
            if isinstance(truth.get(value.name or ""), np.ndarray):
                _check_value(value, truth[value.name or ""], sizes, unknown, tally)


def _check_value(
    value: ir.Value, array: np.ndarray, sizes: Mapping[str, int], unknown: dict[Atom, int], tally: Tally
) -> None:
    producer = value.producer()
    where = f"{producer.op_type if producer else ''} `{value.name}` {array.dtype}{array.shape}"
    tally.values += 1
    if not _is_dtype(value.dtype, array):
        tally.wrong.append(f"{where}: {value.dtype}")
    dims = shapes.dims_of(value)
    if dims is None:
        return
    tally.ranks += 1
    if len(dims) != array.ndim:
        tally.wrong.append(f"{where}: {dims}")
        return
    for dim, size in zip(dims, array.shape, strict=True):
        tally.dims += 1
        tally.exact += isinstance(dim, int) or not dim.unknowns
        _check_size(dim, size, sizes, unknown, f"{where}: {dims}", tally)
    known = shapes.contents(value)
    if known is None:
        return
    if known.shape != array.shape:
        tally.wrong.append(f"{where}: contents {known.entries}")
        return
    tally.contents += all(isinstance(entry, int) or not entry.unknowns for entry in known.entries)
    for entry, number in zip(known.entries, array.reshape(-1).tolist(), strict=True):
        _check_size(entry, int(number), sizes, unknown, f"{where}: {number} for {entry}", tally)


def _is_dtype(dtype: ir.DataType | None, array: np.ndarray) -> bool:
    if dtype is None or dtype == ir.DataType.STRING or array.dtype.kind == "O":
        return True
    # ONNX Runtime hands out 8-bit floats as their bits.
    return dtype.numpy() == array.dtype or (dtype.is_floating_point() and array.dtype == np.uint8)


def _check_size(
    size: Size, actual: int, sizes: Mapping[str, int], unknown: dict[Atom, int], where: str, tally: Tally
) -> None:
    low, high = d.bounds(size)
    if (low is not None and actual < low) or (high is not None and actual > high):
        tally.wrong.append(f"{where}: {actual} is not within {low}..{high}")
    try:
        said = d.evaluate(size, sizes)
    except ZeroDivisionError:
        tally.wrong.append(f"{where}: {size} divides by zero")
        return
    atom = size.atom if not isinstance(size, int) else None
    if said is None and atom is not None and unknown.setdefault(atom, actual) != actual:
        tally.wrong.append(f"{where}: {size} is {unknown[atom]} and {actual}")
    if said is not None and said != actual:
        tally.wrong.append(f"{where}: {size} is {said}, not {actual}")

"""Copies planted in models for `share` to find: equal, transposed, reshaped, negated and scaled, in any combination.

Each copy is read by an operator of its own, together with an input that is added, and what that gives is an output.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from graphopt import walk
from graphopt.fragment import fragment

Array = npt.NDArray[Any]

KINDS = (
    "plain", "transposed", "reshaped", "negated", "doubled", "scaled", "transposed and reshaped",
    "reshaped and transposed", "transposed and negated", "reshaped and scaled", "transposed and scaled",
)  # fmt: skip
# Nodes that read a smaller tensor from another one may take more than it does.
LEAST_BYTES = 600
FLOOR = "planted_floor"
_FACTORS = (0.7, 3.0, 1 / 3, -0.1, 1e-3, math.pi)


@dataclass(frozen=True)
class Copy:
    """A copy that was planted.

    Attributes:
        source: The initializer it was made of.
        kind: How.
        digest: Of its bytes.
        bytes: How many these are.
    """

    source: str
    kind: str
    digest: str
    bytes: int


def plant(model: ir.Model, count: int, seed: int, *, largest: int = 1 << 30) -> dict[str, Copy]:
    """Plant copies of random initializers of a model, and return them by name.

    Args:
        model: The model, changed in place.
        count: How many.
        seed: Seed of what is copied, and how.
        largest: Bytes of the largest tensor copied.
    """
    rng = np.random.default_rng(seed)
    sources = [
        value
        for value in model.graph.initializers.values()
        if (tensor := walk.constant_tensor(value)) is not None
        and tensor.dtype is ir.DataType.FLOAT
        and LEAST_BYTES <= tensor.nbytes <= largest
    ]
    copies: dict[str, Copy] = {}
    floor = ir.Value(name=FLOOR, shape=ir.Shape([]), type=ir.TensorType(ir.DataType.FLOAT))
    model.graph.inputs.append(floor)
    for number in range(count):
        source = sources[rng.integers(len(sources))]
        kind = KINDS[number % len(KINDS)]
        assert source.const_value is not None
        array = np.ascontiguousarray(changed(source.const_value.numpy(), kind, rng))
        name = f"planted_{number}"
        _add(model, name, array, floor)
        copies[name] = Copy(source.name or "", kind, digest(array), array.nbytes)
    return copies


def changed(array: Array, kind: str, rng: np.random.Generator) -> Array:
    """Return a copy of an array of one kind."""
    for step in kind.split(" and "):
        match step:
            case "transposed":
                array = array.transpose(rng.permutation(array.ndim))
            case "reshaped":
                array = array.reshape(_shape(array.size, rng))
            case "negated":
                array = -array
            case "doubled":
                array = array * array.dtype.type(2.0 ** int(rng.integers(-8, 9)))
            case "scaled":
                array = array * array.dtype.type(_FACTORS[rng.integers(len(_FACTORS))])
    return array


def digest(array: Array) -> str:
    """Return what arrays of equal bytes share."""
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()


def what_they_hold(model: ir.Model, names: Mapping[str, Any]) -> dict[str, str]:
    """Return the digests of what the readers of copies read."""
    readers = {value.name: node for node in model.graph for value in node.outputs}
    return {name: digest(content(model, readers[f"{name}_read"].inputs[0])) for name in names}


def content(model: ir.Model, value: ir.Value | None) -> Array:
    """Return what a value holds that hangs on constants alone, as ONNX Runtime computes it."""
    import onnxruntime as ort

    assert value is not None
    tensor = walk.constant_tensor(value)
    if tensor is not None:
        return np.asarray(tensor.numpy())
    proto = ir.to_proto(fragment(_behind(value), [value], [], walk.all_imports(model)))
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {})[0])


def _behind(value: ir.Value) -> list[ir.Node]:
    node = value.producer()
    if node is None:
        return []
    return [*(one for read in node.inputs if read is not None for one in _behind(read)), node]


def _shape(size: int, rng: np.random.Generator) -> list[int]:
    divisors = [one for one in range(1, min(size, 64) + 1) if size % one == 0]
    first = int(divisors[rng.integers(len(divisors))])
    return [first, size // first]


def _add(model: ir.Model, name: str, array: Array, floor: ir.Value) -> None:
    graph = model.graph
    value = ir.Value(name=name, shape=ir.Shape(array.shape), type=ir.TensorType(ir.DataType.FLOAT))
    value.const_value = ir.tensor(array, name=name)
    graph.register_initializer(value)
    # Each its own floor, or readers of equal copies would be one.
    step = ir.Value(name=f"{name}_step", shape=ir.Shape([]), type=ir.TensorType(ir.DataType.FLOAT))
    step.const_value = ir.tensor(np.float32(len(graph.outputs)), name=step.name)
    graph.register_initializer(step)
    raised = ir.node("Add", [floor, step], name=f"{name}_floor")
    raised.outputs[0].name = f"{name}_raised"
    read = ir.node("Max", [value, raised.outputs[0]], name=f"{name}_reader")
    node = ir.node("ReduceMax", read.outputs, attributes={"keepdims": 1}, name=f"{name}_end")
    read.outputs[0].name = f"{name}_read"
    out = node.outputs[0]
    out.name, out.type = f"{name}_largest", ir.TensorType(ir.DataType.FLOAT)
    out.shape = ir.Shape([1] * array.ndim)
    graph.extend([raised, read, node])
    graph.outputs.append(out)

"""What differs through no fault of a pass: what the runtime gets wrong, and what hangs on rounding."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime

from graphopt import walk
from graphopt.comparison import Comparison

SEED = 0
NUDGES, NUDGE, HALF_NUDGE = 4, 1e-6, 1e-3
HALVES = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)

Feed = dict[str, np.ndarray[Any, Any]]


def opened(model: onnx.ModelProto | ir.Model) -> Callable[[Feed], dict[str, Any]]:
    """Return a model as a function, run by ONNX Runtime without its optimizations."""
    proto = ir.to_proto(model) if isinstance(model, ir.Model) else model
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return lambda feed: dict(zip(names, session.run(None, feed), strict=True))


def runtime_is_wrong(proto: onnx.ModelProto, feed: Feed) -> bool:
    """Tell whether some value of the original graph has another shape at run time than the standard says.

    ONNX Runtime 1.31 reduces an empty tensor to itself: ReduceMean of [0, 4, 3, 3] over the last two axes is
    [0, 4, 3, 3]. What depends on that is nothing to keep.
    """
    model = onnx.shape_inference.infer_shapes(proto)
    made = {name for node in model.graph.node for name in node.output}
    known = [info for info in model.graph.value_info if info.name in made and info.type.HasField("tensor_type")]
    model.graph.output.extend(known)
    try:
        outputs = opened(model)(feed)
    except Exception:  # any: types of inner values may be such that they cannot be outputs
        return False
    return any(
        len(dims) != outputs[info.name].ndim
        or any(dim.dim_value != size for dim, size in zip(dims, outputs[info.name].shape, strict=True) if dim.dim_value)
        for info in model.graph.output
        if info.type.tensor_type.HasField("shape")
        for dims in [info.type.tensor_type.shape.dim]
    )


def hangs_on_rounding(model: ir.Model, feed: Feed, outputs: dict[str, Any]) -> bool:
    """Tell whether inputs nudged by less than rounding already move the outputs beyond it."""
    rng, comparison, run = np.random.default_rng(SEED), Comparison(), opened(model)
    # Where numbers pass through half precision, that is what rounding means; whether they do is the runtime's choice:
    # it drops casts to float16 and back, even without optimizations.
    nudge = HALF_NUDGE if any(is_half(node) for node in walk.every_node(model)) else NUDGE
    for _ in range(NUDGES):
        nudged = {
            name: np.asarray(a * (1 + nudge * rng.uniform(-1, 1, a.shape)), a.dtype) if a.dtype.kind == "f" else a
            for name, a in feed.items()
        }
        comparison.update(outputs, run(nudged))
    return not comparison.within()


def is_half(node: ir.Node) -> bool:
    """Tell whether a node gives numbers of half precision."""
    if walk.is_onnx_op(node, "Cast"):
        return node.attributes.get_int("to", 0) in HALVES
    return any(value.dtype in HALVES for value in node.outputs)

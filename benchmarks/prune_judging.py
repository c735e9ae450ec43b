"""What pruning took away, read off the file itself: multiplications, parameters, zeros, and whether a pattern holds.

Needs onnx and onnxruntime only, so that the peers' interpreter measures alike.
"""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime

Array = np.ndarray[Any, Any]
LAYERS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
RECURRENT = ("LSTM", "GRU", "RNN")
# Of the 2:4 pattern: how many consecutive inputs, and the most of them that are not zero.
BLOCK, KEPT = 4, 2


def macs(model: Path, feeds: Mapping[str, Array]) -> int:
    """Return the multiply-accumulates of linear and recurrent layers in one run, by the shapes of a profiled run."""
    with tempfile.TemporaryDirectory() as folder:
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.log_severity_level = 4
        options.enable_profiling = True
        options.profile_file_prefix = f"{folder}/run"
        session = onnxruntime.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
        session.run(None, dict(feeds))
        events = json.loads(Path(session.end_profiling()).read_text())
    return sum(macs_of(event["args"]) for event in events if "output_type_shape" in event.get("args", {}))


def macs_of(node: dict[str, Any]) -> int:
    """Return the multiply-accumulates of one node, from its entry in a profile."""
    kind = node["op_name"]
    if kind not in LAYERS and kind not in RECURRENT:
        return 0
    reads = [next(iter(one.values())) for one in node["input_type_shape"]]
    made = next(iter(node["output_type_shape"][0].values()))
    if kind == "Conv":
        return math.prod(made) * math.prod(reads[1][1:])
    if kind == "ConvTranspose":
        return math.prod(reads[0]) * math.prod(reads[1][1:])
    if kind == "Gemm":
        return math.prod(reads[0]) * int(made[-1])
    if kind == "MatMul":
        return math.prod(made) * int(reads[0][-1])
    steps, batch = reads[0][:2]
    return int(steps * batch * (math.prod(reads[1]) + math.prod(reads[2])))


def parameters(model: onnx.ModelProto) -> int:
    """Return the number of floating-point constants of two axes or more, subgraphs included."""
    return sum(one.size for graph in graphs(model.graph) for one in constants(graph).values() if one.ndim > 1)


def zeros(model: onnx.ModelProto) -> float:
    """Return which share of the weights that linear layers read directly is zero."""
    weights = [weight for _, weight in layer_weights(model)]
    count = sum(weight.size for weight in weights)
    return sum(weight.size - np.count_nonzero(weight) for weight in weights) / max(count, 1)


def in_pattern(model: onnx.ModelProto) -> float:
    """Return which share of the MatMul and Gemm weights lies in layers whose inputs all follow 2:4."""
    held = total = 0
    for node, weight in layer_weights(model):
        if weight.ndim != 2:
            continue
        transposed = any(one.name == "transB" and one.i for one in node.attribute)
        matrix = weight if transposed else weight.T
        total += matrix.size
        if matrix.shape[1] % BLOCK == 0:
            blocks = np.count_nonzero(matrix.reshape(matrix.shape[0], -1, BLOCK), axis=2)
            held += matrix.size if bool((blocks <= KEPT).all()) else 0
    return held / max(total, 1)


def layer_weights(model: onnx.ModelProto) -> Iterator[tuple[onnx.NodeProto, Array]]:
    """Yield the linear layers with a constant weight, and that."""
    known: dict[str, Array] = {}
    for graph in graphs(model.graph):
        known |= constants(graph)
        for node in graph.node:
            if node.op_type in LAYERS:
                weights = [known[name] for name in node.input[:2] if name in known and known[name].ndim > 1]
                yield from ((node, weight) for weight in weights[:1])


def constants(graph: onnx.GraphProto) -> dict[str, Array]:
    """Return the floating-point constants of a graph by name, from initializers and Constant nodes."""
    found = {one.name: onnx.numpy_helper.to_array(one) for one in graph.initializer}
    for node in graph.node:
        if node.op_type == "Constant" and node.attribute[0].name == "value":
            found[node.output[0]] = onnx.numpy_helper.to_array(node.attribute[0].t)
    return {name: one for name, one in found.items() if np.issubdtype(one.dtype, np.floating)}


def graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    """Yield a graph and, after it, those inside its nodes."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs) if attribute.type in (5, 10) else ():
                yield from graphs(inner)


def run_alike(original: Path, made: Path, feeds: Mapping[str, Array]) -> str:
    """Return what is wrong with a smaller model, or nothing: by onnx's check of shapes and runs of two batches."""
    try:
        onnx.checker.check_model(str(made), full_check=True)
    except Exception as error:  # any: whatever it says is a finding
        if not fails_itself(original):
            return f"shapes: {str(error).strip().splitlines()[-1][:100]}"
    for samples in (feeds, {name: np.concatenate([x, x]) if x.ndim else x for name, x in feeds.items()}):
        try:
            expected = outputs(original, samples)
        except Exception:  # any: a batch that is fixed
            continue
        try:
            found = outputs(made, samples)
        except Exception as error:  # any: a file that does not run is a finding
            return f"does not run: {str(error).strip().splitlines()[-1][:100]}"
        if [x.shape for x in found] != [x.shape for x in expected]:
            return "outputs of other shapes"
        if not all(np.isfinite(x).all() for x in found if x.dtype.kind == "f"):
            return "outputs that are not finite"
    return ""


def fails_itself(original: Path) -> bool:
    """Return whether onnx's own check refuses a model that nothing was done to."""
    try:
        onnx.checker.check_model(str(original), full_check=True)
    except Exception:  # any
        return True
    return False


def outputs(model: Path, feeds: Mapping[str, Array]) -> list[Array]:
    """Return the outputs of one run, no optimization on."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
    return list(session.run(None, dict(feeds)))

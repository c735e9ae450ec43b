"""Models with Q and DQ put anywhere: what no tool would write, and `explain` must see through all the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

import graphopt
from graphopt import walk
from graphopt.shapes import infer_shapes

SCALE, WEIGHT_SCALE = 0.02, 0.01
# Of all values in float, and of all weights and biases, how many are put in codes.
ACTIVATIONS, WEIGHTS, BIASES = 0.7, 0.85, 0.6
_PRODUCTS = {"Conv": 0, "Gemm": 1, "MatMul": 1}
_KINDS = (("uint8", 128), ("uint8", 0), ("int8", 0), ("uint16", 32768))
_FIRST_16_BIT_OPSET, _FIRST_PER_CHANNEL_OPSET = 21, 13


def scatter(source: Path, output: Path, seed: int) -> None:
    """Write a model with Q and DQ behind many of its values, in any dtypes, and codes for many of its weights."""
    model = graphopt.load(source)
    infer_shapes(model)
    rng = np.random.default_rng(seed)
    kinds = [kind for kind in _KINDS if walk.opset(model) >= _FIRST_16_BIT_OPSET or "16" not in kind[0]]
    # Most models of people's use one dtype throughout.
    mixed = rng.random() < 0.4
    scattering = _Scattering(model, rng, kinds if mixed else [kinds[rng.integers(len(kinds))]])
    for graph in walk.graphs_within(model.graph):
        for node in list(graph):
            scattering.weigh(node)
        for value in [value for node in list(graph) for value in node.outputs] + list(graph.inputs):
            if value.dtype == ir.DataType.FLOAT and rng.random() < ACTIVATIONS:
                scattering.quantize(value)
    graphopt.save(model, output)


class _Scattering:
    def __init__(self, model: ir.Model, rng: np.random.Generator, kinds: list[tuple[str, int]]) -> None:
        self.model, self.rng, self.kinds = model, rng, kinds
        self._count = 0

    def const(self, array: Any) -> ir.Value:
        self._count += 1
        value = ir.Value(name=f"scattered_{self._count}", const_value=ir.tensor(np.asarray(array)))
        value.dtype, value.shape = value.const_value.dtype, value.const_value.shape  # type: ignore[union-attr]
        self.model.graph.initializers[value.name or ""] = value
        return value

    def node(self, op: str, inputs: list[ir.Value], **attributes: int) -> ir.Node:
        self._count += 1
        made = ir.node(op, inputs, attributes=attributes, name=f"{op}_{self._count}")
        made.outputs[0].name = f"scattered_{self._count}_out"
        return made

    def quantize(self, value: ir.Value) -> None:
        """Let all readers of a value, or some of them, read it behind Q and one DQ or several."""
        uses = [use for use in value.uses() if use.node.op_type not in ("QuantizeLinear", "DequantizeLinear")]
        graph = value.graph
        uses = [use for use in uses if use.node.graph is graph]
        if not uses or graph is None:
            return
        dtype, zero = self.kinds[self.rng.integers(len(self.kinds))]
        scale = self.const(np.float32(SCALE if self.rng.random() < 0.8 else 0.05))
        grid = [scale, self.const(np.array(zero, dtype))]
        quantize = self.node("QuantizeLinear", [value, *grid])
        producer = value.producer()
        if producer is not None:
            graph.insert_after(producer, [quantize])
        else:
            graph.insert_before(graph[0], [quantize])
        apart, partly = self.rng.random() < 0.3, self.rng.random() < 0.15
        after, shared = quantize, None
        for use in uses:
            if partly and self.rng.random() < 0.5:
                continue
            if shared is None or apart:
                shared = self.node("DequantizeLinear", [quantize.outputs[0], *grid])
                graph.insert_after(after, [shared])
                after = shared
            use.node.replace_input_with(use.idx, shared.outputs[0])
        if after is quantize:
            graph.remove(quantize, safe=True)

    def weigh(self, node: ir.Node) -> None:
        """Put the weight of a product in codes, and its bias."""
        if not walk.is_onnx_op(node, *_PRODUCTS) or len(node.inputs) < 2:
            return
        tensor = walk.constant_tensor(node.inputs[1])
        if tensor is None or tensor.dtype != ir.DataType.FLOAT or len(walk.dims(tensor)) < 2:
            return
        axis = _PRODUCTS[node.op_type]
        if node.op_type == "Gemm" and node.attributes.get_int("transB", 0):
            axis = 0
        outputs = walk.dims(tensor)[axis]
        per_channel = self.rng.random() < 0.7 and walk.opset(self.model) >= _FIRST_PER_CHANNEL_OPSET
        count = (outputs,) if per_channel else ()
        if self.rng.random() < WEIGHTS:
            codes = self.rng.integers(-60, 60, walk.dims(tensor)).astype(np.int8)
            inputs = [self.const(codes), self.const(np.full(count, WEIGHT_SCALE, np.float32))]
            inputs += [self.const(np.zeros(count, np.int8))] * int(self.rng.random() < 0.8)
            made = self.node("DequantizeLinear", inputs, **({"axis": axis} if per_channel else {}))
            node.graph.insert_before(node, [made])  # type: ignore[union-attr]
            node.replace_input_with(1, made.outputs[0])
        bias = walk.constant_tensor(node.inputs[2]) if len(node.inputs) > 2 else None
        if bias is not None and walk.dims(bias) == (outputs,) and self.rng.random() < BIASES:
            scales = np.full(count, SCALE * WEIGHT_SCALE, np.float32)
            inputs = [self.const(np.ones(outputs, np.int32)), self.const(scales)]
            made = self.node("DequantizeLinear", inputs, **({"axis": 0} if per_channel else {}))
            node.graph.insert_before(node, [made])  # type: ignore[union-attr]
            node.replace_input_with(2, made.outputs[0])

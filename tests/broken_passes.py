"""Passes broken on purpose, each at one node of a network of some 350 nodes: what finds faults must find that node.

Each pass is one class, `Broken`, told which fault to make. It goes through the whole network, makes an honest edit of
every fourth node or so, as passes do, and makes its one mistake on the way.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import onnx
import onnx_ir as ir

from graphopt import walk
from graphopt.authoring import Context, Guarantee, Pass
from graphopt.options import opt

from .pass_runs import loaded

LAYERS, WIDTH = 32, 16
# Layers whose weight is stored in int8, and those that end in an If whose branches capture a value.
QUANTIZED_EVERY, GATED_EVERY = 4, 8
# The output in the middle of the network hangs on this layer.
TAPPED = 11

LAYER = """
  {weight}
  [fc_{i}] fc_{i} = {product} (h_{i}, w_{i})
  [bias_{i}] biased_{i} = Add (fc_{i}, b_{i})
  [relu_{i}] active_{i} = Relu (biased_{i})
  [diff_{i}] difference_{i} = Sub (active_{i}, h_{i})
  [left_{i}] left_{i} = Slice (difference_{i}, four, sixteen, last)
  [right_{i}] right_{i} = Slice (difference_{i}, zero, four, last)
  [join_{i}] joined_{i} = Concat <axis = 1> (left_{i}, right_{i})
  [norm_{i}] normal_{i} = LayerNormalization (joined_{i}, g_{i}, o_{i})
  [sum_{i}] summed_{i} = Add (h_{i}, normal_{i})
  {gate}
"""
GATE = """
  [gate_{i}] gated_{i} = If (c) <
    then_branch = then_{i} () => (float[n,16] then_out_{i}) {{
      [then_tanh_{i}] then_mild_{i} = Tanh (normal_{i}) [then_add_{i}] then_out_{i} = Add (summed_{i}, then_mild_{i})
    }},
    else_branch = else_{i} () => (float[n,16] else_out_{i}) {{
      [else_sin_{i}] else_mild_{i} = Sin (normal_{i}) [else_add_{i}] else_out_{i} = Add (summed_{i}, else_mild_{i})
    }}
  >
  [shift_{i}] h_{next} = Identity (gated_{i})
"""


@functools.cache
def network() -> onnx.ModelProto:
    """Return the network, whole: ``x`` [n, 16] and a switch ``c`` to ``y`` and ``early`` [n, 16]."""
    layers = []
    for i in range(LAYERS):
        weight = f"[dq_{i}] w_{i} = DequantizeLinear <axis = 1> (q_{i}, s_{i}, z_{i})" if _is_quantized(i) else ""
        gate = GATE if i % GATED_EVERY == GATED_EVERY - 1 else "[shift_{i}] h_{next} = Identity (summed_{i})"
        # ONNX Runtime computes a MatMul on dequantized weights with less precision, but not wherever it could.
        product = "Gemm" if _is_quantized(i) else "MatMul"
        layers.append(LAYER.format(product=product, weight=weight, gate=gate.format(i=i, next=i + 1), i=i))
    layers.insert(TAPPED + 1, f"[tap_{TAPPED}] early = Tanh (h_{TAPPED + 1})")
    nodes = "".join(layers)
    model = onnx.parser.parse_model(f"""
      <ir_version: 8, opset_import: ["" : 17]>
      broken (float[n,16] x, bool c) => (float[n,16] y, float[n,16] early)
      <int64[1] zero = {{0}}, int64[1] four = {{4}}, int64[1] sixteen = {{16}}, int64[1] last = {{1}}> {{
        [start] h_0 = Identity (x)
        {nodes}
        [end] y = Mul (h_{LAYERS}, g_0)
      }}
    """)
    for name, array in _weights().items():
        model.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    return onnx.shape_inference.infer_shapes(model, strict_mode=True)


def _is_quantized(layer: int) -> bool:
    return layer % QUANTIZED_EVERY == QUANTIZED_EVERY - 1


def _weights() -> Mapping[str, Any]:
    rng, weights = np.random.default_rng(7), dict[str, Any]()
    for i in range(LAYERS):
        matrix = rng.standard_normal((WIDTH, WIDTH)).astype(np.float32) / 4
        if _is_quantized(i):
            scale = np.abs(matrix).max(0) / np.linspace(60, 120, WIDTH, dtype=np.float32)
            zero_point = rng.integers(-5, 5, WIDTH).astype(np.int8)
            weights |= {f"q_{i}": (np.round(matrix / scale) + zero_point).astype(np.int8)}
            weights |= {f"s_{i}": scale, f"z_{i}": zero_point}
        else:
            weights[f"w_{i}"] = matrix
        weights[f"b_{i}"] = rng.standard_normal(WIDTH).astype(np.float32) / 2
        weights[f"g_{i}"] = rng.uniform(0.5, 1.5, WIDTH).astype(np.float32)
        weights[f"o_{i}"] = rng.standard_normal(WIDTH).astype(np.float32) / 8
    return weights


def model() -> ir.Model:
    """Return the network as `graphopt.load` gives it, with origins stamped."""
    return loaded(network())


def samples(count: int = 8) -> list[dict[str, Any]]:
    """Return inputs of the network, two rows each."""
    rng = np.random.default_rng(3)
    return [{"x": rng.standard_normal((2, WIDTH)).astype(np.float32), "c": np.array(bool(i % 2))} for i in range(count)]


# One function for each mistake: it is made at a node, inside an edit of the pass.
Mistake = Callable[[ir.Node, Context], None]


def _constant(node: ir.Node, index: int) -> tuple[ir.Value, Any]:
    value = node.inputs[index]
    assert value is not None
    tensor = walk.constant_tensor(value)
    assert tensor is not None
    return value, tensor.numpy().copy()


def wrong_constant(node: ir.Node, ctx: Context) -> None:
    weight, array = _constant(node, 1)
    array[3, 5] += 0.25
    ctx.rewriter.set_weight(weight, array)


def swapped_operands(node: ir.Node, ctx: Context) -> None:
    first, second = node.inputs
    ctx.rewriter.set_input(node, 0, second)
    ctx.rewriter.set_input(node, 1, first)


def off_by_one_slice(node: ir.Node, ctx: Context) -> None:
    # The shape stays, as with the mistakes that are hard to find.
    ctx.rewriter.set_input(node, 1, ctx.rewriter.const(np.array([3]), "start", near=node))
    ctx.rewriter.set_input(node, 2, ctx.rewriter.const(np.array([15]), "stop", near=node))


def dropped_bias(node: ir.Node, ctx: Context) -> None:
    product = node.inputs[0]
    assert product is not None
    ctx.rewriter.replace(node.outputs[0], product)
    ctx.rewriter.erase(node)


def wrong_axis(node: ir.Node, ctx: Context) -> None:
    ctx.rewriter.set_attribute(node, "axis", 0)


def wrong_zero_point(node: ir.Node, ctx: Context) -> None:
    zero_point, array = _constant(node, 2)
    ctx.rewriter.set_weight(zero_point, array + np.int8(3))


def stale_shape(node: ir.Node, ctx: Context) -> None:
    node.outputs[0].shape = ir.Shape(["n", WIDTH + 1])
    _touch(node, ctx)


def lost_output_name(node: ir.Node, ctx: Context) -> None:
    node.outputs[0].name = f"{node.outputs[0].name}_1"
    _touch(node, ctx)


def broken_capture(node: ir.Node, ctx: Context) -> None:
    # A value that is made only behind the If whose branch reads it.
    ctx.rewriter.set_input(node, 0, _node(ctx.model, "join_16").outputs[0])


def wrong_dtype(node: ir.Node, ctx: Context) -> None:
    node.outputs[0].type = ir.TensorType(ir.DataType.INT32)
    _touch(node, ctx)


def non_determinism(node: ir.Node, ctx: Context) -> None:
    old = node.outputs[0]
    noise = ctx.rewriter.make("RandomNormalLike", [old], {"scale": 0.1}, sources=[node])
    ctx.rewriter.insert_after(noise, node)
    noisy = ctx.rewriter.make("Add", [old, noise.outputs[0]], sources=[node])
    ctx.rewriter.insert_after(noisy, noise)
    for use in [use for use in old.uses() if use.node not in (noise, noisy)]:
        ctx.rewriter.set_input(use.node, use.idx, noisy.outputs[0])


def silent_no_op(node: ir.Node, ctx: Context) -> None:
    """Say that something was done to a node that is left as it was, while all others like it were done."""
    _touch(node, ctx)


def _touch(node: ir.Node, ctx: Context) -> None:
    """Make an edit of a node that changes nothing."""
    ctx.rewriter.set_input(node, 0, node.inputs[0])


def _node(model: ir.Model, name: str) -> ir.Node:
    return next(node for node in walk.every_node(model) if node.name == name)


@dataclass(frozen=True)
class Fault:
    """One mistake.

    Attributes:
        at: The node it is made at: its name in the network, which is its origin too.
        make: Makes it.
        shows: How it shows: in the ``numbers``; in the ``structure`` of the model, without a run; in that the model
            is ``random``; or in that ``nothing`` became of the node although the pass says so.
    """

    at: str
    make: Mistake
    shows: Literal["numbers", "structure", "random", "nothing"] = "numbers"


FAULTS: Mapping[str, Fault] = {
    "wrong-constant": Fault("fc_21", wrong_constant),
    "swapped-operands": Fault("diff_17", swapped_operands),
    "off-by-one-slice": Fault("left_9", off_by_one_slice),
    "dropped-bias": Fault("bias_26", dropped_bias),
    "wrong-axis": Fault("dq_19", wrong_axis),
    "wrong-zero-point": Fault("dq_11", wrong_zero_point),
    "stale-shape": Fault("join_14", stale_shape, "structure"),
    "lost-output-name": Fault(f"tap_{TAPPED}", lost_output_name, "structure"),
    "broken-capture": Fault("else_add_7", broken_capture, "structure"),
    "wrong-dtype": Fault("norm_5", wrong_dtype, "structure"),
    "non-determinism": Fault("sum_23", non_determinism, "random"),
    "silent-no-op": Fault("relu_13", silent_no_op, "nothing"),
}


@dataclass(frozen=True)
class Broken(Pass):
    """Write every Relu as a Max with 0, and every other Sub as a sum, and make one mistake on the way."""

    fault: str = opt("", help="the mistake to make; none if empty")

    name = "broken"
    guarantee = Guarantee.EQUIVALENT

    def run(self, model: ir.Model, ctx: Context) -> None:
        fault = FAULTS.get(self.fault)
        for node in [one for outer in model.graph for one in (outer, *walk.nodes_within(outer))]:
            if fault is not None and node.name == fault.at:
                with ctx.rewriter.edit(self.fault, node):
                    fault.make(node, ctx)
            elif node.op_type == "Relu":
                zero = ctx.rewriter.const(np.zeros((), np.float32), "nought", near=node)
                self._become(ctx, node, "Max", [node.inputs[0], zero])
            elif node.op_type == "Sub" and node.name is not None and int(node.name.rpartition("_")[2]) % 2:
                with ctx.rewriter.edit("sub-to-add", node):
                    minus = ctx.rewriter.make("Neg", [node.inputs[1]], sources=[node])
                    ctx.rewriter.insert(minus, before=node)
                    self._become(ctx, node, "Add", [node.inputs[0], minus.outputs[0]])

    def _become(self, ctx: Context, node: ir.Node, op_type: str, inputs: Sequence[ir.Value | None]) -> None:
        made = ctx.rewriter.make(op_type, inputs, sources=[node])
        with ctx.rewriter.edit(f"{node.op_type}-to-{op_type}".lower(), node):
            ctx.rewriter.insert(made, before=node)
            ctx.rewriter.replace(node.outputs[0], made.outputs[0])
            ctx.rewriter.erase(node)


# (Name, pass, the node at fault), as the tests take them.
BROKEN: Sequence[tuple[str, Pass, str]] = [(name, Broken(fault=name), fault.at) for name, fault in FAULTS.items()]

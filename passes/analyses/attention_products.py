"""Products of attention: queries with keys, and probabilities with values."""

from __future__ import annotations

import onnx_ir as ir

from graphopt import walk

# What may stand between a product and the Softmax: scales and masks, and how heads are laid out.
_BETWEEN = ("Add", "Cast", "Div", "Mul", "Reshape", "Sub", "Transpose", "Where")


def is_attention_product(node: ir.Node) -> bool:
    """Return whether a MatMul of two activations reads what a Softmax makes, or makes what a Softmax reads."""
    if not walk.is_onnx_op(node, "MatMul"):
        return False
    maker = node.inputs[0].producer() if node.inputs[0] is not None else None
    while maker is not None and walk.is_onnx_op(maker, *_BETWEEN):
        maker = maker.inputs[0].producer() if maker.inputs and maker.inputs[0] is not None else None
    if maker is not None and walk.is_onnx_op(maker, "Softmax"):
        return True
    reader: ir.Node | None = node
    while reader is not None:
        uses = reader.outputs[0].uses()
        reader = next((use.node for use in uses), None) if len(uses) == 1 else None
        if reader is not None and walk.is_onnx_op(reader, "Softmax"):
            return True
        if reader is not None and not walk.is_onnx_op(reader, *_BETWEEN):
            return False
    return False

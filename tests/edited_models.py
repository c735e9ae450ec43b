"""Small models before and after edits, for tests of what shows them side by side."""

from __future__ import annotations

import numpy as np
import onnx.parser
import onnx_ir as ir

from graphopt import provenance, walk
from graphopt.rewriter import Rewriter

MODEL = """<ir_version: 8, opset_import: ["": 17]>
agraph (float[N,4] x) => (float[N,4] y)
<float[4,4] w = {1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16}, float[4] b = {1,2,3,4}> {
  [product] a = MatMul(x, w)
  [same] s = Identity(a)
  [bias] c = Add(s, b)
  [squash] r = Relu(c)
  [scale] y = Mul(r, r)
}"""
NESTED = """<ir_version: 8, opset_import: ["": 17]>
agraph (float[2,3] x, bool c) => (float[2,3] z) <float[3] w = {1.0, 2.0, 3.0}> {
  [sum] a = Add(x, w)
  [choice] z = If (c) <
    then_branch = t () => (float[2,3] p) { [neg] p = Neg(a) },
    else_branch = e () => (float[2,3] q) { [abs] q = Abs(a) }
  >
}"""


def parsed(text: str) -> ir.Model:
    model = ir.from_proto(onnx.parser.parse_model(text))
    provenance.stamp(model)
    return model


def named(model: ir.Model, name: str) -> ir.Node:
    return next(node for node in walk.every_node(model) if node.name == name)


def edited() -> tuple[ir.Model, ir.Model]:
    """A model and what became of it: `same` is gone, `bias` has another weight, `squash` is now a Clip and a Neg."""
    before = parsed(MODEL)
    after = before.clone()
    rewriter = Rewriter(after)
    same, bias, squash = (named(after, name) for name in ("same", "bias", "squash"))
    with rewriter.edit("bypass", same):
        rewriter.replace(same.outputs[0], same.inputs[0])
        rewriter.erase(same)
    with rewriter.edit("weight", bias):
        rewriter.set_weight(after.graph.initializers["b"], np.zeros(4, np.float32))
    with rewriter.edit("squash", squash):
        clip = rewriter.insert(rewriter.make("Clip", [squash.inputs[0]], sources=[squash]), before=squash)
        negated = rewriter.insert(rewriter.make("Neg", [clip.outputs[0]], sources=[squash]), before=squash)
        rewriter.replace(squash.outputs[0], negated.outputs[0])
        rewriter.erase(squash)
    return before, after

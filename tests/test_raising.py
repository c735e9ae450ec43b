"""Raising: what a golden case cannot say, and many parameters at random against the parts."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np
import onnx
import onnx_ir as ir
import pytest

import graphopt
from graphopt import registry
from graphopt.comparison import Comparison
from graphopt.generated import generated_feeds
from graphopt.passes.raising.raise_operators import RaiseOperators
from graphopt.passes.raising.runtime_operators import RuntimeOperators
from graphopt.rewriter import Rewriter
from graphopt.target import Target

from .graph_generator import OPSETS, Recipe, build
from .pass_runs import loaded, outputs_of, run_passes

MOTIFS = ("written_activation", "written_norm", "residual_norm", "heads_attention")
PASSES = "raise-operators,runtime-operators"
PORTABLE, X86 = (registry.find("TARGETS", name) for name in ("portable", "ort-cpu-x86"))

GROUP_NORM = """
<ir_version: 10, opset_import: ["" : 21]>
g (float[n, 4, 3, 3] x) => (float[n, 4, 3, 3] y)
<int64[3] groups = {0, 2, -1}, float[2] s = {1, 1}, float[2] b = {0, 0}, int64[4] back = {0, 4, 3, 3},
 float[4, 1, 1] gamma = {1, 2, 3, 4}, float[1, 4, 1, 1] beta = {0, 1, 0, 2}>
{
  rows = Reshape(x, groups)
  normal = InstanceNormalization<epsilon = 0.01>(rows, s, b)
  whole = Reshape(normal, back)
  scaled = Mul(whole, gamma)
  y = Add(scaled, beta)
}
"""
SWISH = """
<ir_version: 10, opset_import: ["" : 24]>
g (float[n, 4] x) => (float[n, 4] y) <float alpha = {1.5}>
{
  scaled = Mul(x, alpha)
  gate = Sigmoid(scaled)
  y = Mul(x, gate)
}
"""


def generated(seeds: range) -> Iterator[onnx.ModelProto]:
    rng = np.random.default_rng(0)
    for seed in seeds:
        steps = tuple((MOTIFS[(seed + i) % len(MOTIFS)], int(rng.integers(1 << 16))) for i in range(4))
        yield build(Recipe(opset=OPSETS[seed % len(OPSETS)], ir_version=10, steps=steps, annotated=bool(seed % 2)))


def operators(model: ir.Model) -> list[str]:
    return [node.op_type for node in model.graph]


def assert_equivalent(before: onnx.ModelProto, after: ir.Model) -> None:
    for feed in generated_feeds(after, seed=0):
        comparison = Comparison()
        comparison.update(outputs_of(before, feed), outputs_of(after, feed))
        assert comparison.within(), comparison.worst


def test_raised_parts_compute_the_same() -> None:
    fired: set[str] = set()
    for proto in generated(range(34)):
        run = run_passes(loaded(proto), PASSES)
        fired |= {edit.rule for edit in run.edits}
        assert_equivalent(proto, run.model)
    assert {"attention", "multi-head-attention", "rotary-embedding", "rms-norm", "layer-norm"} <= fired
    assert {"gelu", "fast-gelu", "quick-gelu", "lasting-sum", "hard-swish", "mish"} <= fired


@pytest.mark.parametrize(("text", "operator"), [(GROUP_NORM, "GroupNormalization"), (SWISH, "Swish")])
def test_operator_that_loses_on_a_target_is_raised_elsewhere_only(text: str, operator: str) -> None:
    proto = onnx.parser.parse_model(text)
    raised = graphopt.optimize(ir.from_proto(proto), RaiseOperators(), target="portable").model
    assert operators(raised) == [operator]
    assert_equivalent(proto, raised)
    left = graphopt.optimize(ir.from_proto(proto), RaiseOperators(), target="ort-cpu-x86").model
    assert operator not in operators(left)


GROUPS_SHARE_CHANNELS = """
<ir_version: 10, opset_import: ["" : 21]>
g (float[2, 3, 2, 2] x) => (float[2, 3, 2, 2] y)
<int64[3] groups = {2, 2, -1}, float[2] s = {1, 1}, float[2] b = {0, 0}, int64[4] back = {2, 3, 2, 2},
 float[3, 1, 1] gamma = {1, 2, 3}, float[3, 1, 1] beta = {0, 1, 2}>
{
  rows = Reshape(x, groups)
  normal = InstanceNormalization(rows, s, b)
  whole = Reshape(normal, back)
  scaled = Mul(whole, gamma)
  y = Add(scaled, beta)
}
"""


def test_groups_that_share_channels_are_no_group_norm() -> None:
    proto = onnx.parser.parse_model(GROUPS_SHARE_CHANNELS)
    model = graphopt.optimize(ir.from_proto(proto), RaiseOperators(), target="portable").model
    assert "GroupNormalization" not in operators(model)
    assert_equivalent(proto, model)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("gamma = {1, 2, 3, 4}", "gamma = {1, 2, 3, 4}"),
        ("float[2] s = {1, 1}", "float[2] s = {1, 2}"),
        ("float[4, 1, 1] gamma = {1, 2, 3, 4}", "float[3] gamma = {1, 2, 3}"),
        ('["" : 21]', '["" : 20]'),
        ("=> (float[n, 4, 3, 3] y)", "=> (float[n, 4, 3, 3] y, float[n, 4, 3, 3] whole)"),
    ],
)
def test_group_norm_holds_back(old: str, new: str) -> None:
    assert old in GROUP_NORM
    proto = onnx.parser.parse_model(GROUP_NORM.replace(old, new))
    model = graphopt.optimize(ir.from_proto(proto), RaiseOperators(), target="portable").model
    assert ("GroupNormalization" in operators(model)) == (old == new)
    assert_equivalent(proto, model)


def test_target_without_operators_of_its_own_is_given_none() -> None:
    assert not RuntimeOperators().rules(PORTABLE)
    names = {rule.name for rule in RuntimeOperators().rules(dataclasses.replace(X86, slow_ops=frozenset()))}
    assert "multi-head-attention" in names
    assert "lasting-sum" not in names


def test_each_slow_operator_has_rules_that_know_it() -> None:
    def rules(target: Target) -> set[str]:
        return {rule.name for one in (RaiseOperators(), RuntimeOperators()) for rule in one.rules(target)}

    bare = dataclasses.replace(PORTABLE, slow_ops=frozenset())
    for name in X86.slow_ops:
        assert rules(bare) != rules(dataclasses.replace(bare, slow_ops=frozenset({name}))), name


FUNCTION = """
<ir_version: 10, opset_import: ["" : 17, "local" : 1]>
g (float[2] x) => (float[2] y) { y = local.f(x) }
<domain: "local", opset_import: ["" : 17]>
f (x) => (y) { y = Relu(x) }
"""


def test_domain_is_imported_where_the_node_is() -> None:
    model = ir.from_onnx_text(FUNCTION)
    [function] = model.functions.values()
    rewriter = Rewriter(model)
    rewriter.import_domain("com.microsoft", near=function[0])
    assert "com.microsoft" in function.opset_imports
    assert "com.microsoft" not in model.opset_imports
    rewriter.import_domain("com.microsoft", near=model.graph[0])
    rewriter.import_domain("", near=model.graph[0])
    assert model.opset_imports == {"": 17, "local": 1, "com.microsoft": 1}

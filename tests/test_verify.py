"""The structural verifier: each kind of damage is named."""

from __future__ import annotations

from collections.abc import Callable

import onnx.parser
import onnx_ir as ir
import pytest

from graphopt import provenance
from graphopt.errors import VerificationError
from graphopt.verify import SHOWN_PROBLEMS, Signature, problems_of, verify

SOUND = """<ir_version: 8, opset_import: ["": 17]>
agraph (float[2,3] x, bool c) => (float[2,3] y, float[2,3] z) <float[3] w = {1.0, 2.0, 3.0}> {
  a = Add(x, w)
  y = Relu(a)
  z = If (c) <
    then_branch = t () => (float[2,3] p) { p = Neg(a) },
    else_branch = e () => (float[2,3] q) { q = Abs(x) }
  >
}"""


def sound() -> ir.Model:
    model = ir.from_proto(onnx.parser.parse_model(SOUND))
    provenance.stamp(model)
    return model


def test_a_sound_model_passes() -> None:
    model = sound()
    verify(model, Signature.of(model), provenance_too=True)


def _reorder(model: ir.Model) -> None:
    add = model.graph[0]
    model.graph.remove(add)
    model.graph.append(add)


def _drop_producer(model: ir.Model) -> None:
    model.graph.remove(model.graph[0])


def _unknown_op(model: ir.Model) -> None:
    model.graph[1].op_type = "Rleu"


def _unknown_domain(model: ir.Model) -> None:
    model.graph[1].domain = "nowhere"


def _too_few_inputs(model: ir.Model) -> None:
    model.graph[0].resize_inputs(1)


def _missing_input(model: ir.Model) -> None:
    model.graph[0].replace_input_with(1, None)


def _unknown_attribute(model: ir.Model) -> None:
    model.graph[1].attributes.add(ir.AttrInt64("axis", 1))


def _missing_attribute(model: ir.Model) -> None:
    model.graph[1].op_type = "Concat"


def _stale_initializer_shape(model: ir.Model) -> None:
    model.graph.initializers["w"].shape = ir.Shape([4])


def _wrong_initializer_dtype(model: ir.Model) -> None:
    model.graph.initializers["w"].dtype = ir.DataType.INT64


def _empty_initializer(model: ir.Model) -> None:
    model.graph.initializers["w"].const_value = None


def _doubled_name(model: ir.Model) -> None:
    model.graph[1].outputs[0].name = "a"


def _hiding_name(model: ir.Model) -> None:
    branch = model.graph[2].attributes["then_branch"].as_graph()
    branch[0].outputs[0].name = "a"


def _renamed_output(model: ir.Model) -> None:
    model.graph.outputs[0].name = "other"


def _changed_output_dtype(model: ir.Model) -> None:
    model.graph.outputs[0].dtype = ir.DataType.DOUBLE


def _changed_rank(model: ir.Model) -> None:
    model.graph.inputs[0].shape = ir.Shape([6])


def _lost_output(model: ir.Model) -> None:
    model.graph.outputs.pop()


def _foreign_output(model: ir.Model) -> None:
    branch = model.graph[2].attributes["then_branch"].as_graph()
    branch.outputs[0] = ir.Value(name="p2", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([2, 3]))


def _held_by_removed(model: ir.Model) -> None:
    ir.Node("", "Neg", [model.graph[0].outputs[0]], name="ghost")


def _no_origin(model: ir.Model) -> None:
    model.graph[1].meta.clear()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_reorder, "reads `a` before it is produced"),
        (_drop_producer, "reads `a` before it is produced"),
        (_unknown_op, "(Rleu) does not exist in opset 17"),
        (_unknown_domain, "domain `nowhere`, which the model does not import"),
        (_too_few_inputs, "has 1 inputs, allowed are 2 to 2"),
        (_missing_input, "lacks input `B`"),
        (_unknown_attribute, "has no attribute `axis`"),
        (_missing_attribute, "lacks attribute `axis`"),
        (_stale_initializer_shape, "is declared [4] and holds"),
        (_wrong_initializer_dtype, "is declared INT64 and holds FLOAT"),
        (_empty_initializer, "initializer `w` holds nothing"),
        (_doubled_name, "the name `a` is taken 2 times"),
        (_hiding_name, "`a` hides an outer value"),
        (_renamed_output, "outputs changed from ['y', 'z'] to ['other', 'z']"),
        (_changed_output_dtype, "output `y` changed from FLOAT, rank 2 to DOUBLE, rank 2"),
        (_changed_rank, "input `x` changed from FLOAT, rank 2 to FLOAT, rank 1"),
        (_lost_output, "outputs changed"),
        (_foreign_output, "output `p2` is not produced in it"),
        (_held_by_removed, "is still held by the removed node `ghost`"),
        (_no_origin, "has no origin"),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_damage_is_named(damage: Callable[[ir.Model], None], message: str) -> None:
    model = sound()
    signature = Signature.of(model)
    damage(model)
    with pytest.raises(VerificationError) as caught:
        verify(model, signature, provenance_too=True)
    assert message in caught.value.message


def test_a_function_may_import_operator_sets_of_its_own() -> None:
    text = """<ir_version: 9, opset_import: ["": 17, "local": 1]>
    agraph (float[2] x) => (float[2] y) { y = local.f(x) }
    <domain: "local", opset_import: ["": 17, "other": 1]>
    f (a) => (b) { b = other.op(a) }"""
    verify(ir.from_proto(onnx.parser.parse_model(text)))


def test_problems_a_model_came_with_are_nobodys_fault() -> None:
    model = sound()
    _hiding_name(model)
    known = problems_of(model)
    assert known
    verify(model, known=known)
    _unknown_op(model)
    with pytest.raises(VerificationError, match="Rleu"):
        verify(model, known=known)


def test_of_many_problems_only_some_are_shown() -> None:
    model = sound()
    for node in model.graph:
        node.meta.clear()
    for name in ("then_branch", "else_branch"):
        for node in model.graph[2].attributes[name].as_graph():
            node.meta.clear()
            node.op_type = "Nope"
    with pytest.raises(VerificationError, match=r"and \d+ more"):
        verify(model, provenance_too=True)
    assert SHOWN_PROBLEMS < 7

"""The edit surface: names, outputs, provenance, journal, constants, nested graphs."""

from __future__ import annotations

import numpy as np
import onnx.parser
import onnx_ir as ir
import pytest

from graphopt import provenance, walk
from graphopt.rewriter import Journal, Rewriter
from graphopt.verify import Signature, verify

CHAIN = """<ir_version: 8, opset_import: ["": 17]>
agraph (float[2] x) => (float[2] y) <float[2] w = {1.0, 2.0}> {
  a = Add(x, w)
  b = Relu(a)
  y = Neg(b)
}"""

CAPTURE = """<ir_version: 8, opset_import: ["": 17]>
agraph (float[2] x, bool c) => (float[2] y) {
  a = Abs(x)
  y = If (c) <
    then_branch = t () => (float[2] p) { p = Neg(a) },
    else_branch = e () => (float[2] q) { q = Relu(x) }
  >
}"""

FUNCTION = """<ir_version: 8, opset_import: ["": 17, "local": 1]>
agraph (float[2] x) => (float[2] y) { y = local.twice(x) }
<domain: "local", opset_import: ["": 17]>
twice (a) => (b) { b = Add(a, a) }"""


CONSTANT = """<ir_version: 8, opset_import: ["": 17]>
agraph (float[2] x) => (float[2] y) {
  w = Constant <value: tensor = float[2] {1.0, 2.0}> ()
  y = Add(x, w)
}"""


def parse(text: str) -> ir.Model:
    model = ir.from_proto(onnx.parser.parse_model(text))
    provenance.stamp(model)
    return model


def node_of(model: ir.Model, op_type: str) -> ir.Node:
    return next(node for node in walk.every_node(model) if node.op_type == op_type)


def test_fresh_names_are_free_in_every_graph() -> None:
    rewriter = Rewriter(parse(CAPTURE))
    assert rewriter.fresh_name("q") == "q_1"
    assert rewriter.fresh_name("q") == "q_2"
    assert rewriter.fresh_name("new") == "new"


def test_replacing_a_graph_output_keeps_its_name_and_declared_type() -> None:
    model = parse(CHAIN)
    before = Signature.of(model)
    rewriter = Rewriter(model)
    old = node_of(model, "Neg")
    new = rewriter.make("Abs", [old.inputs[0]], sources=[old])
    rewriter.insert(new, before=old)
    rewriter.replace(old.outputs[0], new.outputs[0])
    rewriter.erase(old)
    assert [value.name for value in model.graph.outputs] == ["y"]
    assert model.graph.outputs[0].producer() is new
    verify(model, before, provenance_too=True)


def test_an_output_that_becomes_a_constant_is_named_by_an_identity() -> None:
    model = parse(CHAIN)
    rewriter = Rewriter(model)
    old = node_of(model, "Neg")
    rewriter.replace(old.outputs[0], rewriter.const(np.zeros(2, np.float32), "zero"))
    assert model.graph.outputs[0].name == "y"
    assert model.graph.outputs[0].producer().op_type == "Identity"
    verify(model, provenance_too=True)


def test_replace_refuses_another_dtype() -> None:
    model = parse(CHAIN)
    rewriter = Rewriter(model)
    with pytest.raises(ValueError, match="cannot replace"):
        rewriter.replace(model.graph.inputs[0], rewriter.const(np.zeros(2, np.int64), "zero"))


def test_a_node_that_is_read_cannot_be_erased() -> None:
    model = parse(CHAIN)
    with pytest.raises(ValueError, match="still read"):
        Rewriter(model).erase(node_of(model, "Relu"))


def test_erasing_an_if_lets_go_of_what_its_branches_captured() -> None:
    model = parse(CAPTURE)
    rewriter = Rewriter(model)
    captured = node_of(model, "Abs").outputs[0]
    branch = node_of(model, "If")
    rewriter.replace(branch.outputs[0], rewriter.const(np.zeros(2, np.float32), "zero"))
    assert captured.uses()
    rewriter.erase(branch)
    assert not captured.uses()


def test_a_constant_for_a_nested_graph_goes_to_the_main_graph() -> None:
    model = parse(CAPTURE)
    value = Rewriter(model).const(np.ones(2, np.float32), "one", near=node_of(model, "Neg"))
    assert model.graph.initializers["one"] is value


def test_a_constant_for_a_function_is_a_node_in_it() -> None:
    model = parse(FUNCTION)
    rewriter = Rewriter(model)
    add = node_of(model, "Add")
    rewriter.set_input(add, 1, rewriter.const(np.ones(2, np.float32), "one", near=add))
    assert [node.op_type for node in next(iter(model.functions.values()))] == ["Constant", "Add"]
    verify(model, provenance_too=True)


def test_set_weight_leaves_a_clone_and_its_names_alone() -> None:
    model = parse(CHAIN)
    clone = model.clone()
    value = clone.graph.initializers["w"]
    Rewriter(clone).set_weight(value, np.zeros(2, np.float32))
    assert model.graph.initializers["w"].const_value.numpy().tolist() == [1.0, 2.0]
    assert clone.graph.initializers["w"].const_value.numpy().tolist() == [0.0, 0.0]
    assert model.graph.initializers["w"].const_value.name == "w"


@pytest.mark.parametrize("name", [None, "", "other"])
@pytest.mark.parametrize(
    "held",
    [
        ir.Tensor(np.ones(2, np.float32)),
        ir.LazyTensor(lambda: ir.Tensor(np.ones(2, np.float32)), dtype=ir.DataType.FLOAT, shape=ir.Shape([2])),
        ir.StringTensor(np.array([b"a", b"b"], object)),
    ],
    ids=lambda held: type(held).__name__,
)
def test_lifting_a_constant_of_a_clone_leaves_the_name_in_the_original_alone(
    held: ir.TensorProtocol, name: str | None
) -> None:
    held.name = name
    model = parse(CONSTANT)
    model.graph[0].attributes.add(ir.AttrTensor("value", held))
    clone = model.clone()
    shared = clone.graph[0].attributes["value"].as_tensor()
    assert shared is model.graph[0].attributes["value"].as_tensor()
    Rewriter(clone).const(shared, "lifted")
    lifted = clone.graph.initializers["lifted"].const_value
    assert lifted is not None
    assert lifted.name == "lifted"
    assert lifted.numpy().tolist() == held.numpy().tolist()
    assert held.name == name


@pytest.mark.parametrize("wrong", [np.zeros(3, np.float32), np.zeros(2, np.float64)])
def test_set_weight_keeps_dtype_and_shape(wrong: np.ndarray) -> None:
    model = parse(CHAIN)
    with pytest.raises(ValueError, match="cannot hold"):
        Rewriter(model).set_weight(model.graph.initializers["w"], wrong)


def test_edits_are_numbered_and_grouped() -> None:
    journal = Journal()
    model = parse(CHAIN)
    rewriter = Rewriter(model, journal, "demo")
    relu = node_of(model, "Relu")
    with rewriter.edit("swap", relu):
        new = rewriter.make("Abs", [relu.inputs[0]], sources=[relu])
        rewriter.insert(new, before=relu)
        rewriter.replace(relu.outputs[0], new.outputs[0])
        rewriter.erase(relu)
    rewriter.set_attribute(new, "extra", 1)
    assert [(edit.number, edit.rule) for edit in journal.edits] == [(1, "swap"), (2, "set-attribute")]
    assert journal.edits[0].pass_name == "demo"
    assert provenance.origins(relu) <= journal.edits[0].origins


def test_a_group_that_changes_nothing_is_no_edit() -> None:
    model = parse(CHAIN)
    rewriter = Rewriter(model)
    with rewriter.edit("nothing", node_of(model, "Relu")):
        pass
    assert rewriter.edits == 0


def test_new_nodes_carry_the_origins_of_all_they_stand_for() -> None:
    model = parse(CHAIN)
    add, relu = node_of(model, "Add"), node_of(model, "Relu")
    made = Rewriter(model).make("Abs", [model.graph.inputs[0]], sources=[add, relu])
    assert provenance.origins(made) == provenance.origins(add) | provenance.origins(relu)

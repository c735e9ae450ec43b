"""Bias correction: after it the mean of what each layer gives is what it was before the loss."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

import graphopt
from graphopt import registry
from graphopt.authoring import Context, Pass
from graphopt.data import open_data
from graphopt.errors import PassError
from graphopt.passes.lossy.correct_bias import CorrectBias
from graphopt.passes.solvers.grid import Grid
from graphopt.rewriter import Journal, Rewriter
from graphopt.walkthrough import Walkthrough

from .pass_runs import BACKEND, TARGET, loaded, outputs_of, run_passes

MODELS = Path(__file__).resolve().parent.parent / "models"
RNG = np.random.default_rng(0)
DATA = [{"x": RNG.normal(0.5, 1, (1, 3, 6, 6)).astype(np.float32)} for _ in range(12)]


def network(*, conv_bias: bool = True, add: bool = True) -> onnx.ModelProto:
    """Return Conv, Relu, Conv, mean over positions, MatMul, Add, Gemm."""
    shapes = {"w0": (6, 3, 3, 3), "w1": (8, 6, 3, 3), "w2": (8, 10), "w3": (5, 10), "b2": (10,), "b3": (5,)}
    if conv_bias:
        shapes |= {"b0": (6,), "b1": (8,)}
    rng = np.random.default_rng(1)
    constants = [numpy_helper.from_array(rng.normal(0, 0.3, d).astype(np.float32), n) for n, d in shapes.items()]
    constants.append(numpy_helper.from_array(np.array([0, -1]), "flat"))
    nodes = [
        helper.make_node("Conv", ["x", "w0", *(["b0"] if conv_bias else [])], ["c0"], "conv0"),
        helper.make_node("Relu", ["c0"], ["r0"], "relu0"),
        helper.make_node("Conv", ["r0", "w1", *(["b1"] if conv_bias else [])], ["c1"], "conv1"),
        helper.make_node("GlobalAveragePool", ["c1"], ["p"], "pool"),
        helper.make_node("Reshape", ["p", "flat"], ["f"], "reshape"),
        helper.make_node("MatMul", ["f", "w2"], ["m"], "product"),
        helper.make_node(*(("Add", ["m", "b2"], ["a"], "add") if add else ("Tanh", ["m"], ["a"], "add"))),
        helper.make_node("Relu", ["a"], ["r1"], "relu1"),
        helper.make_node("Gemm", ["r1", "w3", "b3"], ["y"], "gemm", transB=1, beta=0.5),
    ]
    read = {name for node in nodes for name in node.input}
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 3, 6, 6])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 5])],
        [constant for constant in constants if constant.name in read],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def context(model: ir.Model, reference: ir.Model | None, data: Any = None) -> Context:
    return Context(
        model,
        Rewriter(model, Journal(), "correct-bias"),
        registry.find("TARGETS", TARGET),
        registry.backend(BACKEND),
        threads=1,
        data=open_data(data or DATA, model),
        reference=reference,
    )


def means(model: ir.Model, name: str) -> Any:
    """Return the mean of each output channel of a node."""
    node = next(node for node in model.graph if node.name == name)
    with Walkthrough(model, open_data(DATA, model), registry.backend(BACKEND)) as walk:
        y = np.concatenate([array for (array,) in walk.batches(node.outputs[0])]).astype(np.float64)
    return y.mean(axis=(0, *range(2, y.ndim)))


@pytest.mark.parametrize("conv_bias", [True, False])
@pytest.mark.parametrize("lossy", ["prune:sparsity=0.6:method=magnitude", "quant:mode=static:solver=rtn"])
def test_means_are_what_they_were(lossy: str, conv_bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    # Weights in four bits, so that every layer's mean moves further than the codes of a bias are apart.
    monkeypatch.setattr("graphopt.passes.lossy.static_weights.weight_grid", lambda *_: Grid(bits=4))
    proto = network(conv_bias=conv_bias)
    original = run_passes(loaded(proto), "simplify", data=DATA).model
    worse, better = (run_passes(loaded(proto), spec, data=DATA).model for spec in (lossy, f"{lossy},correct-bias"))
    # Codes of a bias are multiples of its scale.
    tolerance = 1e-5 if "prune" in lossy else 2e-3
    for name in [node.name for node in original.graph if node.op_type in ("Conv", "Add", "Gemm")]:
        assert name is not None
        before = means(original, name)
        np.testing.assert_allclose(means(better, name), before, atol=tolerance)
        assert np.abs(means(worse, name) - before).max() > 2 * tolerance


def shifted(model: ir.Model, name: str, by: float) -> None:
    value = model.graph.initializers[name]
    assert value.const_value is not None
    value.const_value = ir.tensor(value.const_value.numpy() + np.float32(by), name=name)


@pytest.mark.parametrize("bias", ["b0", "b1", "b2", "b3"])
def test_a_bias_that_was_shifted_is_repaired(bias: str) -> None:
    model = loaded(network())
    reference = model.clone()
    shifted(model, bias, 0.25)
    ctx = context(model, reference)
    CorrectBias().run(model, ctx)
    for name in ("b0", "b1", "b2", "b3"):
        before, after = (one.graph.initializers[name].const_value for one in (reference, model))
        assert before is not None
        assert after is not None
        np.testing.assert_allclose(after.numpy(), before.numpy(), atol=1e-5)
    np.testing.assert_allclose(means(model, "gemm"), means(reference, "gemm"), atol=1e-5)


def test_nothing_lost_is_nothing_to_do() -> None:
    model = loaded(network())
    ctx = context(model, model.clone())
    CorrectBias().run(model, ctx)
    assert ctx.rewriter.edits == 0
    assert "the bias of 0 of 4 layers corrected" in ctx.notes[-1].text


def test_layers_that_take_no_bias_are_said_to_be_left() -> None:
    run = run_passes(loaded(network(add=False)), "prune,correct-bias", data=DATA)
    assert any("no bias, and their operator takes none" in text for text in run.remarks)


def test_layers_that_cannot_be_matched_are_said_to_be_left() -> None:
    model = loaded(network())
    reference = model.clone()
    next(node for node in reference.graph if node.name == "gemm").name = "another"
    shifted(model, "b3", 0.25)
    ctx = context(model, reference)
    CorrectBias().run(model, ctx)
    assert ctx.rewriter.edits == 0
    texts = [note.text for note in ctx.notes if note.left]
    assert texts[0] == "layers that have become other operators, or are gone: 1"
    assert texts[1].startswith("products without a counterpart before the first lossy pass: 1")


def test_a_bias_read_by_others_is_left_to_them() -> None:
    proto = network()
    proto.graph.node.append(helper.make_node("Identity", ["b0"], ["own"], "own"))
    proto.graph.output.append(helper.make_tensor_value_info("own", TensorProto.FLOAT, [6]))
    model = loaded(proto)
    run_passes(model, "prune,correct-bias", data=DATA)
    np.testing.assert_array_equal(
        outputs_of(model, DATA[0])["own"],
        numpy_helper.to_array(next(t for t in proto.graph.initializer if t.name == "b0")),
    )


def test_without_a_lossy_pass_before_it() -> None:
    for spec in ("correct-bias", "simplify,correct-bias"):
        with pytest.raises(PassError, match="no lossy pass ran before it") as caught:
            run_passes(loaded(network()), spec, data=DATA)
        assert "prune,correct-bias" in caught.value.hint


def test_layers_that_exact_passes_changed_since_are_left() -> None:
    run = run_passes(loaded(network()), "prune,equalize,correct-bias", data=DATA)
    rescaled = {name for edit in run.edits if edit.pass_name == "equalize" for name in edit.nodes}
    corrected = {name for edit in run.edits if edit.pass_name == "correct-bias" for name in edit.nodes}
    assert rescaled
    assert not rescaled & corrected
    assert any("without a counterpart" in text for text in run.remarks)


def test_lowers_the_error_of_a_pruned_network() -> None:
    images = dict(np.load(MODELS / "digits.npz"))
    source = graphopt.load(MODELS / "digits_cnn.onnx")
    name = source.graph.inputs[0].name or ""
    given, held_back = images[name][:128], images[name][128:384]

    def error(spec: str) -> float:
        run = graphopt.optimize(source, spec, data={name: given}, evaluation={name: given}, verify="off")
        feed = {name: held_back}
        after, before = (next(iter(outputs_of(model, feed).values())) for model in (run.model, source))
        return float(np.square(after - before).mean())

    pruned = "prune:sparsity=0.7:method=magnitude"
    assert error(f"{pruned},correct-bias") < 0.9 * error(pruned)


def test_the_reference_is_the_model_before_the_first_loss() -> None:
    seen: list[ir.Model | None] = []

    @dataclass(frozen=True)
    class Looking(Pass):
        """Changes the first bias."""

        name = "looking"

        def run(self, model: ir.Model, ctx: Context) -> None:
            seen.append(ctx.reference)
            value = model.graph.initializers["b0"]
            assert value.const_value is not None
            ctx.rewriter.set_weight(value, value.const_value.numpy() + np.float32(1))

    run_passes(loaded(network()), [Looking(), Looking(), Looking()])
    assert seen[0] is None
    assert seen[1] is seen[2]
    reference = seen[1]
    assert reference is not None
    kept = reference.graph.initializers["b0"].const_value
    given = next(tensor for tensor in network().graph.initializer if tensor.name == "b0")
    assert kept is not None
    np.testing.assert_array_equal(kept.numpy(), numpy_helper.to_array(given))


@pytest.mark.parametrize("lossy", ["cast", "cast:compute=half", "codebook", "logarithmic", "quant:mode=weights"])
def test_runs_behind_every_lossy_pass(lossy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for place in ("stored_halves", "coded_layers", "quant_weights"):
        monkeypatch.setattr(f"graphopt.passes.lossy.{place}._pays", lambda *_: True)
    proto = network()
    original = loaded(proto)
    model = run_passes(original.clone(), f"{lossy},correct-bias", data=DATA).model
    np.testing.assert_allclose(means(model, "gemm"), means(original, "gemm"), atol=5e-3)

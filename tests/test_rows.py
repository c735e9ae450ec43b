"""Random networks that treat rows by themselves, and some that do not: on matrices they compute the same."""

from __future__ import annotations

import random

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper

from graphopt.comparison import Comparison

from .pass_runs import loaded, outputs_of, run_passes

SEEDS, SEEDS_A_TEST = 160, 40
OPSETS = (12, 13, 17, 18, 21)
ROWS, WIDTHS = 3, (2, 4, 6)
STEPS = 16
# What the symbolic size turns out to be.
BATCHES = (2, 1, 0)


class Network:
    """A network of values of shape [batch, 3, width], and of matrices of their rows.

    Args:
        seed: Of what is random.
    """

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.numbers = np.random.default_rng(seed)
        self.opset = self.rng.choice(OPSETS)
        self.batch: int | str = self.rng.choice(("N", 2))
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[TensorProto] = []
        self.values: list[tuple[str, int, bool]] = [("x", 4, True)]  # name, width, whether it is stacked

    def const(self, array: object, dtype: type = np.float32) -> str:
        name = f"c{len(self.constants)}"
        self.constants.append(onnx.numpy_helper.from_array(np.asarray(array, dtype), name))
        return name

    def add(self, op: str, inputs: list[str], width: int, stacked: bool, outputs: int = 1, **attributes: object) -> str:
        names = [f"v{len(self.nodes)}_{index}" for index in range(outputs)]
        self.nodes.append(helper.make_node(op, inputs, names, **attributes))
        self.values.append((names[-1], width, stacked))
        return names[-1]

    def step(self) -> None:
        name, width, stacked = self.rng.choice(self.values[-2:])
        axis = self.rng.choice((-1, 2 if stacked else 1))
        kinds = (*["linear"] * 6, *["view"] * 4, "residual", "unary", "bias", "softmax", "norm", "halves")
        match self.rng.choice((*kinds, "sum", "across", "heads")):
            case "linear":
                wide = self.rng.choice(WIDTHS)
                y = self.add(
                    "MatMul", [name, self.const(self.numbers.standard_normal((width, wide)) / 2)], wide, stacked
                )
                b = self.const(self.numbers.standard_normal(wide))
                self.add("Add", [y, b] if self.rng.random() < 0.5 else [b, y], wide, stacked)
            case "view":
                shape = self.const([-1, width] if stacked else [-1, ROWS, width], np.int64)
                self.add("Reshape", [name, shape], width, not stacked)
            case "residual":
                others = [other for other in self.values if other[1:] == (width, stacked)]
                self.add("Add", [name, self.rng.choice(others)[0]], width, stacked)
            case "unary":
                self.add(self.rng.choice(("Relu", "Tanh", "Neg")), [name], width, stacked)
            case "bias":
                shape = self.rng.choice(((width,), (1,), (), (1, 1, width), (ROWS, width)))
                shape = shape if stacked else (width,)
                self.add("Mul", [name, self.const(self.numbers.standard_normal(shape))], width, stacked)
            case "softmax" if self.opset >= 13:
                self.add("Softmax", [name], width, stacked, axis=self.rng.choice((axis, 1)))
            case "norm" if self.opset >= 17:
                inputs = [name, *(self.const(self.numbers.standard_normal(width)) for _ in range(2))]
                self.add("LayerNormalization", inputs, width, stacked, axis=axis)
            case "halves":
                sizes = [1, width - 1]
                given = {"split": sizes} if self.opset < 13 else {}
                inputs = [name] if given else [name, self.const(sizes, np.int64)]
                first = self.add("Split", inputs, 0, stacked, outputs=2, axis=axis, **given)
                self.values.pop()
                self.add("Concat", [first, first[:-1] + "0"], width, stacked, axis=axis)
            case "sum" if self.opset >= 13:
                total = self.add("ReduceSum", [name, self.const([axis], np.int64)], 1, stacked)
                self.values.pop()
                self.add("Sub", [name, total], width, stacked)
            case "across" if stacked:
                y = self.add("Transpose", [name], width, stacked, perm=[0, 2, 1])
                self.values.pop()
                self.add("Transpose", [self.add("Sigmoid", [y], width, stacked)], width, stacked, perm=[0, 2, 1])
                self.values.pop(-2)
            case "heads" if stacked:
                y = self.add("Reshape", [name, self.const([0, 0, 2, width // 2], np.int64)], width, stacked)
                self.values.pop()
                y = self.add("Abs", [y], width, stacked)
                self.values.pop()
                self.add("Reshape", [y, self.const([0, 0, width], np.int64)], width, stacked)

    def model(self) -> onnx.ModelProto:
        read = {name for node in self.nodes for name in node.input}
        ends = [(name, 3 if stacked else 2) for name, _, stacked in self.values if name not in read]
        outputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [None] * rank) for name, rank in ends]
        x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [self.batch, ROWS, 4])
        graph = helper.make_graph(self.nodes, "network", [x], outputs, self.constants)
        return helper.make_model(graph, ir_version=8, opset_imports=[helper.make_opsetid("", self.opset)])


def random_network(seed: int) -> onnx.ModelProto:
    network = Network(seed)
    while len(network.nodes) < STEPS:
        network.step()
    return network.model()


@pytest.mark.parametrize("start", range(0, SEEDS, SEEDS_A_TEST))
def test_networks_on_matrices_compute_the_same(start: int) -> None:
    flattened = sum(_flattens(seed) for seed in range(start, start + SEEDS_A_TEST))
    assert flattened >= SEEDS_A_TEST // 10


def _flattens(seed: int) -> bool:
    """Check one network; return whether any of it was flattened."""
    before = random_network(seed)
    onnx.checker.check_model(before, full_check=True)
    run = run_passes(loaded(before), "flatten-rows,fuse-linear,identities", check_rewrites=seed % 5 == 0)
    after = ir.to_proto(run.model)
    onnx.checker.check_model(after, full_check=True)
    assert len(after.graph.node) <= len(before.graph.node), seed
    dynamic = before.graph.input[0].type.tensor_type.shape.dim[0].dim_param
    for batch in BATCHES if dynamic else BATCHES[:1]:
        feed = {"x": np.random.default_rng(seed).standard_normal((batch, ROWS, 4)).astype(np.float32)}
        comparison = Comparison()
        comparison.update(outputs_of(before, feed), outputs_of(run.model, feed))
        assert comparison.within(), (seed, batch)
    return any(edit.rule == "flatten-rows" for edit in run.edits)

"""Transposes moved behind random operators over random axes compute the same, and fewer of them are left."""

from __future__ import annotations

import random
from collections import Counter

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper

from graphopt.comparison import Comparison

from .pass_runs import loaded, outputs_of, run_passes

SIZES = (2, 3, 4, 5)
SEEDS, SEEDS_A_TEST = 160, 40
OPSETS = (11, 12, 13, 18, 21)


class Chain:
    """A chain of operators of one value, written down node by node.

    Args:
        seed: Of what is random.
    """

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.opset = self.rng.choice(OPSETS)
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[TensorProto] = []
        rank = self.rng.choice((2, 3, 4))
        self.sizes = list(SIZES[:rank])
        self.value = "x"
        self.shape = list(self.sizes)

    def add(self, op: str, *inputs: str, shape: list[int], outputs: int = 1, **attributes: object) -> list[str]:
        names = [f"v{len(self.nodes)}_{index}" for index in range(outputs)]
        self.nodes.append(helper.make_node(op, [self.value, *inputs], names, **attributes))
        self.value, self.shape = names[0], shape
        return names

    def constant(self, array: object, dtype: type = np.int64) -> str:
        name = f"c{len(self.constants)}"
        self.constants.append(onnx.numpy_helper.from_array(np.asarray(array, dtype), name))
        return name

    def transpose(self, perm: list[int]) -> None:
        self.add("Transpose", perm=perm, shape=[self.shape[axis] for axis in perm])

    def axes(self, op: str, axes: list[int], since: int, shape: list[int], **attributes: object) -> None:
        if self.opset < since:
            self.add(op, shape=shape, axes=axes, **attributes)
        else:
            self.add(op, self.constant(axes), shape=shape, **attributes)

    def model(self) -> onnx.ModelProto:
        graph = helper.make_graph(
            self.nodes,
            "chain",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, self.sizes)],
            [helper.make_tensor_value_info(self.value, TensorProto.FLOAT, self.shape)],
            self.constants,
        )
        return helper.make_model(graph, ir_version=8, opset_imports=[helper.make_opsetid("", self.opset)])


def unary(chain: Chain) -> None:
    chain.add(chain.rng.choice(("Relu", "Neg", "Tanh", "Identity")), shape=chain.shape)


def binary(chain: Chain) -> None:
    kept = chain.shape[chain.rng.randint(0, len(chain.shape)) :]
    sizes = [size if chain.rng.random() < 0.7 else 1 for size in kept]
    numbers = np.random.default_rng(len(chain.nodes)).standard_normal(sizes)
    chain.add("Mul", chain.constant(numbers, np.float32), shape=chain.shape)


def softmax(chain: Chain) -> None:
    axis = chain.rng.randint(0, len(chain.shape) - 1)
    chain.add("Softmax", axis=axis - (len(chain.shape) if chain.opset >= 13 else 0), shape=chain.shape)


def reduction(chain: Chain) -> None:
    count = chain.rng.randint(0, len(chain.shape) - 1)
    axes = sorted(chain.rng.sample(range(len(chain.shape)), count))
    keepdims = chain.rng.randint(0, 1)
    shape = [1 if axis in axes else size for axis, size in enumerate(chain.shape) if keepdims or axis not in axes]
    if axes:
        op, since = chain.rng.choice((("ReduceSum", 13), ("ReduceMean", 18), ("ReduceMax", 18), ("ReduceL2", 18)))
        chain.axes(op, [axis - len(chain.shape) for axis in axes], since, shape, keepdims=keepdims)


def slices(chain: Chain) -> None:
    axes = chain.rng.sample(range(len(chain.shape)), chain.rng.randint(1, len(chain.shape)))
    shape = list(chain.shape)
    bounds = []
    for axis in axes:
        start, end, step = chain.rng.choice(((0, 2**31 - 1, 2), (1, 2**31 - 1, 1), (-1, -(2**31), -1), (0, -1, 1)))
        kept = len(range(shape[axis])[slice(start, end, step)])
        if kept:
            shape[axis] = kept
            bounds.append((start, end, axis - chain.rng.choice((0, len(shape))), step))
    if bounds:
        dtype = chain.rng.choice((np.int64, np.int32))
        chain.add("Slice", *(chain.constant(numbers, dtype) for numbers in zip(*bounds, strict=True)), shape=shape)


def pad(chain: Chain) -> None:
    widths = [chain.rng.choice((0, 0, 1)) for _ in range(2 * len(chain.shape))]
    before, behind = widths[: len(chain.shape)], widths[len(chain.shape) :]
    shape = [a + size + b for a, size, b in zip(before, chain.shape, behind, strict=True)]
    chain.add("Pad", chain.constant(widths), mode=chain.rng.choice(("constant", "edge")), shape=shape)


def split_concat(chain: Chain) -> None:
    axis = chain.rng.randint(0, len(chain.shape) - 1)
    if chain.shape[axis] < 2:
        return
    sizes = [1, chain.shape[axis] - 1]
    given = {"split": sizes} if chain.opset < 13 else {}
    inputs = [] if given else [chain.constant(sizes)]
    shape = chain.shape
    first, second = chain.add("Split", *inputs, axis=axis, outputs=2, shape=shape, **given)
    chain.value = second
    chain.add("Concat", first, axis=axis - len(shape), shape=shape)


def gather(chain: Chain) -> None:
    axis = chain.rng.randint(0, len(chain.shape) - 1)
    shape = list(chain.shape)
    if len(shape) > 2 and chain.rng.random() < 0.5:
        chain.add("Gather", chain.constant(0), axis=axis, shape=shape[:axis] + shape[axis + 1 :])
        return
    chain.add("Gather", chain.constant([-1, 0]), axis=axis - len(shape), shape=[*shape[:axis], 2, *shape[axis + 1 :]])


def squeeze_unsqueeze(chain: Chain) -> None:
    ones = [axis for axis, size in enumerate(chain.shape) if size == 1]
    if ones and len(chain.shape) > 2:
        axis = chain.rng.choice(ones)
        chain.axes("Squeeze", [axis], 13, [size for place, size in enumerate(chain.shape) if place != axis])
    elif len(chain.shape) < 5:
        axis = chain.rng.randint(0, len(chain.shape))
        chain.axes("Unsqueeze", [axis], 13, [*chain.shape[:axis], 1, *chain.shape[axis:]])


def tile(chain: Chain) -> None:
    repeats = [chain.rng.choice((1, 1, 2)) for _ in chain.shape]
    shape = [size * times for size, times in zip(chain.shape, repeats, strict=True)]
    chain.add("Tile", chain.constant(repeats), shape=shape)


STEPS = (unary, binary, softmax, reduction, slices, pad, split_concat, gather, squeeze_unsqueeze, tile)


def random_chain(seed: int) -> onnx.ModelProto:
    """Return operators between a Transpose and another, the inverse of what is left of it or any."""
    chain = Chain(seed)
    for _ in range(2):
        perm = list(range(len(chain.shape)))
        chain.rng.shuffle(perm)
        chain.transpose(perm)
        for _ in range(chain.rng.randint(1, 3)):
            chain.rng.choice(STEPS)(chain)
    chain.transpose(list(np.argsort(perm)) if len(perm) == len(chain.shape) else list(range(len(chain.shape)))[::-1])
    chain.add("Neg", shape=chain.shape)
    return chain.model()


def count(model: onnx.ModelProto | ir.Model) -> int:
    proto = model if isinstance(model, onnx.ModelProto) else ir.to_proto(model)
    return Counter(node.op_type for node in proto.graph.node)["Transpose"]


@pytest.mark.parametrize("start", range(0, SEEDS, SEEDS_A_TEST))
def test_moved_transposes_compute_the_same(start: int) -> None:
    moved = sum(_moves(seed) for seed in range(start, start + SEEDS_A_TEST))
    assert moved >= SEEDS_A_TEST // 4


def _moves(seed: int) -> bool:
    """Check one chain; return whether Transposes were moved."""
    before = random_chain(seed)
    onnx.checker.check_model(before, full_check=True)
    run = run_passes(loaded(before), "move-transposes", check_rewrites=seed % 4 == 0)
    onnx.checker.check_model(ir.to_proto(run.model), full_check=True)
    assert count(run.model) < count(before) if run.edits else count(run.model) == count(before), seed
    feed = {"x": np.random.default_rng(seed).standard_normal(SIZES[: _rank(before)]).astype(np.float32)}
    comparison = Comparison()
    comparison.update(outputs_of(before, feed), outputs_of(run.model, feed))
    assert comparison.within(), seed
    return bool(run.edits)


def _rank(model: onnx.ModelProto) -> int:
    return len(model.graph.input[0].type.tensor_type.shape.dim)

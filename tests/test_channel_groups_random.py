"""Channel groups of random chains of views between two products: any units of all groups can go at once."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import onnx
import onnx.helper as oh
import pytest
from onnx import TensorProto, numpy_helper

from graphopt import shapes
from graphopt.passes.analyses.channel_groups import Layout, Side, channel_groups

from .pass_runs import loaded
from .removed_channels import check_removal, feed_of

SEEDS = 12
# No tensor grows beyond this.
ELEMENTS_LIMIT = 2048


class Chain:
    """A graph of one value after the other.

    Attributes:
        shape: The shape of the last value.
    """

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        rows, columns = int(self.rng.choice([1, 2, 3])), int(self.rng.choice([4, 6, 8, 12, 16, 24]))
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []
        self.shape = [1, rows, 3]
        self.input = oh.make_tensor_value_info("v0", TensorProto.FLOAT, self.shape)
        self.add("MatMul", self.weights(3, columns), shape=[1, rows, columns])

    def weights(self, *shape: int) -> np.ndarray:
        return self.rng.normal(size=shape).astype(np.float32)

    def add(self, operator: str, *operands: np.ndarray, shape: list[int], **attributes: object) -> None:
        """Put a node behind the last; operands are integers or weights it reads beside it."""
        names = [f"c{len(self.constants) + place}" for place in range(len(operands))]
        self.constants += [numpy_helper.from_array(a, name) for name, a in zip(names, operands, strict=True)]
        before, behind = f"v{len(self.nodes)}", f"v{len(self.nodes) + 1}"
        self.nodes.append(oh.make_node(operator, [before, *names], [behind], **attributes))
        self.shape = shape

    def model(self) -> onnx.ModelProto:
        """Return the chain and a last product as a model."""
        self.add("MatMul", self.weights(self.shape[-1], 5), shape=[*self.shape[:-1], 5])
        output = oh.make_tensor_value_info(f"v{len(self.nodes)}", TensorProto.FLOAT, self.shape)
        graph = oh.make_graph(self.nodes, "chain", [self.input], [output], self.constants)
        return oh.make_model(graph, opset_imports=[oh.make_opsetid("", 17)], ir_version=8)

    def axis(self) -> int:
        return int(self.rng.integers(len(self.shape)))


def split(chain: Chain) -> None:
    axis = chain.axis()
    factors = [factor for factor in range(2, chain.shape[axis]) if chain.shape[axis] % factor == 0]
    if factors and len(chain.shape) < 6:
        factor = int(chain.rng.choice(factors))
        reshape(chain, [*chain.shape[:axis], factor, chain.shape[axis] // factor, *chain.shape[axis + 1 :]])


def merge(chain: Chain) -> None:
    axis = chain.axis()
    if axis > 0 and len(chain.shape) > 2:
        reshape(chain, [*chain.shape[: axis - 1], chain.shape[axis - 1] * chain.shape[axis], *chain.shape[axis + 1 :]])


def reshape(chain: Chain, shape: list[int]) -> None:
    chain.add("Reshape", np.array(shape, np.int64), shape=shape)


def transpose(chain: Chain) -> None:
    perm = chain.rng.permutation(len(chain.shape)).tolist()
    chain.add("Transpose", shape=[chain.shape[axis] for axis in perm], perm=perm)


def scale(chain: Chain) -> None:
    shape = [size if chain.rng.random() < 0.5 else 1 for size in chain.shape]
    chain.add("Mul", chain.weights(*shape), shape=chain.shape)


def double(chain: Chain) -> None:
    axis = chain.axis()
    times = np.ones(len(chain.shape), np.int64)
    times[axis] = 2
    if 2 * math.prod(chain.shape) <= ELEMENTS_LIMIT:
        chain.add("Tile", times, shape=[int(n) for n in np.array(chain.shape) * times])


def thin_out(chain: Chain) -> None:
    axis = chain.axis()
    start, step = int(chain.rng.integers(2)), int(chain.rng.choice([1, 2]))
    left = len(range(start, chain.shape[axis], step))
    if left > 1:
        bounds = [np.array([number], np.int64) for number in (start, chain.shape[axis], axis, step)]
        chain.add("Slice", *bounds, shape=[*chain.shape[:axis], left, *chain.shape[axis + 1 :]])


def pick(chain: Chain) -> None:
    axis = chain.axis()
    size = chain.shape[axis]
    places = chain.rng.integers(0, size, size=int(chain.rng.integers(1, size + 2)))
    chain.add("Gather", places, shape=[*chain.shape[:axis], len(places), *chain.shape[axis + 1 :]], axis=axis)


STEPS: tuple[Callable[[Chain], None], ...] = (split, split, merge, merge, transpose, transpose, scale, double, thin_out)


@pytest.mark.parametrize("seed", range(SEEDS))
def test_any_units_of_all_groups_can_go(seed: int) -> None:
    chain = Chain(seed)
    for _ in range(int(chain.rng.integers(1, 8))):
        (*STEPS, pick)[chain.rng.integers(len(STEPS) + 1)](chain)
    proto = chain.model()
    for side in Side:
        model = loaded(proto)
        shapes.infer_shapes(model)
        kept = {}
        for group in channel_groups(model, Layout(splits=side)).groups:
            kept[group] = np.ones(group.size, bool)
            count = int(chain.rng.integers(group.size))
            kept[group][chain.rng.choice(group.size, count, replace=False)] = False
        check_removal(model, kept, feed_of(model))

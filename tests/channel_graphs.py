"""Random networks in which channels go many ways: added, joined, parted, shuffled, gated, flattened, attended to."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

SIDE = 4
STEPS = 3
OPSETS = (11, 13, 17, 18)
# From here on Split takes sizes as an input; is told how many parts there are; ReduceMean takes axes as an input.
NUMBERS_AS_INPUTS, COUNTED_PARTS, MEANS_OF_INPUTS = 13, 18, 18


@dataclass
class Network:
    """A network in the making.

    Attributes:
        seed: What it is drawn from.
        opset: Version of the operators.
        images: Values [N, channels, SIDE, SIDE] made so far, with their channels.
        rows: Values [N, STEPS, channels] made so far, with their channels.
    """

    seed: int
    opset: int
    images: list[tuple[str, int]] = field(default_factory=list)
    rows: list[tuple[str, int]] = field(default_factory=list)
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    constants: list[TensorProto] = field(default_factory=list)
    outputs: list[str] = field(default_factory=list)
    rng: random.Random = field(init=False)

    def __post_init__(self) -> None:
        self.rng = random.Random(self.seed)
        self.numbers = np.random.default_rng(self.seed)

    def op(self, op_type: str, *inputs: str, **attributes: Any) -> str:
        """Add a node of one output."""
        return self.ops(op_type, inputs, 1, **attributes)[0]

    def ops(self, op_type: str, inputs: Sequence[str], count: int, **attributes: Any) -> list[str]:
        """Add a node and return its outputs."""
        names = [f"t{len(self.nodes)}_{index}" for index in range(count)]
        self.nodes.append(helper.make_node(op_type, inputs, names, name=f"n{len(self.nodes)}", **attributes))
        return names

    def weight(self, *dims: int) -> str:
        """Add random numbers."""
        return self._constant(self.numbers.uniform(-0.6, 0.6, dims).astype(np.float32))

    def ints(self, *numbers: int) -> str:
        """Add a vector of integers."""
        return self._constant(np.array(numbers, np.int64))

    def _constant(self, array: np.ndarray) -> str:
        name = f"c{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(array, name))
        return name

    def image(self) -> tuple[str, int]:
        """Return one of the latest images."""
        return self.rng.choice(self.images[-4:])

    def row(self) -> tuple[str, int]:
        """Return one of the latest rows."""
        return self.rng.choice(self.rows[-3:])

    def width(self) -> int:
        """Return a number of channels."""
        return self.rng.choice((4, 6, 8))

    def linear(self, value: str, channels: int, wanted: int) -> str:
        """Return a linear layer over rows, with or without a bias."""
        weight = self.weight(channels, wanted)
        if self.opset >= NUMBERS_AS_INPUTS and self.rng.random() < 0.2:
            product = self.op("Einsum", value, weight, equation="...c,cd->...d")
        else:
            product = self.op("MatMul", value, weight)
        return self.op("Add", product, self.weight(wanted)) if self.rng.random() < 0.5 else product

    def split(self, value: str, sizes: Sequence[int], axis: int) -> list[str]:
        """Return parts along an axis, their sizes said only where they differ, or by chance."""
        count = len(sizes)
        if len(set(sizes)) == 1 and self.rng.random() < 0.5:
            counted = {"num_outputs": count} if self.opset >= COUNTED_PARTS else {}
            return self.ops("Split", [value], count, axis=axis, **counted)
        if self.opset < NUMBERS_AS_INPUTS:
            return self.ops("Split", [value], count, axis=axis, split=list(sizes))
        return self.ops("Split", [value, self.ints(*sizes)], count, axis=axis)

    def model(self) -> onnx.ModelProto:
        """Return the finished model; the last image and row are read by a layer each."""
        value, channels = self.images[-1]
        flat = self.op("Reshape", value, self.ints(self.rng.choice((0, -1)), channels * SIDE**2))
        self.outputs.append(self.op("Gemm", flat, self.weight(3, channels * SIDE**2), self.weight(3), transB=1))
        value, channels = self.rows[-1]
        self.outputs.append(self.op("MatMul", value, self.weight(channels, 3)))
        infos = [
            helper.make_tensor_value_info("image", TensorProto.FLOAT, ["N", 3, SIDE, SIDE]),
            helper.make_tensor_value_info("row", TensorProto.FLOAT, ["N", STEPS, 5]),
        ]
        results = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in self.outputs]
        graph = helper.make_graph(self.nodes, "channels", infos, results, self.constants)
        imports = [helper.make_opsetid("", self.opset)]
        return onnx.shape_inference.infer_shapes(helper.make_model(graph, opset_imports=imports, ir_version=8))


def _conv(net: Network) -> None:
    value, channels = net.image()
    wanted, kernel = net.width(), net.rng.choice((1, 3))
    groups = 2 if channels % 2 == 0 and net.rng.random() < 0.3 else 1
    weight = net.weight(wanted, channels // groups, kernel, kernel)
    bias = [net.weight(wanted)] if net.rng.random() < 0.5 else []
    net.images.append((net.op("Conv", value, weight, *bias, pads=[kernel // 2] * 4, group=groups), wanted))


def _depthwise(net: Network) -> None:
    value, channels = net.image()
    times = net.rng.choice((1, 1, 2))
    made = net.op("Conv", value, net.weight(channels * times, 1, 3, 3), pads=[1] * 4, group=channels)
    net.images.append((made, channels * times))


def _transposed(net: Network) -> None:
    value, channels = net.image()
    wanted, groups = net.width(), net.rng.choice((1, 2)) if channels % 2 == 0 else 1
    weight = net.weight(channels, wanted // groups, 3, 3)
    net.images.append((net.op("ConvTranspose", value, weight, pads=[1] * 4, group=groups), wanted))


def _elementwise(net: Network) -> None:
    value, channels = net.image()
    op = net.rng.choice(("Relu", "Sigmoid", "Tanh", "Scale", "Norm", "Instance", "Prelu", "Pool", "Where"))
    if op == "Scale":
        made = net.op("Mul", value, net.weight(channels, 1, 1))
    elif op == "Norm":
        vectors = [net.weight(channels) for _ in range(3)]
        made = net.op("BatchNormalization", value, *vectors, net._constant(np.ones(channels, np.float32)))
    elif op == "Instance":
        made = net.op("InstanceNormalization", value, net.weight(channels), net.weight(channels))
    elif op == "Where":
        made = net.op("Where", net.op("Less", value, net.weight(channels, 1, 1)), value, net.weight(1))
    elif op == "Prelu":
        made = net.op("PRelu", value, net.weight(channels, 1, 1))
    elif op == "Pool":
        made = net.op("AveragePool", value, kernel_shape=[3, 3], pads=[1] * 4)
    else:
        made = net.op(op, value)
    net.images.append((made, channels))


def _resized(net: Network) -> None:
    """Twice as large, by sizes that state the channels, and back."""
    value, channels = net.image()
    if net.rng.random() < 0.5 and channels % 4 == 0:
        mode = net.rng.choice(("DCR", "CRD"))
        large = net.op("DepthToSpace", value, blocksize=2, mode=mode)
        net.images.append((net.op("SpaceToDepth", large, blocksize=2), channels))
        return
    sizes = net.ints(2, channels, 2 * SIDE, 2 * SIDE)
    nothing = "" if net.opset >= NUMBERS_AS_INPUTS else net.weight(0)
    large = net.op("Resize", value, nothing, nothing, sizes, mode="nearest")
    net.images.append((net.op("MaxPool", large, kernel_shape=[2, 2], strides=[2, 2]), channels))


def _residual(net: Network) -> None:
    value, channels = net.image()
    other, others = net.image()
    if others != channels:
        other = net.op("Conv", other, net.weight(channels, others, 1, 1))
    net.images.append((net.op(net.rng.choice(("Add", "Mul")), value, other), channels))


def _gate(net: Network) -> None:
    """Squeeze and excite."""
    value, channels = net.image()
    pooled = net.op("GlobalAveragePool", value)
    inner = net.op("Relu", net.op("Conv", pooled, net.weight(2, channels, 1, 1)))
    gate = net.op("Sigmoid", net.op("Conv", inner, net.weight(channels, 2, 1, 1)))
    net.images.append((net.op("Mul", value, gate), channels))


def _join(net: Network) -> None:
    parts = [net.image() for _ in range(net.rng.choice((2, 3)))]
    joined = net.op("Concat", *(value for value, _ in parts), axis=1)
    net.images.append((joined, sum(channels for _, channels in parts)))


def _part(net: Network) -> None:
    value, channels = net.image()
    if channels < 2:
        return
    first = net.rng.randrange(1, channels) if net.rng.random() < 0.5 else channels - channels // 2
    sizes = [first, channels - first]
    if net.rng.random() < 0.5:
        parts = net.split(value, sizes, 1)
    else:
        axis, end = net.ints(1), net.ints(net.rng.choice((channels, 2**31 - 1)))
        parts = [net.op("Slice", value, net.ints(0), net.ints(first - channels), axis)]
        parts.append(net.op("Slice", value, net.ints(first), end, axis))
    net.images += zip(parts, sizes, strict=True)
    if net.rng.random() < 0.5:  # a part goes on as it is, beside one that was worked on
        worked = net.op("Conv", parts[0], net.weight(first, first, 1, 1))
        net.images.append((net.op("Concat", worked, parts[1], axis=1), channels))


def _stride(net: Network) -> None:
    value, channels = net.image()
    if channels < 2:
        return
    start, end, step = net.rng.choice(((0, channels, 2), (1, channels, 2), (channels - 1, -channels - 1, -1)))
    made = net.op("Slice", value, net.ints(start), net.ints(end), net.ints(1), net.ints(step))
    net.images.append((made, len(range(channels)[start:end:step])))


def _pick(net: Network) -> None:
    value, channels = net.image()
    indices = net.rng.sample(range(-channels // 2, channels - channels // 2), net.rng.randint(1, channels))
    net.images.append((net.op("Gather", value, net.ints(*indices), axis=1), len(indices)))


def _shuffle(net: Network) -> None:
    value, channels = net.image()
    if channels % 2:
        return
    apart = net.op("Reshape", value, net.ints(0, 2, channels // 2, SIDE, SIDE))
    turned = net.op("Transpose", apart, perm=[0, 2, 1, 3, 4])
    net.images.append((net.op("Reshape", turned, net.ints(-1, channels, SIDE, SIDE)), channels))


def _pad(net: Network) -> None:
    value, channels = net.image()
    front, back = net.rng.choice(((0, 2), (1, 1), (2, 0)))
    net.images.append((net.op("Pad", value, net.ints(0, front, 0, 0, 0, back, 0, 0)), channels + front + back))


def _pooled_row(net: Network) -> None:
    """The pooled channels of an image, given to every step of a row."""
    value, channels = net.image()
    row, width = net.row()
    pooled = net.op("GlobalAveragePool", value)
    way = net.rng.choice(("Flatten", "Reshape", "ReduceMean"))
    if way == "ReduceMean" and net.opset < MEANS_OF_INPUTS:
        flat = net.op("ReduceMean", value, axes=[2, 3], keepdims=0)
    else:
        flat = net.op("Flatten", pooled) if way == "Flatten" else net.op("Reshape", pooled, net.ints(0, -1))
    step = net.op("Reshape", net.linear(flat, channels, width), net.ints(-1, 1, width))
    net.rows.append((net.op("Add", row, step), width))


def _dense(net: Network) -> None:
    value, channels = net.row()
    wanted = net.width()
    net.rows.append((net.op("Relu", net.linear(value, channels, wanted)), wanted))


def _gated_dense(net: Network) -> None:
    """Both halves of a gated layer from one matrix, and back to the residual stream."""
    value, channels = net.row()
    inner = net.width()
    gate, up = net.split(net.linear(value, channels, 2 * inner), [inner, inner], 2)
    hidden = net.op("Mul", net.op("Mul", gate, net.op("Sigmoid", gate)), up)
    net.rows.append((net.op("Add", value, net.linear(hidden, inner, channels)), channels))


def _attention(net: Network) -> None:
    """Attention of several heads, some with fewer of keys than of queries, and back to the residual stream."""
    value, channels = net.row()
    heads, of_keys, width = net.rng.choice(((2, 2, 3), (4, 2, 2), (3, 3, 2), (2, 1, 4)))
    query, key, content = (
        net.op("Reshape", net.linear(value, channels, count * width), net.ints(0, -1, count, width))
        for count in (heads, of_keys, of_keys)
    )
    query = net.op("Transpose", query, perm=[0, 2, 1, 3])
    key = _repeated(net, net.op("Transpose", key, perm=[0, 2, 1, 3]), of_keys, heads, width)
    content = _repeated(net, net.op("Transpose", content, perm=[0, 2, 1, 3]), of_keys, heads, width)
    scores = net.op("MatMul", query, net.op("Transpose", key, perm=[0, 1, 3, 2]))
    mixed = net.op("MatMul", net.op("Softmax", scores, axis=-1), content)
    merged = net.op("Reshape", net.op("Transpose", mixed, perm=[0, 2, 1, 3]), net.ints(0, STEPS, heads * width))
    net.rows.append((net.op("Add", value, net.linear(merged, heads * width, channels)), channels))


def _repeated(net: Network, value: str, of_keys: int, heads: int, width: int) -> str:
    """Return heads of keys, each as often as queries share it."""
    if heads == of_keys:
        return value
    apart = net.op("Reshape", value, net.ints(-1, of_keys, 1, STEPS, width))
    wide = net.op("Expand", apart, net.ints(1, of_keys, heads // of_keys, STEPS, width))
    return net.op("Reshape", wide, net.ints(-1, heads, STEPS, width))


def _recurrent(net: Network) -> None:
    value, channels = net.row()
    op, gates = net.rng.choice((("LSTM", 4), ("GRU", 3), ("RNN", 1)))
    ways, hidden = net.rng.choice((1, 2)), net.width()
    weights = [net.weight(ways, gates * hidden, channels), net.weight(ways, gates * hidden, hidden)]
    weights.append(net.weight(ways, 2 * gates * hidden))
    direction = "bidirectional" if ways > 1 else "forward"
    steps = net.op("Transpose", value, perm=[1, 0, 2])
    made = net.op(op, steps, *weights, hidden_size=hidden, direction=direction)
    batch_first = net.op("Transpose", made, perm=[2, 0, 1, 3])
    net.rows.append((net.op("Reshape", batch_first, net.ints(0, 0, ways * hidden)), ways * hidden))


MOTIFS: Sequence[Callable[[Network], None]] = (
    _attention, _conv, _conv, _dense, _depthwise, _elementwise, _elementwise, _gate, _gated_dense, _join, _pad, _part,
    _pick, _pooled_row, _recurrent, _residual, _residual, _resized, _shuffle, _stride, _transposed,
)  # fmt: skip


def channel_graph(seed: int, size: int) -> onnx.ModelProto:
    """Return the network of so many motifs that belongs to a seed."""
    rng = random.Random(seed)
    net = Network(seed, rng.choice(OPSETS))
    width = net.width()
    net.images.append((net.op("Conv", "image", net.weight(width, 3, 3, 3), net.weight(width), pads=[1] * 4), width))
    width = net.width()
    net.rows.append((net.linear("row", 5, width), width))
    for _ in range(size):
        rng.choice(MOTIFS)(net)
    return net.model()

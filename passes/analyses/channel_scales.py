"""Channels that can be scaled without changing the model: layers before them multiply, layers behind divide."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from graphopt import walk
from graphopt.backend import Array

from ..exact.arguments import REDUCTIONS, axes_of, integers
from .channels import ChannelView, per_channel, view_of

# f(s x) = s f(x) for s > 0, channel by channel, whatever the axis of the channels.
_HOMOGENEOUS = frozenset({"Abs", "Identity", "LeakyRelu", "Neg", "Relu"})
# The same over positions, which are the axes from 2 up.
_POOLS = frozenset({"AveragePool", "GlobalAveragePool", "GlobalLpPool", "GlobalMaxPool", "LpPool", "MaxPool"})
_SCALING_REDUCTIONS = frozenset(REDUCTIONS) - {"ReduceLogSum", "ReduceLogSumExp", "ReduceProd", "ReduceSumSquare"}
# What ends in a factor, and maybe an offset, of each channel along the last axis.
_NORMALIZATIONS = ("LayerNormalization", "RMSNormalization")
_LINEAR = ("Conv", "ConvTranspose", "Gemm", "MatMul")
# Stands for all channels that must stay as they are.
FIXED = 0


@dataclass(frozen=True, eq=False)
class ChannelAxis:
    """The channels of a value.

    Attributes:
        value: The value.
        axis: The axis of its channels.
        channels: Number of each channel, int64; equal ones share a scale, and `FIXED` ones have none.
    """

    value: ir.Value
    axis: int
    channels: Array


@dataclass(frozen=True, eq=False)
class Scaling:
    """Channels that hang together, and all that has to change when they are scaled.

    Attributes:
        values: Where the channels are.
        writers: Layers that make them, and the channels each of their outputs is.
        biases: Constants that scale along: what is added to them, or a normalization's factors and offsets.
        readers: Layers that read them, and the channels each of their inputs is.
    """

    values: list[ChannelAxis] = field(default_factory=list)
    writers: list[tuple[ChannelView, Array]] = field(default_factory=list)
    biases: list[tuple[ir.Value, Array]] = field(default_factory=list)
    readers: list[tuple[ChannelView, Array]] = field(default_factory=list)


def channel_scalings(model: ir.Model) -> list[Scaling]:
    """Return the channels of the main graph that can be scaled, those that hang together in one.

    Channels begin at the outputs of a linear layer or a normalization and end at the inputs of linear layers. In
    between may be what is homogeneous of degree one: Relu, pooling, sums, Concat, what moves values. Channels that
    reach anything else, or an input or output of the model, are fixed.
    """
    search = _Search(model)
    for node in model.graph:
        search.visit(node)
    return search.scalings()


class _Search:
    """Numbers the channels of each value, and merges the numbers of those that must be scaled alike."""

    def __init__(self, model: ir.Model) -> None:
        self.graph = model.graph
        self.parents = [FIXED]
        self.known: dict[ir.Value, ChannelAxis] = {}
        self.writers: list[tuple[ChannelView, Array]] = []
        self.readers: list[tuple[ChannelView, Array]] = []
        self.biases: list[tuple[ir.Value, Array]] = []

    def visit(self, node: ir.Node) -> None:
        """Number the channels of what a node makes; fix those it reads, where it does not scale with them."""
        made = self._made_by(node) if walk.is_onnx_op(node, node.op_type) and not walk.has_references(node) else None
        if made is None or (node.op_type not in _LINEAR and not _fits(made)):
            for value in walk.values_read(node):
                self._fix(value)
            return
        self.known[made.value] = made
        if made.value.is_graph_output() or any(use.node.graph is not self.graph for use in made.value.uses()):
            self._fix(made.value)

    def _made_by(self, node: ir.Node) -> ChannelAxis | None:
        if node.op_type in _LINEAR:
            return self._linear(node)
        if node.op_type in _NORMALIZATIONS:
            return self._normalized(node)
        source = self.known.get(node.inputs[0]) if node.inputs and node.inputs[0] is not None else None
        match node.op_type:
            case "Add" | "Sub":
                return self._sum(node)
            case "Concat":
                return self._concat(node)
            case "Mul" | "Div":
                return self._product(node)
            case _ if source is None:
                return None
            case "Flatten":
                return _flattened(node, source)
            case "Pad":
                return self._padded(node, source)
            case "Slice":
                return _sliced(node, source)
            case "Transpose":
                order = node.attributes.get_ints("perm", [])
                return _as(node, source, list(order).index(source.axis)) if source.axis in order else None
            case operator if operator in _POOLS:
                return _as(node, source) if source.axis < 2 and len(node.outputs) == 1 else None
            case operator if operator in _SCALING_REDUCTIONS:
                return _reduced(node, source)
            case operator:
                return _as(node, source) if operator in _HOMOGENEOUS else None

    def _linear(self, node: ir.Node) -> ChannelAxis | None:
        view, x, y = view_of(node), node.inputs[0], node.outputs[0]
        if view is None or x is None or view.weight_is_shared or walk.constant_tensor(x) is not None:
            return None
        if (node.op_type == "MatMul" and len(view.dims) != 2) or node.attributes.get_int("transA", 0) != 0:
            return None
        # A convolution or matrix keeps the rank of what it is applied to; a vector times a matrix is left.
        rank = len(x.shape) if x.shape is not None else 0
        if rank < 2:
            return None
        bias = node.inputs[2] if len(node.inputs) > 2 else None
        if bias is not None and not _is_free(bias, view.bias_vector(bias), view.outputs):
            return None
        source = self.known.get(x)
        if source is not None and (source.axis, len(source.channels)) == (rank + view.axis, view.inputs):
            self.readers.append((view, source.channels))
        else:
            self._fix(x)
        channels = self._fresh(view.outputs)
        self.writers.append((view, channels))
        if bias is not None:
            self.biases.append((bias, channels))
        return ChannelAxis(y, rank + view.axis, channels)

    def _normalized(self, node: ir.Node) -> ChannelAxis | None:
        """Its factors and offsets, scaled, scale what it makes; what it reads it does not let through."""
        y, constants = node.outputs[0], [value for value in node.inputs[1:] if value is not None]
        if node.inputs[0] is not None:
            self._fix(node.inputs[0])
        rank = len(y.shape) if y.shape is not None else 0
        size = y.shape[-1] if y.shape is not None and rank else None
        last = node.attributes.get_int("axis", -1) in (-1, rank - 1)
        if not last or not isinstance(size, int) or not constants or len(node.outputs) > 1:
            return None
        if not all(_is_free(value, per_channel(value, size, -1, rank), size) for value in constants):
            return None
        channels = self._fresh(size)
        self.biases.extend((value, channels) for value in constants)
        return ChannelAxis(y, rank - 1, channels)

    def _sum(self, node: ir.Node) -> ChannelAxis | None:
        left, right = node.inputs
        if left is None or right is None:
            return None
        one, other = self.known.get(left), self.known.get(right)
        if one is not None and other is not None:
            alike = (one.axis, len(one.channels)) == (other.axis, len(other.channels))
            if not alike or left.shape is None or right.shape is None or len(left.shape) != len(right.shape):
                return None
            self._join(one.channels, other.channels)
            return _as(node, one)
        source, constant = (one, right) if one is not None else (other, left)
        y = node.outputs[0]
        if source is None or y.shape is None or source.value.shape is None or len(y.shape) != len(source.value.shape):
            return None
        vector = per_channel(constant, len(source.channels), source.axis - len(y.shape), len(y.shape))
        if not _is_free(constant, vector, len(source.channels)):
            return None
        self.biases.append((constant, source.channels))
        return _as(node, source)

    def _concat(self, node: ir.Node) -> ChannelAxis | None:
        known = [self.known.get(value) for value in node.inputs if value is not None]
        sources = [source for source in known if source is not None]
        rank = len(node.outputs[0].shape) if node.outputs[0].shape is not None else None
        if len(sources) < len(known) or rank is None or len({source.axis for source in sources}) != 1:
            return None
        if node.attributes.get_int("axis", 1) % rank == sources[0].axis:
            return ChannelAxis(
                node.outputs[0], sources[0].axis, np.concatenate([source.channels for source in sources])
            )
        if len({len(source.channels) for source in sources}) != 1:
            return None
        for source in sources[1:]:
            self._join(sources[0].channels, source.channels)
        return _as(node, sources[0])

    def _product(self, node: ir.Node) -> ChannelAxis | None:
        """A constant factor, of each channel or of all, is homogeneous; a second activation is not taken."""
        x, factor = node.inputs
        if node.op_type == "Mul" and walk.constant_tensor(factor) is None:
            x, factor = factor, x
        source, tensor = self.known.get(x) if x is not None else None, walk.constant_tensor(factor)
        if source is None or tensor is None or source.value.shape is None:
            return None
        return _as(node, source) if len(tensor.shape) <= len(source.value.shape) else None

    def _padded(self, node: ir.Node, source: ChannelAxis) -> ChannelAxis | None:
        pads = integers(node.inputs[1]) if len(node.inputs) > 1 else tuple(node.attributes.get_ints("pads", []))
        if len(node.inputs) > 3 or not pads or node.attributes.get_string("mode", "constant") != "constant":
            return None
        filling = node.inputs[2] if len(node.inputs) > 2 else None
        tensor = walk.constant_tensor(filling)
        # Older opsets have the filling as an attribute.
        number = (
            node.attributes.get_float("value", 0.0)
            if tensor is None
            else float(np.abs(tensor.numpy()).max(initial=0.0))
        )
        if (filling is not None and tensor is None) or number != 0.0:
            return None
        before, behind = pads[source.axis], pads[source.axis + len(pads) // 2]
        if min(before, behind) < 0:
            return None
        # Channels of zeros: whatever their scale, they are zeros.
        parts = [self._fresh(before), source.channels, self._fresh(behind)]
        return ChannelAxis(node.outputs[0], source.axis, np.concatenate(parts))

    def _fresh(self, count: int) -> Array:
        first = len(self.parents)
        self.parents.extend(range(first, first + count))
        return np.arange(first, first + count)

    def _find(self, channel: int) -> int:
        while self.parents[channel] != channel:
            self.parents[channel] = self.parents[self.parents[channel]]
            channel = self.parents[channel]
        return channel

    def _join(self, channels: Array, others: Array) -> None:
        for one, other in zip(channels.tolist(), others.tolist(), strict=True):
            low, high = sorted((self._find(one), self._find(other)))
            self.parents[high] = low  # the lower one leads, so that FIXED leads wherever it is

    def _fix(self, value: ir.Value) -> None:
        if value in self.known:
            channels = self.known[value].channels
            self._join(channels, np.full_like(channels, FIXED))

    def scalings(self) -> list[Scaling]:
        """Return what can be scaled, in the order of the graph."""
        leaders = np.array([self._find(channel) for channel in range(len(self.parents))])
        parts = _Parts()
        for known in self.known.values():
            parts.join(leaders[known.channels])
        found: dict[int, Scaling] = defaultdict(Scaling)
        for known in self.known.values():
            for part, channels in parts.of(leaders[known.channels]):
                found[part].values.append(ChannelAxis(known.value, known.axis, channels))
        for name in ("writers", "biases", "readers"):
            for owner, numbers in getattr(self, name):
                for part, channels in parts.of(leaders[numbers]):
                    getattr(found[part], name).append((owner, channels))
        return [scaling for _, scaling in sorted(found.items()) if scaling.readers]


class _Parts:
    """Sets of channels that some value holds together; the fixed ones belong to none."""

    def __init__(self) -> None:
        self.leader: dict[int, int] = {}

    def find(self, channel: int) -> int:
        while self.leader.setdefault(channel, channel) != channel:
            self.leader[channel] = self.leader[self.leader[channel]]
            channel = self.leader[channel]
        return channel

    def join(self, channels: Array) -> None:
        free = [channel for channel in channels.tolist() if channel != FIXED]
        for channel in free[1:]:
            low, high = sorted((self.find(free[0]), self.find(channel)))
            self.leader[high] = low

    def of(self, channels: Array) -> list[tuple[int, Array]]:
        """Return the one set that channels of a value are of, none where all are fixed."""
        free = channels[channels != FIXED]
        return [(self.find(int(free[0])), channels)] if len(free) else []


def _as(node: ir.Node, source: ChannelAxis, axis: int | None = None) -> ChannelAxis:
    return ChannelAxis(node.outputs[0], source.axis if axis is None else axis, source.channels)


def _is_free(constant: ir.Value, vector: Array | None, channels: int) -> bool:
    """Return whether a constant is a vector of all channels that nothing else reads, so that it can be scaled."""
    return vector is not None and vector.shape == (channels,) and len(constant.uses()) == 1


def _fits(made: ChannelAxis) -> bool:
    """Return whether a value has as many channels as it was given numbers; what broadcasts may have more."""
    shape = made.value.shape
    return shape is not None and made.axis < len(shape) and shape[made.axis] == len(made.channels)


def _flattened(node: ir.Node, source: ChannelAxis) -> ChannelAxis | None:
    """Return the channels of [N, C, ...] as a matrix [N, C · ...]."""
    shape = source.value.shape
    if shape is None or node.attributes.get_int("axis", 1) != 1 or source.axis != 1:
        return None
    rest: Sequence[object] = list(shape)[2:]
    if not all(isinstance(size, int) for size in rest):
        return None
    each = int(np.prod([size for size in rest if isinstance(size, int)], dtype=np.int64))
    return ChannelAxis(node.outputs[0], 1, np.repeat(source.channels, each))


def _sliced(node: ir.Node, source: ChannelAxis) -> ChannelAxis | None:
    if len(node.inputs) < 3 or source.value.shape is None:
        return None
    bounds = [integers(value) if value is not None else None for value in node.inputs[1:]]
    starts, ends = bounds[:2]
    if starts is None or ends is None or any(bound is None for bound in bounds):
        return None
    axes = bounds[2] if len(bounds) > 2 and bounds[2] is not None else tuple(range(len(starts)))
    steps = bounds[3] if len(bounds) > 3 and bounds[3] is not None else (1,) * len(starts)
    channels = source.channels
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        if axis % len(source.value.shape) == source.axis:
            if step < 1:
                return None
            channels = channels[start:end:step]
    return ChannelAxis(node.outputs[0], source.axis, channels)


def _reduced(node: ir.Node, source: ChannelAxis) -> ChannelAxis | None:
    shape = source.value.shape
    axes = axes_of(node, len(shape)) if shape is not None else None
    if not axes or source.axis in axes:
        return None
    kept = node.attributes.get_int("keepdims", 1)
    return _as(node, source, source.axis - (0 if kept else sum(axis < source.axis for axis in axes)))

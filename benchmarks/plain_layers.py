"""Linear layers of an ONNX file as matrices, what they read, and pairs of layers put in their place.

This is what references are made with, and what judges the solvers, so nothing of graphopt is in it. A layer's matrix is
[outputs, inputs]; of a convolution, inputs are the channels and the kernel's positions within each, positions fastest.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnxruntime
from onnx import helper, numpy_helper
from prune_judging import constants

Array = np.ndarray[Any, Any]
Feeds = Mapping[str, Array]

# Samples that run together while the second moments are added up.
BATCH = 8


@dataclass(frozen=True)
class Layer:
    """A layer with a constant weight: its node, the weight's name and, as the file has it, the weight."""

    node: onnx.NodeProto
    name: str
    weight: Array

    @property
    def matrix(self) -> Array:
        """The weight as [outputs, inputs], in float64."""
        weight = self.weight.astype(np.float64)
        if self.node.op_type == "Conv":
            return weight.reshape(len(weight), -1)
        return weight if attribute(self.node, "transB", 0) else weight.T

    def as_weight(self, matrix: Array) -> Array:
        """Return a matrix in the weight's layout and dtype, of as many outputs and inputs as it has."""
        matrix = matrix.astype(self.weight.dtype)
        if self.node.op_type == "Conv":
            return matrix.reshape(len(matrix), *self.weight.shape[1:])
        return np.ascontiguousarray(matrix if attribute(self.node, "transB", 0) else matrix.T)


def attribute(node: onnx.NodeProto, name: str, default: Any) -> Any:
    """Return an attribute of a node, or what it is where it is left out."""
    return next((helper.get_attribute_value(one) for one in node.attribute if one.name == name), default)


def layers_of(model: onnx.ModelProto) -> list[Layer]:
    """Return the products of a matrix and the convolutions in one group whose weight is a constant, in graph order."""
    known = constants(model.graph)
    found = [Layer(node, node.input[1], known[node.input[1]]) for node in model.graph.node if is_linear(node, known)]
    times = [one.name for one in found]
    return [one for one in found if times.count(one.name) == 1]


def is_linear(node: onnx.NodeProto, known: Mapping[str, Array]) -> bool:
    """Return whether a node is a layer that can become two of its kind."""
    if node.op_type not in ("MatMul", "Gemm", "Conv") or node.input[1] not in known:
        return False
    if node.op_type == "Conv":
        return attribute(node, "group", 1) == 1 and known[node.input[1]].ndim == 4
    plain = not attribute(node, "transA", 0) and attribute(node, "alpha", 1.0) == 1.0
    return plain and known[node.input[1]].ndim == 2


def second_moments(model: onnx.ModelProto, layers: Sequence[Layer], feeds: Feeds) -> list[Array]:
    """Return E[x xᵀ] over samples and positions of what each layer of a model reads, [inputs, inputs], in float64."""
    read = list(dict.fromkeys(one.node.input[0] for one in layers))
    watched = onnx.ModelProto()
    watched.CopyFrom(model)
    given = {one.name for one in [*model.graph.input, *model.graph.output]}
    watched.graph.output.extend(onnx.ValueInfoProto(name=name) for name in read if name not in given)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(watched.SerializeToString(), options, providers=["CPUExecutionProvider"])
    computed = [name for name in read if name not in feeds]
    sums = [np.zeros((one.matrix.shape[1],) * 2) for one in layers]
    rows = [0] * len(layers)
    for batch in batches(feeds):
        values = {**batch, **dict(zip(computed, session.run(computed, batch), strict=True))}
        for place, one in enumerate(layers):
            for x in vectors(one, values[one.node.input[0]]):
                sums[place] += (x.T @ x).astype(np.float64)
                rows[place] += len(x)
    return [total / count for total, count in zip(sums, rows, strict=True)]


def batches(feeds: Feeds) -> Iterator[dict[str, Array]]:
    """Yield samples a few at a time."""
    for at in range(0, len(next(iter(feeds.values()))), BATCH):
        yield {name: x[at : at + BATCH] for name, x in feeds.items()}


def vectors(layer: Layer, x: Array) -> Iterator[Array]:
    """Yield the vectors that a layer's matrix multiplies, [vectors, inputs], a sample at a time."""
    if layer.node.op_type != "Conv":
        yield x.reshape(-1, x.shape[-1]).astype(np.float64)
        return
    kernel = layer.weight.shape[2:]
    strides = attribute(layer.node, "strides", [1, 1])
    dilations = attribute(layer.node, "dilations", [1, 1])
    spans = [(size - 1) * step + 1 for size, step in zip(kernel, dilations, strict=True)]
    padded = np.pad(x, ((0, 0), (0, 0), *padding(layer.node, x.shape[2:], spans, strides)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, spans, axis=(2, 3))
    windows = windows[:, :, :: strides[0], :: strides[1], :: dilations[0], :: dilations[1]]
    for sample in windows:
        yield sample.transpose(1, 2, 0, 3, 4).reshape(-1, layer.matrix.shape[1])


def padding(
    node: onnx.NodeProto, sizes: Sequence[int], spans: Sequence[int], strides: Sequence[int]
) -> list[tuple[int, int]]:
    """Return how many zeros a convolution puts before and behind each spatial axis."""
    auto = attribute(node, "auto_pad", b"NOTSET").decode()
    if not auto.startswith("SAME"):
        pads = attribute(node, "pads", [0, 0, 0, 0])
        return [(pads[0], pads[2]), (pads[1], pads[3])]
    found = []
    for size, span, stride in zip(sizes, spans, strides, strict=True):
        total = max((math.ceil(size / stride) - 1) * stride + span - size, 0)
        small = total // 2
        found.append((small, total - small) if auto == "SAME_UPPER" else (total - small, small))
    return found


def with_weights(model: onnx.ModelProto, made: Mapping[str, Array]) -> onnx.ModelProto:
    """Put other arrays into the initializers of a model, by name, and return it."""
    for one in model.graph.initializer:
        if one.name in made:
            one.CopyFrom(numpy_helper.from_array(made[one.name], one.name))
    return model


def with_pairs(model: onnx.ModelProto, pairs: Mapping[str, tuple[Array, Array]]) -> onnx.ModelProto:
    """Return a model in which two layers stand for each that is named by its weight: [outputs, r] · [r, inputs].

    Of a convolution the first of the two has the kernel and the second is 1×1; the bias goes to the second.
    """
    graph = model.graph
    nodes, arrays = list[onnx.NodeProto](), dict[str, Array]()
    layers = {id(one.node): one for one in layers_of(model)}
    for node in graph.node:
        layer = layers.get(id(node))
        if layer is None or layer.name not in pairs:
            nodes.append(node)
            continue
        left, right = pairs[layer.name]
        names = [f"{layer.name}_right", f"{layer.name}_left"]
        arrays[names[0]] = layer.as_weight(right)
        arrays[names[1]] = pointwise(layer, left)
        between = f"{node.output[0]}_narrow"
        first, second = onnx.NodeProto(), onnx.NodeProto()
        first.CopyFrom(node)
        second.CopyFrom(node)
        first.name = f"{node.name}_right"
        first.input[:] = [node.input[0], names[0]]
        first.output[:] = [between]
        second.input[:2] = [between, names[1]]
        if node.op_type == "Conv":
            del second.attribute[:]
            second.attribute.extend([helper.make_attribute("kernel_shape", [1, 1])])
        nodes += [first, second]
    kept = [one for one in graph.initializer if one.name not in pairs]
    del graph.node[:], graph.initializer[:]
    graph.node.extend(nodes)
    graph.initializer.extend([*kept, *(numpy_helper.from_array(array, name) for name, array in arrays.items())])
    return model


def pointwise(layer: Layer, matrix: Array) -> Array:
    """Return a matrix as the weight of a layer like another, but with a kernel of 1×1."""
    if layer.node.op_type == "Conv":
        return matrix.astype(layer.weight.dtype)[:, :, None, None]
    return layer.as_weight(matrix)

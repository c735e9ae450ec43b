"""A convolutional ONNX model as a torch module, and back: what Torch-Pruning, which takes live modules, needs.

The module has one Conv2d, BatchNorm2d or Linear for each such node and follows the graph in its forward; writing back
puts their arrays into the ONNX graph, so that no exporter comes between a tool and its figures.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import onnx
import torch
from onnx import helper, numpy_helper
from torch import Tensor, nn
from torch.nn import functional

LAYERS = ("Conv", "Gemm", "BatchNormalization")
Attributes = dict[str, Any]


class TorchGraph(nn.Module):
    """The graph as a module; it takes the first input and returns all outputs."""

    def __init__(self, model: onnx.ModelProto) -> None:
        super().__init__()
        self.graph = model.graph
        self.constants = {one.name: tensor(one) for one in model.graph.initializer}
        for node in model.graph.node:
            if node.op_type == "Constant":
                self.constants[node.output[0]] = constant(node)
            elif node.op_type == "Identity" and node.input[0] in self.constants:
                self.constants[node.output[0]] = self.constants[node.input[0]]
        self.layers = nn.ModuleDict()
        for node in model.graph.node:
            if node.op_type in LAYERS:
                self.layers[key(node)] = self.layer(node)
        self.eval()

    def layer(self, node: onnx.NodeProto) -> nn.Module:
        """Return the module of a node that has weights."""
        given = attributes(node)
        arrays = [self.constants[name] for name in node.input[1:] if name]
        if node.op_type == "Conv":
            return convolution(given, *arrays)
        if node.op_type == "BatchNormalization":
            scale, bias, mean, variance = arrays
            norm = nn.BatchNorm2d(len(scale), eps=given.get("epsilon", 1e-5))
            norm.load_state_dict({"weight": scale, "bias": bias, "running_mean": mean, "running_var": variance}, False)
            return norm
        weight = arrays[0] if given.get("transB") else arrays[0].T
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias=len(arrays) > 1)
        linear.load_state_dict({"weight": weight, **({"bias": arrays[1]} if len(arrays) > 1 else {})})
        return linear

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Return the outputs of the graph."""
        values: dict[str, Tensor] = {**self.constants, self.graph.input[0].name: x}
        for node in self.graph.node:
            if node.op_type == "Constant":
                continue
            if node.op_type in LAYERS:
                x = padded(values[node.input[0]], uneven_pads(node))
                values[node.output[0]] = self.layers[key(node)](x)
            else:
                reads = [values[name] for name in node.input if name]
                values[node.output[0]] = FUNCTIONS[node.op_type](attributes(node), *reads)
        return tuple(values[one.name] for one in self.graph.output)

    def last_layers(self) -> list[nn.Module]:
        """Return the layers that make outputs of the graph: these keep their widths."""
        makers = {name: node for node in self.graph.node for name in node.output}
        names, found = [one.name for one in self.graph.output], []
        while names:
            node = makers.get(names.pop())
            if node is not None and node.op_type in ("Conv", "Gemm"):
                found.append(self.layers[key(node)])
            elif node is not None:
                names.extend(node.input)
        return found

    def written(self, model: onnx.ModelProto) -> onnx.ModelProto:
        """Return a copy of the model this was made of, with the weights as they are now."""
        result = onnx.ModelProto()
        result.CopyFrom(model)
        del result.graph.value_info[:]
        for node in result.graph.node:
            if node.op_type in LAYERS:
                write(node, self.layers[key(node)], result.graph)
        read = {name for node in result.graph.node for name in node.input}
        kept = [one for one in result.graph.initializer if one.name in read]
        del result.graph.initializer[:]
        result.graph.initializer.extend(kept)
        return result


def prepared(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return the model with what Torch-Pruning cannot follow made of equal operators that it can.

    A shortcut of Slice, Slice and Pad, as in the first ResNets, becomes a convolution that copies every other pixel
    into the channels in the middle; a Reshape right before the last layer a Flatten.
    """
    result = onnx.ModelProto()
    result.CopyFrom(model)
    makers = {name: node for node in result.graph.node for name in node.output}
    shortcuts = any(node.op_type == "Pad" for node in result.graph.node)
    before_linear = {node.input[0] for node in result.graph.node if node.op_type == "Gemm"}
    nodes = []
    for node in result.graph.node:
        if node.op_type == "Pad":
            first = makers[makers[node.input[0]].input[0]]
            before = int(constant(makers[node.input[1]])[1])
            weight = np.zeros((4 * before, 2 * before, 1, 1), np.float32)
            weight[before + np.arange(2 * before), np.arange(2 * before)] = 1
            result.graph.initializer.append(numpy_helper.from_array(weight, f"{node.output[0]}.copies"))
            reads = [first.input[0], f"{node.output[0]}.copies"]
            node = helper.make_node("Conv", reads, node.output, kernel_shape=[1, 1], strides=[2, 2], group=1)
        elif node.op_type == "Reshape" and node.output[0] in before_linear:
            node = helper.make_node("Flatten", node.input[:1], node.output, axis=1)
        if node.op_type != "Slice" or not shortcuts:
            nodes.append(node)
    del result.graph.node[:]
    result.graph.node.extend(nodes)
    return result


def key(node: onnx.NodeProto) -> str:
    """Return the name of a node's module, which may not have dots."""
    return node.output[0].replace(".", "_")


def uneven_pads(node: onnx.NodeProto) -> list[int]:
    """Return the padding of a node, top, left, bottom, right, where torch's own layer has none like it."""
    pads = list(attributes(node).get("pads", [])) if node.op_type in ("Conv", "MaxPool") else []
    return pads if pads[:2] != pads[2:] else []


def padded(x: Tensor, pads: list[int], value: float = 0.0) -> Tensor:
    """Return an image with a border."""
    return functional.pad(x, (pads[1], pads[3], pads[0], pads[2]), value=value) if pads else x


def convolution(given: Attributes, weight: Tensor, bias: Tensor | None = None) -> nn.Conv2d:
    """Return a convolution, without its padding where that is uneven."""
    if given.get("auto_pad", "NOTSET") != "NOTSET":
        raise ValueError(f"no nn.Conv2d pads by {given['auto_pad']}")
    pads = given.get("pads", [0, 0, 0, 0])
    group = given.get("group", 1)
    layer = nn.Conv2d(
        weight.shape[1] * group,
        weight.shape[0],
        tuple(weight.shape[2:]),
        stride=tuple(given.get("strides", (1, 1))),
        padding=tuple(pads[:2]) if pads[:2] == pads[2:] else 0,
        dilation=tuple(given.get("dilations", (1, 1))),
        groups=group,
        bias=bias is not None,
    )
    layer.load_state_dict({"weight": weight, **({"bias": bias} if bias is not None else {})})
    return layer


def write(node: onnx.NodeProto, layer: Any, graph: onnx.GraphProto) -> None:
    """Put a module's arrays into its node."""
    names = (
        ("weight", "bias")
        if node.op_type != "BatchNormalization"
        else ("weight", "bias", "running_mean", "running_var")
    )
    for place, name in enumerate(names, 1):
        value = getattr(layer, name)
        if value is None:
            continue
        array = value.detach().numpy()
        if node.op_type == "Gemm" and name == "weight" and not attributes(node).get("transB"):
            array = array.T
        node.input[place] = f"{node.output[0]}.{name}"
        graph.initializer.append(numpy_helper.from_array(np.ascontiguousarray(array), node.input[place]))
    for attribute in node.attribute:
        if attribute.name == "group":
            attribute.i = layer.groups


def attributes(node: onnx.NodeProto) -> Attributes:
    """Return a node's attributes, texts decoded."""
    found = {one.name: helper.get_attribute_value(one) for one in node.attribute}
    return {name: one.decode() if isinstance(one, bytes) else one for name, one in found.items()}


def tensor(one: onnx.TensorProto) -> Tensor:
    """Return a constant as a tensor."""
    return torch.from_numpy(numpy_helper.to_array(one).copy())


def constant(node: onnx.NodeProto) -> Tensor:
    """Return what a Constant node holds."""
    value = helper.get_attribute_value(node.attribute[0])
    return tensor(value) if isinstance(value, onnx.TensorProto) else torch.tensor(value)


def pool(given: Attributes, x: Tensor) -> Tensor:
    """MaxPool."""
    pads = given.get("pads", [0, 0, 0, 0])
    if pads[:2] != pads[2:]:
        x, pads = padded(x, pads, float("-inf")), [0, 0]
    ceil = bool(given.get("ceil_mode", 0))
    return functional.max_pool2d(x, given["kernel_shape"], given["strides"], pads[:2], ceil_mode=ceil)


def mean(given: Attributes, x: Tensor, *axes: Tensor) -> Tensor:
    """ReduceMean, its axes an attribute or an input."""
    over = axes[0].tolist() if axes else given["axes"]
    return x.mean(over, keepdim=bool(given.get("keepdims", 1)))


def reshape(given: Attributes, x: Tensor, shape: Tensor) -> Tensor:
    """Reshape, 0 standing for the size as it is."""
    return x.reshape([x.shape[i] if size == 0 else size for i, size in enumerate(shape.tolist())])


def resize(given: Attributes, x: Tensor, *reads: Tensor) -> Tensor:
    """Resize by whole factors to nearest, the only one here."""
    factors = next(one for one in reads if one.numel() == x.ndim).tolist()[2:]
    return functional.interpolate(x, scale_factor=factors, mode="nearest")


FUNCTIONS: Mapping[str, Callable[..., Tensor]] = {
    "Relu": lambda given, x: functional.relu(x),
    "Clip": lambda given, x, low, high: torch.clamp(x, float(low), float(high)),
    "Sigmoid": lambda given, x: torch.sigmoid(x),
    "Add": lambda given, x, y: x + y,
    "Concat": lambda given, *reads: torch.cat(reads, given["axis"]),
    "Flatten": lambda given, x: torch.flatten(x, 1),
    "Transpose": lambda given, x: x.permute(given["perm"]),
    "Shape": lambda given, x: torch.tensor(x.shape)[given.get("start", 0) : given.get("end", x.ndim)],
    "Gather": lambda given, x, at: x[at],
    "Squeeze": lambda given, x: x.squeeze(),
    "Unsqueeze": lambda given, x: x.reshape(1),
    "Identity": lambda given, x: x,
    "GlobalAveragePool": lambda given, x: x.mean((2, 3), keepdim=True),
    "MaxPool": pool,
    "ReduceMean": mean,
    "Reshape": reshape,
    "Resize": resize,
}

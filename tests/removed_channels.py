"""What removing channels must give, by definition: a model in which they are zero wherever a value holds them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir

from graphopt import shapes, walk
from graphopt.authoring import Context
from graphopt.backends.onnxruntime import OnnxRuntime
from graphopt.backends.targets import TARGETS
from graphopt.passes.analyses.channel_groups import Axis, ChannelGroup, input_axis
from graphopt.passes.lossy.shrinking import shrink
from graphopt.rewriter import Rewriter

from .pass_runs import loaded, outputs_of

Kept = Mapping[ChannelGroup, np.ndarray]
SUMMING = (
    "Attention", "Conv", "ConvTranspose", "Einsum", "Gemm", "GRU", "LSTM", "MatMul", "ReduceSum", "RNN",
)  # fmt: skip
# Float32, with sums in another order.
TOLERANCE = 1e-4


def context(model: ir.Model) -> Context:
    return Context(model, Rewriter(model), TARGETS["portable"], OnnxRuntime(), threads=1)


def parsed(text: str, seed: int = 0) -> ir.Model:
    """Return a model from ONNX's text format; floats declared before the nodes without content are random weights."""
    proto = onnx.parser.parse_model(text)
    rng = np.random.default_rng(seed)
    made = {name for node in proto.graph.node for name in node.output}
    for info in [info for info in proto.graph.value_info if info.name not in made]:
        dims = [dim.dim_value for dim in info.type.tensor_type.shape.dim]
        # Variances, and other constants that must not be negative, are marked by their name.
        numbers = rng.uniform(0.5, 1.5, dims) if info.name.startswith("var") else rng.uniform(-0.6, 0.6, dims)
        proto.graph.initializer.append(onnx.numpy_helper.from_array(numbers.astype(np.float32), info.name))
        proto.graph.value_info.remove(info)
    if proto.ir_version < walk.FIRST_IR_WITH_PURE_INITIALIZERS:
        for tensor in proto.graph.initializer:
            proto.graph.input.append(onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
    model = loaded(proto)
    shapes.infer_shapes(model)
    return model


def values_of(model: ir.Model) -> dict[str, ir.Value]:
    """Return every value of a model by its name; those of sibling graphs may share one."""
    return {value.name or "": value for value in _values(model)}


def _values(model: ir.Model) -> list[ir.Value]:
    found = list(walk.initializers(model))
    for graph in walk.every_graph(model):
        found += [*graph.inputs, *(value for node in graph for value in node.outputs)]
    return found


def by_hand(model: ir.Model, size: int, axes: Mapping[tuple[str, int], Sequence[int] | None]) -> ChannelGroup:
    """Return a group from the units on axes of values; None stands for one unit after the other."""
    values = values_of(model)
    units = {
        Axis(values[name], axis): np.arange(size) if numbers is None else np.array(numbers, np.int64)
        for (name, axis), numbers in axes.items()
    }
    return ChannelGroup("by hand", size, units)


def removed(size: int, *units: int) -> np.ndarray:
    """Return what is kept of a number of units when some are removed."""
    kept = np.ones(size, bool)
    kept[list(units)] = False
    return kept


def zeroed(model: ir.Model, kept: Kept) -> ir.Model:
    """Return a copy of a model in which what is to be removed is zero, in constants and in whatever is computed."""
    copy = model.clone()
    twins, rewriter = dict(zip(_values(model), _values(copy), strict=True)), Rewriter(copy)
    for group, units in kept.items():
        for (value, axis), numbers in group.axes.items():
            stays = np.append(units, True)[numbers]
            if value.dtype in (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.DOUBLE) and not stays.all():
                _zero(twins[value], axis, stays, rewriter)
    return copy


def _zero(value: ir.Value, axis: int, stays: np.ndarray, rewriter: Rewriter) -> None:
    tensor, producer = walk.constant_tensor(value), value.producer()
    dims = shapes.dims_of(value)
    assert dims is not None
    mask = stays.reshape([-1 if place == axis else 1 for place in range(len(dims))])
    if tensor is not None:
        array = tensor.numpy()
        rewriter.set_weight(value, np.where(mask, array, np.zeros((), array.dtype)))
    elif producer is not None and (value.uses() or value.is_graph_output()):
        readers = [(use.node, use.idx) for use in value.uses()]
        assert value.dtype is not None
        zero = rewriter.const(np.zeros((), value.dtype.numpy()), "zero", near=producer)
        node = rewriter.make("Where", [rewriter.const(mask, "mask", near=producer), value, zero], sources=[producer])
        rewriter.insert_after(node, producer)
        for reader, index in readers:
            rewriter.set_input(reader, index, node.outputs[0])


def unread(model: ir.Model, kept: Kept) -> ir.Model:
    """Return a copy of a model in which the layers that read groups have zeros for what is to be removed."""
    copy = model.clone()
    twins, rewriter = dict(zip(_values(model), _values(copy), strict=True)), Rewriter(copy)
    for group, units in kept.items():
        for layer in group.readers:
            axis = input_axis(layer)
            _zero(twins[axis.value], axis.axis, np.append(units, True)[group.axes[axis]], rewriter)
    return copy


def is_read_by_layers(group: ChannelGroup) -> bool:
    """Return whether all that sums over the channels of a group is its linear layers."""
    layers = {layer.node for layer in (*group.readers, *group.writers)}
    readers = {use.node for axis in group.axes for use in axis.value.uses()}
    return not group.mixers and all(node in layers for node in readers if node.op_type in SUMMING)


def check_removal(model: ir.Model, kept: Kept, feed: Mapping[str, np.ndarray], *, by_readers: bool = False) -> ir.Model:
    """Shrink a model, check that it gives what the one with zeros gives, and return it.

    Args:
        model: The model.
        kept: The units that stay.
        feed: Inputs to compare with.
        by_readers: Compare with the model whose layers do not read the channels, in place of zeros everywhere.
    """
    expected = outputs_of(unread(model, kept) if by_readers else zeroed(model, kept), feed)
    shrink(context(model), kept)
    shapes.forget_inferred(model)
    proto = ir.to_proto(model)
    onnx.checker.check_model(proto, full_check=True)
    found = outputs_of(proto, feed)
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert found[name].shape == array.shape
        if array.dtype.kind not in "fiub":
            assert np.array_equal(found[name], array)
            continue
        scale = max(1.0, float(np.abs(array).max(initial=0)))
        np.testing.assert_allclose(found[name], array, atol=TOLERANCE * scale, rtol=0, err_msg=name)
    return model


def feed_of(model: ir.Model, seed: int = 0, **sizes: int) -> dict[str, np.ndarray]:
    """Return random numbers for the inputs of a model; named dimensions have the sizes given, else 2."""
    rng = np.random.default_rng(seed)
    feed = {}
    for value in model.graph.inputs:
        assert value.shape is not None
        assert value.dtype is not None
        dims = [dim if isinstance(dim, int) else sizes.get(str(dim.value), 2) for dim in value.shape]
        integer = re.match("U?INT", value.dtype.name)
        numbers = rng.integers(0, 2, dims) if integer else rng.standard_normal(dims)
        feed[value.name or ""] = numbers.astype(value.dtype.numpy())
    return feed

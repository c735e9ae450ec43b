"""Smaller sizes for a model of few nodes: dimensions divided everywhere at once, and plain numbers in its weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from graphopt import walk
from graphopt.backend import Array
from graphopt.debugging.reduction_cuts import small_integers

# Attributes that speak of sizes.
SIZE_ATTRIBUTES = frozenset(
    {"kernel_shape", "group", "num_heads", "kv_num_heads", "hidden_size", "split", "shape", "output_shape", "K", "N"}
)
# Sizes tried in the place of a larger one, the least first.
SMALL_SIZES = (1, 2, 4, 8, 16)
# A model has few sizes, each of which is tried a few times.
MOST_SIZES = 24

Feed = dict[str, Array]
Size = Callable[[int], int]
State = tuple[ir.Model, Feed]


@dataclass(frozen=True)
class SizeChange:
    """A size that becomes smaller, wherever it is found.

    Attributes:
        size: The size.
        small: What it becomes.
        multiples: Whether multiples of it become smaller by the same factor.
        contents: Whether that goes for what small integer constants hold, too.
    """

    size: int
    small: int
    multiples: bool
    contents: bool

    def apply(self, model: ir.Model, feed: Mapping[str, Array]) -> State:
        """Return a model and a feed of smaller sizes; sizes may stand for different things, so they may not fit."""
        return _resized(model, feed, self._of, contents=self.contents)

    def _of(self, other: int) -> int:
        if self.multiples:
            return other // self.size * self.small if other and other % self.size == 0 else other
        return self.small if other == self.size else other


def size_changes(model: ir.Model, feed: Mapping[str, Array]) -> Iterator[SizeChange]:
    """Yield what can be tried, the largest size first."""
    for size in _sizes(model, feed):
        for small in (small for small in SMALL_SIZES if small < size):
            yield SizeChange(size, small, multiples=True, contents=True)
            yield SizeChange(size, small, multiples=False, contents=True)
            yield SizeChange(size, small, multiples=False, contents=False)


def _sizes(model: ir.Model, feed: Mapping[str, Array]) -> list[int]:
    """Return the sizes larger than 1 of what a model reads, the largest first."""
    shapes = [array.shape for array in feed.values()]
    shapes += [walk.dims(value.const_value) for value in walk.initializers(model) if value.const_value is not None]
    return sorted({size for shape in shapes for size in shape if size > 1}, reverse=True)[:MOST_SIZES]


def _resized(model: ir.Model, feed: Mapping[str, Array], size: Size, *, contents: bool) -> State:
    clone = model.clone()
    for value in clone.graph.inputs:
        value.shape = _shape(value.shape, size)
    for value in walk.initializers(clone):
        tensor = value.const_value
        if tensor is None:
            continue
        array = tensor.numpy()
        smaller = _cut(array, size)
        if contents and small_integers(smaller):
            smaller = np.array([size(int(item)) for item in smaller.tolist()], smaller.dtype)
        if smaller is not array and tensor.dtype != ir.DataType.STRING:
            value.const_value = ir.tensor(np.ascontiguousarray(smaller), dtype=tensor.dtype, name=value.name)
            value.shape = ir.Shape(smaller.shape)
    for graph in walk.every_graph(clone):
        for node in graph:
            _resize_node(node, size)
    return clone, {name: np.ascontiguousarray(_cut(array, size)) for name, array in feed.items()}


def _resize_node(node: ir.Node, size: Size) -> None:
    for name, attribute in list(node.attributes.items()):
        if name not in SIZE_ATTRIBUTES or attribute.is_ref():
            continue
        if attribute.type == ir.AttributeType.INT:
            node.attributes[name] = ir.AttrInt64(name, size(attribute.as_int()))
        elif attribute.type == ir.AttributeType.INTS:
            node.attributes[name] = ir.AttrInt64s(name, [size(item) for item in attribute.as_ints()])
    for value in node.outputs:
        value.shape = _shape(value.shape, size)


def _shape(shape: ir.Shape | None, size: Size) -> ir.Shape | None:
    if shape is None:
        return None
    return ir.Shape([size(dim) if isinstance(dim, int) else dim for dim in shape])


def _cut(array: Array, size: Size) -> Array:
    wanted = tuple(size(length) for length in array.shape)
    return array if wanted == array.shape else array[tuple(slice(0, length) for length in wanted)]


@dataclass(frozen=True)
class ContentChange:
    """A weight or an input that becomes the same number everywhere.

    Attributes:
        name: Its name.
        number: The number.
        of_feed: Whether it is an input.
    """

    name: str
    number: int
    of_feed: bool

    def apply(self, model: ir.Model, feed: Mapping[str, Array]) -> State:
        """Return a model and a feed of plainer numbers."""
        if self.of_feed:
            array = feed[self.name]
            return model, {**feed, self.name: np.full(array.shape, self.number, array.dtype)}
        clone = model.clone()
        for value in walk.initializers(clone):
            if value.name == self.name and value.const_value is not None:
                dtype = value.const_value.dtype
                array = np.full(walk.dims(value.const_value), self.number, dtype.numpy())
                value.const_value = ir.tensor(array, dtype=dtype, name=value.name)
        return clone, dict(feed)


def content_changes(model: ir.Model, feed: Mapping[str, Array]) -> Iterator[ContentChange]:
    """Yield what can be tried: zeros first, then ones."""
    for number in (0, 1):
        for value in walk.initializers(model):
            tensor = value.const_value
            if value.name and tensor is not None and _is_float(tensor.dtype) and not _is_plain(tensor.numpy()):
                yield ContentChange(value.name, number, of_feed=False)
        for name, array in feed.items():
            if array.dtype.kind == "f" and not _is_plain(array):
                yield ContentChange(name, number, of_feed=True)


def _is_float(dtype: ir.DataType) -> bool:
    return dtype in (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.DOUBLE, ir.DataType.BFLOAT16)


def _is_plain(array: Array) -> bool:
    return array.size < 2 or bool((array == array.reshape(-1)[0]).all())

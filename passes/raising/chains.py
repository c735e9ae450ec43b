"""Short walks up from a value: through products, sums and scalings, as exporters write them in many orders."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from graphopt import walk
from graphopt.backend import Array
from graphopt.pattern import Match

# No constant that is looked into for a number, axes or a shape is larger.
SMALL = 256
# Nodes a product is followed through: enough for every known spelling, and little to walk.
PRODUCT_LIMIT = 8


@dataclass(frozen=True)
class Product:
    """A product: a number, the values it multiplies, and the nodes that compute it."""

    factor: float
    values: tuple[ir.Value, ...]
    nodes: tuple[ir.Node, ...]


def opset(m: Match) -> int:
    """Return the version of the ONNX operators around a match: a function may import another one than the model."""
    imports = m.root.graph.opset_imports if m.root.graph is not None else {}
    return int(imports.get("", imports.get("ai.onnx", m.opset)))


def made_by(value: ir.Value | None, *op_types: str) -> ir.Node | None:
    """Return the node of one of the standard operators that makes a value as its first output, if one does."""
    node = value.producer() if value is not None else None
    if node is None or value is not node.outputs[0] or not walk.is_onnx_op(node, *op_types):
        return None
    return None if walk.has_references(node) else node


def number(value: ir.Value | None) -> float | None:
    """Return the number a constant of a single element holds; of any rank, so mind what broadcasting it does."""
    tensor = walk.constant_tensor(value)
    if tensor is None or tensor.size != 1 or not is_numeric(tensor.dtype):
        return None
    return float(tensor.numpy().reshape(-1)[0])


def scalar(value: ir.Value | None, beside: ir.Value | None = None) -> float | None:
    """Return the number a constant stands for where it multiplies or shifts ``beside`` without adding axes to it."""
    found, tensor = number(value), walk.constant_tensor(value)
    if found is None or tensor is None:
        return None
    rank = len(tensor.shape)
    known = beside.shape.rank() if beside is not None and beside.shape is not None else 0
    return found if rank <= max(known, 0) else None


def integers(value: ir.Value | None) -> list[int] | None:
    """Return the integers a small constant holds."""
    tensor = walk.constant_tensor(value)
    if tensor is None or tensor.size > SMALL or tensor.dtype not in (ir.DataType.INT64, ir.DataType.INT32):
        return None
    return [int(one) for one in tensor.numpy().reshape(-1)]


def is_numeric(dtype: ir.DataType) -> bool:
    """Return whether a dtype is one of plain numbers."""
    return dtype.is_floating_point() or dtype.is_integer()


def near(a: float, b: float, dtype: ir.DataType | None = None) -> bool:
    """Return whether two numbers are one within the rounding of float16, or else of float32."""
    return math.isclose(a, b, rel_tol=2e-3 if dtype == ir.DataType.FLOAT16 else 1e-6)


def axes_of(node: ir.Node, position: int = 1) -> list[int] | None:
    """Return the axes of a reduction or (Un)Squeeze, an input or an attribute by opset, where they are known."""
    if len(node.inputs) > position and node.inputs[position] is not None:
        return integers(node.inputs[position])
    axes = node.attributes.get_ints("axes")
    return list(axes) if axes is not None else None


def trailing(axes: Sequence[int], rank: int | None) -> int | None:
    """Return the first of axes that are the last ones of a tensor, counted from its end, else None."""
    if rank is None and any(axis >= 0 for axis in axes):
        return None
    backwards = sorted(axis - rank if axis >= 0 and rank is not None else axis for axis in axes)
    return -len(backwards) if backwards == list(range(-len(backwards), 0)) and backwards else None


def rank_of(value: ir.Value | None) -> int | None:
    """Return the rank of a value, if known."""
    return value.shape.rank() if value is not None and value.shape is not None else None


def tail(value: ir.Value | None, count: int) -> tuple[int, ...] | None:
    """Return the last dimensions of a value where each of them is a number."""
    if value is None or value.shape is None or len(value.shape) < count:
        return None
    dims = list(value.shape)[len(value.shape) - count :]
    return tuple(int(dim) for dim in dims) if all(isinstance(dim, int) for dim in dims) else None  # type: ignore[arg-type]


def sides(node: ir.Node) -> Iterator[tuple[ir.Value, ir.Value]]:
    """Yield the two operands of a commutative node, in both orders."""
    first, second = node.inputs
    if first is not None and second is not None:
        yield first, second
        yield second, first


def shifted(value: ir.Value | None) -> tuple[ir.Value, float, ir.Node] | None:
    """Take x + number apart, Sub of a number included: x, the number, the node."""
    node = made_by(value, "Add", "Sub")
    if node is None or len(node.inputs) != 2:
        return None
    for x, constant in sides(node):
        found = scalar(constant, x)
        if found is None or (node.op_type == "Sub" and constant is node.inputs[0]):
            continue
        return x, found if node.op_type == "Add" else -found, node
    return None


def product(value: ir.Value, *, whole: ir.Node | None = None) -> Product:
    """Take a product apart: Mul, Div by a number, Neg and whole powers, as far as only the product reads them.

    Args:
        value: The product.
        whole: The node of it that others may read, its last.
    """
    factor, values = 1.0, list[ir.Value]()
    nodes: list[ir.Node] = []
    open_ends = [value]
    while open_ends:
        end = open_ends.pop(0)
        node = made_by(end, "Mul", "Div", "Neg", "Pow")
        alone = node is not None and (node is whole or (len(end.uses()) == 1 and not end.is_graph_output()))
        if node is None or not alone or len(nodes) >= PRODUCT_LIMIT:
            values.append(end)
            continue
        step = _factored(node)
        if step is None:
            values.append(end)
            continue
        factor *= step[0]
        open_ends = [*step[1], *open_ends]
        nodes.append(node)
    return Product(factor, tuple(values), tuple(nodes))


def _factored(node: ir.Node) -> tuple[float, list[ir.Value]] | None:
    """Return one step of a product: its number, and its other operands."""
    operands = [value for value in node.inputs if value is not None]
    first, second = operands[0], operands[-1]
    if node.op_type == "Neg":
        return -1.0, [first]
    if len(operands) != 2:
        return None
    if node.op_type == "Mul":
        for x, constant in sides(node):
            found = scalar(constant, x)
            if found is not None:
                return found, [x]
        return 1.0, [first, second]
    found = scalar(second, first)
    if found is None:
        return None
    if node.op_type == "Div":
        return (1.0 / found, [first]) if found != 0 else None
    return (1.0, [first] * int(found)) if found in (2.0, 3.0) else None


def ones(shape: Sequence[int], dtype: ir.DataType) -> Array:
    """Return a tensor of ones."""
    return np.ones(tuple(shape), dtype.numpy())


def holds_only(value: ir.Value | None, content: float) -> bool:
    """Return whether a value is a constant, of the size of a layer's width at most, equal to a number everywhere."""
    tensor = walk.constant_tensor(value)
    return tensor is not None and 0 < tensor.size <= 65536 and bool(np.all(tensor.numpy() == content))

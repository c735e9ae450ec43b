"""What reads a constant in the end, past whatever only shows it in another layout, type or place."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import onnx_ir as ir

from graphopt import walk
from graphopt.explaining.advice import made_of_constants

from .crossings import Crossed, Crossings

# What shows the first input as it is, up to layout, type, sign or rounding.
_VIEWS = frozenset(
    {
        "Cast",
        "Concat",
        "Expand",
        "Flatten",
        "Identity",
        "Neg",
        "Reshape",
        "Slice",
        "Split",
        "Squeeze",
        "Transpose",
        "Unsqueeze",
    }
)
# Views are a few nodes long; a walk that finds no end is of something else.
_DEEPEST = 16


@dataclass(frozen=True, eq=False)
class Reader:
    """A node that computes with a constant, or with a view of it.

    Attributes:
        node: The node.
        index: Which of its inputs the constant is.
        nodes: The node and all those between the constant and it, calls of functions too.
        dequantize: The DequantizeLinear that makes floats of codes on the way, or the Mul that does behind a Cast, as
            models older than opset 13 have it; or None.
    """

    node: ir.Node
    index: int
    nodes: tuple[ir.Node, ...]
    dequantize: ir.Node | None = None


def readers_of(value: ir.Value, crossings: Crossings) -> Iterator[Reader]:
    """Yield what reads a constant; what reads it inside of a nested graph or a function, too."""
    yield from _readers(value, (), None, crossings, set())


def _readers(
    value: ir.Value,
    path: tuple[ir.Node, ...],
    dequantize: ir.Node | None,
    crossings: Crossings,
    crossed: set[Crossed],
) -> Iterator[Reader]:
    for between, node, index in crossings.uses(value, crossed):
        through = (*path, *between, node)
        if _looks_codes_up(node, index, value):
            readers = [one.node for output in node.outputs for one in output.uses()]
            ends = [one for one in readers if walk.is_onnx_op(one, "DequantizeLinear")]
            whole = ends[0] if ends and len(ends) == len(readers) else None
            yield Reader(node, index, (*through, *readers), whole)
            continue
        if len(path) < _DEEPEST and _shows(node, index, value):
            seen = node if dequantize is None and _decodes(node, value) else dequantize
            for output in node.outputs:
                yield from _readers(output, through, seen, crossings, crossed)
            continue
        yield Reader(node, index, _with_converted(node, index, through), dequantize)


def _shows(node: ir.Node, index: int, value: ir.Value) -> bool:
    """Return whether an operator only shows its input in another way."""
    if node.domain not in walk.ONNX_DOMAINS:
        return False
    if node.op_type in ("DequantizeLinear", "QuantizeLinear"):
        return index == 0
    if node.op_type == "Concat":
        return made_of_constants(node.outputs[0])
    if node.op_type in _VIEWS:
        return index == 0
    if node.op_type == "Gather":
        return index == 0 and _holds_codes(value) and made_of_constants(node.inputs[1])
    # A weight that another one is made of: the same but for factors.
    return node.op_type == "Mul" and made_of_constants(node.outputs[0]) and _is_larger(node, index)


def _decodes(node: ir.Node, value: ir.Value) -> bool:
    """Return whether a node makes what codes stand for of them."""
    if node.op_type != "Mul":
        return node.op_type == "DequantizeLinear"
    while (producer := value.producer()) is not None:
        if producer.op_type == "Constant" or not producer.inputs or producer.inputs[0] is None:
            break
        value = producer.inputs[0]
    return _holds_codes(value)


def _looks_codes_up(node: ir.Node, index: int, value: ir.Value) -> bool:
    """Return whether an operator looks rows up in a table of codes."""
    if not walk.is_onnx_op(node, "Gather") or index != 0 or not _holds_codes(value):
        return False
    return not made_of_constants(node.inputs[1])


def _holds_codes(value: ir.Value) -> bool:
    tensor = walk.constant_tensor(value)
    return tensor is not None and not tensor.dtype.is_floating_point()


def _is_larger(node: ir.Node, index: int) -> bool:
    """Return whether an operand is the one a product is shaped like: the weight, not its factor."""
    sizes = []
    for value in node.inputs:
        shape = value.shape if value is not None else None
        tensor = walk.constant_tensor(value)
        if tensor is not None:
            sizes.append(tensor.size)
        else:
            sizes.append(_size(shape))
    return len(sizes) == 2 and sizes[index] > sizes[1 - index]


def _size(shape: ir.Shape | None) -> int:
    if shape is None or not all(isinstance(dim, int) for dim in shape):
        return 1 << 62  # not known, and so no small factor
    total = 1
    for dim in shape:
        total *= int(dim)  # type: ignore[arg-type]
    return total


def _with_converted(node: ir.Node, index: int, path: tuple[ir.Node, ...]) -> tuple[ir.Node, ...]:
    """Return the nodes a choice by name goes by: of a scale, what reads the floats or makes the codes, too."""
    if node.op_type == "DequantizeLinear" and index:
        return (*path, *(use.node for output in node.outputs for use in output.uses()))
    if node.op_type == "QuantizeLinear" and index:
        producer = node.inputs[0].producer() if node.inputs[0] is not None else None
        return (*path, producer) if producer is not None else path
    return path

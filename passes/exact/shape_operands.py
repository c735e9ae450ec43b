"""Shape operands that a constant can say, although the shape itself varies."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from graphopt import dims as d
from graphopt import shapes, walk
from graphopt.authoring import Context
from graphopt.dims import Size
from graphopt.rewriter import let_go

from .shape_numbers import sweep


def as_constant(node: ir.Node, ctx: Context) -> None:
    """Give a node a constant shape operand where its own says no more than one could."""
    if not walk.is_onnx_op(node, "Reshape", "Expand", "Slice"):
        return
    place = 2 if node.op_type == "Slice" else 1
    operand = node.inputs[place] if len(node.inputs) > place else None
    if operand is None or walk.constant_tensor(operand) is not None or operand.dtype is None:
        return
    contents = shapes.contents(operand)
    if contents is None or contents.known is not None:
        return
    entries = {"Reshape": _reshape, "Expand": _expand, "Slice": _slice_end}[node.op_type](node)
    if entries is None:
        return
    with ctx.rewriter.edit("constant-operand", node):
        constant = ctx.rewriter.make_const(np.array(entries, operand.dtype.numpy()), f"{operand.name}_constant")
        if not _agrees(node, place, constant, ctx):
            return
        ctx.rewriter.adopt(constant, near=node)
        ctx.rewriter.set_input(node, place, constant)
        if "allowzero" in node.attributes:
            ctx.rewriter.set_attribute(node, "allowzero", None)  # a 0 copies now
        producer = operand.producer()
        if producer is not None:
            sweep(producer, ctx)


def _agrees(node: ir.Node, place: int, constant: ir.Value, ctx: Context) -> bool:
    """Return whether a copy of a node that reads the constant computes the same."""
    if ctx.check_rewrite is None:
        return True
    inputs = [constant if index == place else value for index, value in enumerate(node.inputs)]
    attributes = {name: attribute for name, attribute in node.attributes.items() if name != "allowzero"}
    copy = ctx.rewriter.make(node.op_type, inputs, attributes, sources=[node])
    agrees = ctx.agrees("constant-operand", [node], node.outputs, copy.outputs, [copy])
    let_go(copy)
    return agrees


def _entries(value: ir.Value | None) -> tuple[Size, ...] | None:
    contents = shapes.contents(value)
    return contents.entries if contents is not None and len(contents.shape) == 1 else None


def _reshape(node: ir.Node) -> list[int] | None:
    """Return a shape that copies dimensions of the data by 0, states numbers, and leaves one open by -1."""
    target, dims, result = _entries(node.inputs[1]), shapes.dims_of(node.inputs[0]), shapes.dims_of(node.outputs[0])
    if target is None or dims is None or result is None or len(result) != len(target):
        return None
    zero_is_zero = node.attributes.get_int("allowzero", 0) != 0
    entries: list[int] = []
    for index, (wanted, found) in enumerate(zip(target, result, strict=True)):
        if isinstance(wanted, int) and wanted > 0:
            entries.append(wanted)
        elif wanted == 0 and zero_is_zero:
            return None  # a constant cannot say both: copy here, zero there
        elif wanted == 0:
            entries.append(0)
        elif isinstance(found, int) and found > 0:
            entries.append(found)
        elif index < len(dims) and dims[index] == (found if wanted == -1 else wanted):
            entries.append(0)
        else:
            entries.append(-1)
    if entries.count(-1) > 1:
        return None
    # Beside a dimension of zero, -1 is refused: so it is already where the target has it, except under allowzero.
    if -1 in entries and (zero_is_zero or target[entries.index(-1)] != -1):
        copies = [index for index, entry in enumerate(entries) if entry == 0]
        if not all(d.at_least(dims[index], 1) for index in copies):
            return None
    return entries


def _expand(node: ir.Node) -> list[int] | None:
    """Return a shape with 1 where the data has the wanted size already."""
    target, dims = _entries(node.inputs[1]), shapes.dims_of(node.inputs[0])
    if target is None or dims is None:
        return None
    entries: list[int] = []
    for behind, wanted in enumerate(reversed(target), 1):
        if isinstance(wanted, int):
            entries.append(wanted)
        elif behind <= len(dims) and dims[-behind] == wanted:
            entries.append(1)
        else:
            return None
    return entries[::-1]


def _slice_end(node: ir.Node) -> list[int] | None:
    """Return ends that are numbers: to the end of a dimension, or counted from there."""
    starts, ends, dims = _entries(node.inputs[1]), _entries(node.inputs[2]), shapes.dims_of(node.inputs[0])
    axes = _entries(node.inputs[3]) if len(node.inputs) > 3 and node.inputs[3] is not None else None
    steps = _entries(node.inputs[4]) if len(node.inputs) > 4 and node.inputs[4] is not None else None
    if starts is None or ends is None or dims is None or node.inputs[2] is None or node.inputs[2].dtype is None:
        return None
    if (axes is None and len(node.inputs) > 3 and node.inputs[3] is not None) or (
        steps is None and len(node.inputs) > 4 and node.inputs[4] is not None
    ):
        return None
    axes, steps = axes or tuple(range(len(ends))), steps or (1,) * len(ends)
    unlimited = np.iinfo(node.inputs[2].dtype.numpy()).max
    entries: list[int] = []
    for end, axis, step in zip(ends, axes, steps, strict=True):
        if isinstance(end, int):
            entries.append(end)
            continue
        if not isinstance(axis, int) or not isinstance(step, int) or step < 1 or not -len(dims) <= axis < len(dims):
            return None
        gap = end - dims[axis]
        if d.at_least(gap, 0):
            entries.append(int(unlimited))
        elif isinstance(gap, int) and d.at_least(end, 0):
            entries.append(gap)
        else:
            return None
    return entries

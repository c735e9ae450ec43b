"""What is done to a model before it is quantized, so that it can be, and so that more of it runs in integers."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from graphopt import walk
from graphopt.authoring import Context
from graphopt.errors import PassError

from ..analyses.integer_units import IntegerUnits, integer_units
from ..analyses.selection import Selection
from ..exact.opset import Opset
from .integer_weights import release
from .quant_plan import StaticPlan, as_opset_allows

_POOL = "GlobalAveragePool"
_IMAGE_RANK = 4


def in_opset(model: ir.Model, ctx: Context, plan: StaticPlan) -> StaticPlan:
    """Convert the model to the first opset that says what is planned, and return the plan.

    Where it cannot be converted, a scale for each channel is given up if one for each weight will do.

    Raises:
        PassError: Neither will do.
    """
    found = walk.opset(model)
    if found >= plan.opset:
        return plan
    try:
        Opset(to=plan.opset).run(model, ctx)
        return plan
    except PassError as error:
        coarser = as_opset_allows(plan, found)
        if coarser is None:
            raise PassError(
                f"pass `quant:mode=static` needs opset {plan.opset} and the model has {found}, which cannot be "
                f"converted: {error.message}",
                hint=f"export the model with opset {plan.opset} or later",
            ) from error
        ctx.note(
            f"one scale per weight: opset {found} has no scale per channel, and the model cannot be converted "
            f"({error.message}); export with opset {plan.opset} or later for better accuracy",
            opset=found,
        )
        return coarser


def rewrite_means(model: ir.Model, ctx: Context, plan: StaticPlan, selection: Selection) -> IntegerUnits:
    """Write means over images that are there in integers as what has a kernel, and return what runs in integers then.

    A reduction has none, and what is brought to float for it is the whole image. As GlobalAveragePool it stays in
    integers; where nothing reads it so, a product with one number throughout gives the mean as a float, unrounded.
    """
    units = integer_units(model, ctx.target, plan.scheme, selection)
    means = [node for node in _readers(units) if _is_mean_of_image(node) and selection.allows(node)]
    if _POOL in ctx.target.integer_ops and means:
        for node in means:
            _pool(ctx, node)
        units = integer_units(model, ctx.target, plan.scheme, selection)
    product = ctx.target.fusions.of("MatMul")
    if product is None or not product.kernel_to_float or "Transpose" not in ctx.target.shared_scale_ops:
        return units
    lowered = {unit.node for unit in units.units}
    pools = [node for node in _readers(units) if node not in lowered and _has_known_size(node)]
    chosen = [node for node in pools if walk.is_onnx_op(node, _POOL) and selection.allows(node)]
    for node in chosen:
        _multiply(ctx, node)
    return integer_units(model, ctx.target, plan.scheme, selection) if chosen else units


def _readers(units: IntegerUnits) -> list[ir.Node]:
    """Return the nodes that read what units that compute make."""
    made = [value for unit in units.units if unit.kind != "move" for value in unit.outputs]
    return list(dict.fromkeys(use.node for value in made for use in value.uses()))


def _has_known_size(node: ir.Node) -> bool:
    source = node.inputs[0] if node.inputs else None
    return (
        source is not None
        and source.shape is not None
        and len(source.shape) == _IMAGE_RANK
        and all(isinstance(size, int) and size > 0 for size in list(source.shape)[1:])
        and node.graph is source.graph
    )


def _is_mean_of_image(node: ir.Node) -> bool:
    source = node.inputs[0] if node.inputs else None
    if not walk.is_onnx_op(node, "ReduceMean") or source is None or source.shape is None:
        return False
    if len(source.shape) != _IMAGE_RANK or source.dtype is not ir.DataType.FLOAT or node.graph is not source.graph:
        return False
    axes = _axes(node)
    return axes is not None and {axis % _IMAGE_RANK for axis in axes} == {2, 3}


def _axes(node: ir.Node) -> list[int] | None:
    """Return the axes of a reduction, an attribute or a constant input, or None where they are not said."""
    if len(node.inputs) > 1 and node.inputs[1] is not None:
        tensor = walk.constant_tensor(node.inputs[1])
        return None if tensor is None else [int(axis) for axis in tensor.numpy().reshape(-1)]
    found = list(node.attributes.get_ints("axes", []))
    return found or None


def _pool(ctx: Context, node: ir.Node) -> None:
    source, rewriter = node.inputs[0], ctx.rewriter
    assert source is not None, "checked before"
    with rewriter.edit("mean-as-pool", node):
        pool = rewriter.make(_POOL, [source], sources=[node], name="pool")
        result = rewriter.insert(pool, before=node).outputs[0]
        if node.attributes.get_int("keepdims", 1) == 0:
            flat = rewriter.make("Flatten", [result], {"axis": 1}, sources=[node], name="flat")
            result = rewriter.insert(flat, before=node).outputs[0]
        rewriter.replace(node.outputs[0], result)
        _erase(ctx, node)


def _multiply(ctx: Context, node: ir.Node) -> None:
    """GlobalAveragePool(x) = ones / (H · W) · x, rows of x being pixels and columns channels."""
    source, rewriter = node.inputs[0], ctx.rewriter
    assert source is not None, "checked before"
    assert source.shape is not None, "checked before"
    channels, height, width = (int(size) for size in list(source.shape)[1:])  # type: ignore[arg-type]

    def make(op_type: str, inputs: list[ir.Value], **attributes: object) -> ir.Value:
        made = rewriter.make(op_type, inputs, attributes, sources=[node], name="mean")
        return rewriter.insert(made, before=node).outputs[0]

    with rewriter.edit("mean-as-product", node):
        pixels = make("Transpose", [source], perm=[0, 2, 3, 1])
        rows = rewriter.const(np.array([0, height * width, channels]), "rows", near=node)
        share = np.full((1, height * width), 1.0 / (height * width), np.float32)
        weights = rewriter.const(share, "share", near=node)
        product = make("MatMul", [weights, make("Reshape", [pixels, rows])])
        flat = next((use.node for use in node.outputs[0].uses() if walk.is_onnx_op(use.node, "Flatten")), None)
        if flat is not None and _reads_alone(flat, node):
            # As [N, 1, C] or [N, C, 1, 1] is flattened to the same.
            rewriter.set_input(flat, 0, product)
        else:
            image = rewriter.const(np.array([0, channels, 1, 1]), "image", near=node)
            rewriter.replace(node.outputs[0], make("Reshape", [product, image]))
        _erase(ctx, node)


def _erase(ctx: Context, node: ir.Node) -> None:
    """Remove a node, and its axes where nothing else reads them."""
    operands = list(node.inputs)[1:]
    ctx.rewriter.erase(node)
    for operand in operands:
        release(ctx.rewriter, operand)


def _reads_alone(flat: ir.Node, node: ir.Node) -> bool:
    output = node.outputs[0]
    plain = flat.attributes.get_int("axis", 1) == 1 and flat.graph is node.graph
    return plain and len(output.uses()) == 1 and not output.is_graph_output()

"""Shrinking: channels taken out of a model everywhere at once, which leaves a smaller dense one."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from graphopt import shapes, walk
from graphopt.authoring import Context
from graphopt.backend import Array
from graphopt.derived import DerivedTensor, thinned
from graphopt.mapped import MappedTensor
from graphopt.shape_rules.shape_facts import Dims

from ..analyses.channel_groups import ChannelGroup
from .cuts import Cuts, mistake
from .shrunk_attributes import mend_attributes
from .shrunk_shapes import Mending, mend_shapes


def shrink(ctx: Context, kept: Mapping[ChannelGroup, Array]) -> None:
    """Remove channels of groups from all values that hold them; one edit of the model.

    Constants are cut along each of their axes, those that lie in a file only when they are written. What nodes are told
    of sizes, places, groups and heads follows. In the end every shape is inferred anew, and compared.

    Args:
        ctx: The model, and what changes it.
        kept: For each group, bool [size of the group]: the units that stay, one at least. Groups left out stay whole.

    Raises:
        PassCrash: The groups do not fit the model or each other: what is left would be no model.
    """
    was_sound = ctx.analyse(shapes.infer_shapes) is None
    cuts = Cuts(kept)
    _refuse_ports(ctx.model, cuts)
    nodes = list(walk.every_node(ctx.model))
    before = {value: cuts.dims(value) for node in nodes for value in node.outputs}
    with ctx.rewriter.edit("shrink"):
        mending = Mending(cuts, ctx)
        for node in nodes:
            if cuts.touches(node):
                mend_attributes(node, mending)
                mend_shapes(node, mending)
        for value in cuts:
            _cut_constant(value, cuts, ctx)
        mending.editor.sweep()
        # No size inferred before holds any more.
        shapes.forget_inferred(ctx.model)
        for value in cuts:
            shapes.declare_sizes(value, {axis: int(stays.sum()) for axis, stays in cuts.of(value).items()})
        contradiction = shapes.infer_shapes(ctx.model)
    if contradiction is not None and was_sound:
        raise mistake(contradiction)
    _check(before, cuts)


def _refuse_ports(model: ir.Model, cuts: Cuts) -> None:
    """Refuse to change what a model takes and gives."""
    for value in (*model.graph.inputs, *model.graph.outputs):
        if cuts.of(value):
            raise mistake(f"`{value.name}` is an input or output of the model", value.producer())


def _cut_constant(value: ir.Value, cuts: Cuts, ctx: Context) -> None:
    tensor = walk.constant_tensor(value)
    if tensor is None or not (value.uses() or value.is_graph_output()):
        return
    indices = {axis: np.flatnonzero(stays) for axis, stays in cuts.of(value).items()}
    if isinstance(tensor, MappedTensor | DerivedTensor | ir.LazyTensor):
        cut = thinned(tensor, indices)
        cut.name = value.name
        ctx.rewriter.set_weight(value, cut, resized=True)
        return
    # What is in memory is made smaller there.
    array = tensor.numpy()
    for axis, chosen in indices.items():
        array = array.take(chosen, axis)
    ctx.rewriter.set_weight(value, array, resized=True)


def _check(before: Mapping[ir.Value, Dims | None], cuts: Cuts) -> None:
    """Check that every axis is as long as what is kept of it, and every other as long as it was."""
    for value, dims in before.items():
        producer = value.producer()
        is_left = producer is not None and producer.graph is not None and (value.uses() or value.is_graph_output())
        if dims is None or not is_left:
            continue
        after = shapes.dims_of(value)
        for axis in range(len(dims)):
            wanted = cuts.new_length(value, axis)
            found = after[axis] if after is not None and len(after) == len(dims) else None
            if wanted is not None and found != wanted:
                raise mistake(f"axis {axis} of `{value.name}` is {found}, and {wanted} are kept", producer)

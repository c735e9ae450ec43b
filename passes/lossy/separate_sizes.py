"""Shapes that are read off another tensor are told the sizes that are known, so that the two can shrink apart."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from graphopt import shapes, walk
from graphopt.rewriter import Rewriter

from ..analyses.size_origins import SHAPE_INPUT, size_origins


def separate_sizes(model: ir.Model, rewriter: Rewriter) -> int:
    """Write down known sizes in shapes that are computed while a model runs; return how many shapes were changed.

    Exporters give a Reshape the shape of another tensor, often one for all layers alike. Where a size in it is known,
    this is no reason to tie the layers. To be done ahead of `channel_groups`.

    Args:
        model: A model with inferred shapes.
        rewriter: What changes it.
    """
    changed = 0
    for graph in walk.graphs_within(model.graph):
        for node in list(graph):
            if not walk.is_onnx_op(node, *SHAPE_INPUT):
                continue
            index = SHAPE_INPUT[node.op_type]
            value = node.inputs[index] if index < len(node.inputs) else None
            known = _known_sizes(value)
            if value is not None and known:
                with rewriter.edit("separate sizes", node):
                    rewriter.set_input(node, index, _written_down(node, value, known, rewriter))
                changed += 1
    return changed


def _known_sizes(value: ir.Value | None) -> dict[int, int]:
    """Return sizes that are computed although they are known, by their places in a shape."""
    contents, origins = shapes.contents(value), size_origins(value)
    if contents is None or origins is None:
        return {}
    entries = zip(contents.entries, origins, strict=True)
    return {
        place: size
        for place, (size, origin) in enumerate(entries)
        if isinstance(size, int) and not isinstance(origin, int)
    }


def _written_down(node: ir.Node, shape: ir.Value, known: Mapping[int, int], rewriter: Rewriter) -> ir.Value:
    """Return a shape with some sizes as numbers: a constant if these are all there are."""
    contents = shapes.contents(shape)
    assert contents is not None, "some of it is known"
    if contents.known is not None:
        return rewriter.const(np.array(contents.known, np.int64), f"{shape.name}_known", near=node)
    places, sizes = np.zeros(contents.array.size, bool), np.zeros(contents.array.size, np.int64)
    for place, size in known.items():
        places[place], sizes[place] = True, size
    told = [
        rewriter.const(part, f"{shape.name}_{what}", near=node) for part, what in ((places, "places"), (sizes, "sizes"))
    ]
    chosen = rewriter.make("Where", [*told, shape], sources=[node], name=f"{shape.name}_known")
    rewriter.insert(chosen, before=node)
    shapes.infer_node(chosen, rewriter.model)
    return chosen.outputs[0]

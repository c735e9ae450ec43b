"""Biases and scales that several nodes share, given to each of them, so that the layers they belong to shrink apart."""

from __future__ import annotations

import onnx_ir as ir

from graphopt import walk
from graphopt.rewriter import Rewriter


def separate_vectors(model: ir.Model, rewriter: Rewriter) -> int:
    """Give every use of a shared float vector a constant of its own; return how many constants were made.

    Constants of equal content are stored once, so that layers whose biases are all zeros seem to share one. Such
    vectors, which are longer than 1 along one axis, are no reason to tie the layers; shared matrices are. To be done
    ahead of `channel_groups`.

    Args:
        model: The model.
        rewriter: What changes it.
    """
    made = 0
    for value in list(walk.initializers(model)):
        uses = [use for use in value.uses() if use.node.graph is not None]
        if len(uses) < 2 or value.is_graph_output() or not _is_vector(value):
            continue
        tensor = walk.constant_tensor(value)
        assert tensor is not None, "a vector is a constant"
        with rewriter.edit("separate", *(use.node for use in uses)):
            for use in uses[1:]:
                own = rewriter.const(tensor.numpy(), value.name or "vector", near=use.node)
                rewriter.set_input(use.node, use.idx, own)
                made += 1
    return made


def _is_vector(value: ir.Value) -> bool:
    tensor = walk.constant_tensor(value)
    if tensor is None or not tensor.dtype.is_floating_point():
        return False
    return sum(size > 1 for size in walk.dims(tensor)) == 1

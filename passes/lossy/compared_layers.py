"""Linear layers beside what they were before the first lossy pass: matched by the name of their node."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from graphopt import provenance, walk
from graphopt.authoring import Context
from graphopt.errors import PassError

from ..analyses.linear_layers import LINEAR_OPS, LinearLayer, as_linear_layer


@dataclass(frozen=True, eq=False)
class ComparedLayer:
    """A linear layer of the main graph, then and now.

    Attributes:
        node: The operator as it is now; its weight may be stored in any way.
        before: The layer before the first lossy pass, in ``ctx.reference``.
    """

    node: ir.Node
    before: LinearLayer

    @property
    def outputs(self) -> int:
        """Number of output channels, of all groups together."""
        tensor = walk.constant_tensor(self.before.weight)
        assert tensor is not None, "a linear layer has a constant weight"
        groups = self.node.attributes.get_int("group", 1) if self.node.op_type == "ConvTranspose" else 1
        return walk.dims(tensor)[self.before.output_axis] * groups


def compared_layers(ctx: Context, pass_name: str, after: str) -> list[ComparedLayer]:
    """Return the layers that can be compared with what they were, in graph order; the others are said to be left.

    Args:
        ctx: The model as it is and as it was.
        pass_name: Who asks.
        after: A pipeline in which the pass can do its work, for the hint.

    Raises:
        PassError: Nothing is known of the model as it was.
    """
    if ctx.reference is None:
        raise PassError(
            f"pass `{pass_name}` has no model to compare with: no lossy pass ran before it",
            hint=f"run it in the same pipeline, behind what it is to repair: `--passes {after},{pass_name}`",
        )
    # What an exact pass edited since has no origins.
    known = {walk.label(node): node for node in ctx.reference.graph if provenance.origins(node)}
    # Layers nothing has been found of yet.
    missing = {name for name, node in known.items() if as_linear_layer(node) is not None}
    found, unknown, nested = [], 0, 0
    for node in walk.every_node(ctx.model):
        if not walk.is_onnx_op(node, *LINEAR_OPS) or len(node.inputs) < 2:
            continue
        if node.graph is not ctx.model.graph:
            nested += 1
            continue
        original = known.get(walk.label(node))
        missing.discard(walk.label(node))
        same = original is not None and original.op_type == node.op_type
        before = as_linear_layer(original) if same and original is not None else None
        if before is not None:
            found.append(ComparedLayer(node, before))
        elif original is None or not same:
            unknown += 1
    if missing:
        ctx.left(f"layers that have become other operators, or are gone: {len(missing)}", left=len(missing))
    if unknown:
        ctx.left(
            f"products without a counterpart before the first lossy pass: {unknown}; or an exact pass changed it since"
        )
    if nested:
        ctx.left(f"products inside subgraphs or functions, out of sight of the data: {nested}")
    return found

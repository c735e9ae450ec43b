"""Constant folding: what depends on constants alone is computed once, by the backend's own kernels."""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from graphopt import shapes, walk
from graphopt.authoring import Context, Guarantee, Pass
from graphopt.backend import Array
from graphopt.errors import BackendError
from graphopt.options import opt

from ..analyses.quantized import reads_stored_integers

# A folded result may be this many bytes larger than what it was computed from, so that folding never bloats a file.
GROWTH_LIMIT = 4096
# Quantized weights stay integers: folding these away would undo a quantization; so does a Cast of stored integers.
_KEPT_OPS = frozenset({"QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear", "Constant"})


# Why something was left as it was, and the node it is about.
Remark = tuple[str, ir.Node | None]


@dataclass(frozen=True)
class FoldConstants(Pass):
    """Compute what depends on constants alone, and shapes that are known."""

    limit: int = opt(16 << 20, help="bytes of the largest result to fold", low=0)

    name = "fold-constants"
    # The kernels that fold are those that would run, but a runtime may fuse where nothing is folded.
    guarantee = Guarantee.EQUIVALENT
    edits: ClassVar[Mapping[str, str]] = {
        "fold": "what depends on constants alone is a constant; so are Shape and Size of a known shape",
        "castlike-to-cast": "CastLike(x, y) = Cast(x, to=dtype of y)",
    }

    def run(self, model: ir.Model, ctx: Context) -> None:
        """Fold until nothing more folds: a constant shape may make other shapes known."""
        while True:
            edits = ctx.rewriter.edits
            remarks = self._fold_once(model, ctx)
            if ctx.rewriter.edits == edits:
                break
        for text, node in remarks:
            ctx.left(text, node)

    def _fold_once(self, model: ir.Model, ctx: Context) -> list[Remark]:
        """Infer shapes, make what hangs on them constant, then fold all constant regions in one batch per graph."""
        contradiction = shapes.infer_shapes(model)
        remarks: list[Remark] = [] if contradiction is None else [(contradiction, None)]
        for node in list(walk.every_node(model)):
            _resolve_type_argument(node, ctx)
            _fold_shape(node, ctx)
        for graph in list(walk.every_graph(model)):
            folder = _Folder(graph, ctx, self.limit)
            folder.run()
            remarks += folder.remarks
        return remarks


def _resolve_type_argument(node: ir.Node, ctx: Context) -> None:
    """CastLike(x, y) = Cast(x, to=dtype of y): y varies, its dtype does not."""
    if not walk.is_onnx_op(node, "CastLike") or node.inputs[1] is None or node.inputs[1].dtype is None:
        return
    with ctx.rewriter.edit("castlike-to-cast", node):
        saturate = node.attributes.get("saturate")
        attributes = {"to": node.inputs[1].dtype.value, "saturate": saturate.as_int() if saturate else None}
        cast = ctx.rewriter.make("Cast", [node.inputs[0]], attributes, sources=[node])
        ctx.rewriter.insert(cast, before=node)
        ctx.rewriter.replace(node.outputs[0], cast.outputs[0])
        ctx.rewriter.erase(node)


def _fold_shape(node: ir.Node, ctx: Context) -> None:
    """Shape and Size of a value whose dimensions are all known are constants."""
    if not walk.is_onnx_op(node, "Shape", "Size") or walk.has_references(node):
        return
    shape = shapes.static_shape(node.inputs[0])
    if shape is None:
        return
    if node.op_type == "Size":
        content: Array = np.array(np.prod(shape, dtype=np.int64), np.int64)
    else:
        start, end = node.attributes.get_int("start", 0), node.attributes.get_int("end", len(shape))
        content = np.array(shape, np.int64)[start:end]
    _substitute(node, [content], ctx)


def _substitute(node: ir.Node, contents: Iterable[Array], ctx: Context) -> None:
    """Put constants in place of a node."""
    with ctx.rewriter.edit("fold", node):
        for value, content in zip(node.outputs, contents, strict=True):
            if value.uses() or value.is_graph_output():
                folded = ctx.rewriter.const(content, f"{value.name}_folded", near=node)
                ctx.rewriter.replace(value, folded)
        ctx.rewriter.erase(node)


class _Folder:
    """Folds the constant regions of one graph: finds them, computes their edge in one session, puts it in."""

    def __init__(self, graph: ir.Graph | ir.Function, ctx: Context, limit: int) -> None:
        self.graph, self.ctx, self.limit = graph, ctx, limit
        self.foldable: dict[ir.Node, None] = {}
        self.remarks: list[Remark] = []

    def run(self) -> None:
        for node in self.graph:
            if self._is_foldable(node):
                self.foldable[node] = None
        edge = [node for node in self.foldable if self._is_read_outside(node) and not _names_an_output(node)]
        edge = [node for node in edge if not self._is_known_too_large(node)]
        if edge:
            for node, contents in self._compute(edge).items():
                self._fold(node, contents)

    def _is_known_too_large(self, node: ir.Node) -> bool:
        """Return whether a result is over the limit by its shape alone, before memory is spent on it."""
        size = sum(shapes.static_bytes(value) or 0 for value in node.outputs)
        if size > self.limit:
            self.remarks.append((f"not folded: the result takes {size} bytes", node))
        return size > self.limit

    def _is_foldable(self, node: ir.Node) -> bool:
        if node.domain not in walk.ONNX_DOMAINS or node.op_type in _KEPT_OPS or walk.is_random(node):
            return False
        if any(True for _ in walk.subgraphs(node)) or any(a.is_ref() for a in node.attributes.values()):
            return False
        if reads_stored_integers(node):
            return False
        inputs = [value for value in node.inputs if value is not None]
        return bool(inputs) and all(self._is_constant(value) for value in inputs)

    def _is_constant(self, value: ir.Value) -> bool:
        producer = value.producer()
        return walk.constant_tensor(value) is not None or (producer is not None and producer in self.foldable)

    def _is_read_outside(self, node: ir.Node) -> bool:
        return any(
            value.is_graph_output() or any(use.node not in self.foldable for use in value.uses())
            for value in node.outputs
        )

    def _compute(self, edge: list[ir.Node]) -> dict[ir.Node, list[Array]]:
        """Run the regions behind the edge together; where that fails, each by itself."""
        try:
            return self._run(edge)
        except BackendError as error:
            if len(edge) == 1:
                self.remarks.append((f"not folded: {error.message}", edge[0]))
                return {}
        results: dict[ir.Node, list[Array]] = {}
        for node in edge:
            results |= self._compute([node])
        return results

    def _run(self, edge: list[ir.Node]) -> dict[ir.Node, list[Array]]:
        wanted = _region(edge, self.foldable)
        region = [node for node in self.foldable if node in wanted]
        contents = iter(self.ctx.evaluate(region, [value for node in edge for value in node.outputs]))
        return {node: [next(contents) for _ in node.outputs] for node in edge}

    def _fold(self, node: ir.Node, contents: list[Array]) -> None:
        size = sum(content.nbytes for content in contents)
        source = self._bytes_freed(node)
        if size > self.limit or size > source + GROWTH_LIMIT:
            self.remarks.append((f"not folded: {size} bytes would take the place of {source}", node))
            return
        _substitute(node, contents, self.ctx)

    def _bytes_freed(self, node: ir.Node) -> int:
        """Return the bytes of constants that only this node's region reads."""
        region = _region([node], self.foldable)
        weights = {value for inner in region for value in inner.inputs if value is not None}
        return sum(
            tensor.nbytes
            for value in weights
            if (tensor := walk.constant_tensor(value)) is not None and all(use.node in region for use in value.uses())
        )


def _names_an_output(node: ir.Node) -> bool:
    """Return whether a node is there to give a constant the name of a graph output: that is as folded as can be."""
    if not walk.is_onnx_op(node, "Identity") or not node.outputs[0].is_graph_output():
        return False
    return walk.constant_tensor(node.inputs[0]) is not None


def _region(nodes: Iterable[ir.Node], foldable: Container[ir.Node]) -> set[ir.Node]:
    """Return some nodes and every foldable node they depend on."""
    region = set(nodes)
    frontier = list(region)
    while frontier:
        for value in frontier.pop().inputs:
            producer = value.producer() if value is not None else None
            if producer is not None and producer in foldable and producer not in region:
                region.add(producer)
                frontier.append(producer)
    return region

"""Constant folding: what depends on constants alone is computed once, by the backend's own kernels."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from graphopt import shapes, walk
from graphopt.authoring import Context, Guarantee, Pass
from graphopt.backend import Array
from graphopt.errors import BackendError
from graphopt.options import opt

from ..analyses.quantized import reads_stored_integers
from .shared_views import is_view_of_shared
from .stored_views import stored_view

# A folded result may be this much larger than what it was computed from, for every node that goes: about what a node
# takes in the file.
NODE_BYTES = 64
# Beyond that, all folds of a run together may add this share of what the model stores.
GROWTH_SHARE = 0.005
# To tell what a fold frees, no more nodes than this are looked at behind it.
REGION_LIMIT = 256
# Quantized weights stay integers: folding these away would undo a quantization; so does a Cast of stored integers.
_KEPT_OPS = frozenset({"QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear", "Constant"})


@dataclass(frozen=True)
class FoldConstants(Pass):
    """Compute what depends on constants alone."""

    limit: int = opt(64 << 20, help="bytes of the largest result to compute", low=0)
    lazy: int = opt(1 << 16, help="bytes from which a weight moved or cast is made only when it is written", low=0)

    name = "fold-constants"
    # The kernels that fold are those that would run, but a runtime may fuse where nothing is folded.
    guarantee = Guarantee.EQUIVALENT
    edits: ClassVar[Mapping[str, str]] = {
        "fold": "what depends on constants alone is a constant",
        "fold-view": "a constant transposed, reshaped, sliced or cast is a constant, made when the file is written",
        "castlike-to-cast": "CastLike(x, y) = Cast(x, to=dtype of y)",
        "constant-to-initializer": "a Constant and an initializer that hold the same are the same",
    }

    def run(self, model: ir.Model, ctx: Context) -> None:
        """Fold all constant regions, those of one graph in one session of the backend."""
        why = ctx.analyse(shapes.infer_shapes)
        if why is not None:
            ctx.left(why)
        growth = _Growth(int(GROWTH_SHARE * sum(tensor.nbytes for tensor in walk.stored_tensors(model))))
        in_main = set(walk.graphs_within(model.graph))
        for graph in list(walk.every_graph(model)):
            for node in list(graph):
                _resolve_type_argument(node, ctx)
                _fold_view(node, self.lazy, growth, ctx)
            _Folder(graph, ctx, self.limit, growth).run()
            if graph in in_main:  # functions have no initializers
                for node in list(graph):
                    _lift_constant(node, ctx)


@dataclass
class _Growth:
    """The bytes by which all folds together may still enlarge the file."""

    left: int

    def affords(self, size: int, freed: int) -> bool:
        """Return whether a result may take the place of what it frees, and count it."""
        growth = max(size - freed, 0)
        if growth > self.left:
            return False
        self.left -= growth
        return True


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


def _lift_constant(node: ir.Node, ctx: Context) -> None:
    """Make a Constant an initializer, unless it gives a graph output its name."""
    if not walk.is_onnx_op(node, "Constant") or node.outputs[0].is_graph_output() or not node.outputs[0].uses():
        return
    tensor = walk.constant_tensor(node.outputs[0])
    if tensor is not None:
        _substitute(node, [tensor], ctx, kind="constant-to-initializer")


def _fold_view(node: ir.Node, smallest: int, growth: _Growth, ctx: Context) -> None:
    """Fold what only moves or casts the elements of a large weight, without reading it."""
    if node.graph is None or node.outputs[0].is_graph_output():
        return
    view = stored_view(node)
    if view is None or view.nbytes < smallest or reads_stored_integers(node):
        return
    if not is_view_of_shared(node) and growth.affords(view.nbytes, _bytes_freed({node}, {node})):
        _substitute(node, [view], ctx, kind="fold-view")
    else:
        ctx.left(f"not folded: {view.nbytes} bytes next to a weight that others read", node)


def _substitute(
    node: ir.Node,
    contents: Sequence[Array | ir.TensorProtocol],
    ctx: Context,
    *,
    kind: str,
    region: Iterable[ir.Node] | None = None,
) -> None:
    """Put constants in place of a node; ``region`` is what they were computed by, the node itself by default."""
    read = [
        (value, content)
        for value, content in zip(node.outputs, contents, strict=True)
        if value.uses() or value.is_graph_output()
    ]
    with ctx.rewriter.edit(kind, node):
        made = [ctx.rewriter.make_const(content, f"{value.name}_folded") for value, content in read]
        if not ctx.agrees(kind, list(region or [node]), [value for value, _ in read], made):
            return
        home, inner = node.graph, [not value.is_graph_output() for value, _ in read]
        for (value, _), constant in zip(read, made, strict=True):
            ctx.rewriter.adopt(constant, near=node)
            ctx.rewriter.replace(value, constant)
        ctx.rewriter.erase(node)
        for (value, _), constant, is_free in zip(read, made, inner, strict=True):
            # The name of an output stays with the node that now gives it; one of a nested graph may be taken outside.
            if is_free and constant.graph is home:
                constant.name = value.name


class _Folder:
    """Folds the constant regions of one graph: finds them, computes their edge in one session, puts it in."""

    def __init__(self, graph: ir.Graph | ir.Function, ctx: Context, limit: int, growth: _Growth) -> None:
        self.graph, self.ctx, self.limit, self.growth = graph, ctx, limit, growth
        self.foldable: dict[ir.Node, None] = {}

    def run(self) -> None:
        for node in self.graph:
            if self._is_foldable(node):
                self.foldable[node] = None
        edge = [node for node in self.foldable if self._is_read_outside(node) and not _names_an_output(node)]
        edge = [node for node in edge if not self._is_known_too_large(node)]
        for batch in self._batches(edge):
            for node, contents in self._compute(batch).items():
                self._fold(node, contents)

    def _batches(self, edge: Iterable[ir.Node]) -> Iterator[list[ir.Node]]:
        """Yield what is computed in one session: together no more than about the limit, so that memory keeps to it."""
        batch: list[ir.Node] = []
        size = 0
        for node in edge:
            batch.append(node)
            size += sum(shapes.static_bytes(value) or 0 for value in (*node.inputs, *node.outputs) if value is not None)
            if size > self.limit:
                yield batch
                batch, size = [], 0
        if batch:
            yield batch

    def _is_known_too_large(self, node: ir.Node) -> bool:
        """Return whether a result is over the limit, or dwarfs what it comes from, before memory is spent on it."""
        size = sum(shapes.static_bytes(value) or 0 for value in node.outputs)
        freed = self._bytes_freed(node) if size > NODE_BYTES else size
        if size > self.limit:
            self.ctx.left(f"not folded: the result takes {size} bytes, more than the limit", node)
        elif is_view_of_shared(node) or size > freed + self.growth.left:
            self.ctx.left(f"not folded: {size} bytes would take the place of {freed}", node)
        else:
            return False
        return True

    def _is_foldable(self, node: ir.Node) -> bool:
        if node.domain not in walk.ONNX_DOMAINS or node.op_type in _KEPT_OPS or walk.is_random(node):
            return False
        if any(True for _ in walk.subgraphs(node)) or walk.has_references(node):
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
                self.ctx.left(f"not folded: {error.message}", edge[0])
                return {}
        results: dict[ir.Node, list[Array]] = {}
        for node in edge:
            results |= self._compute([node])
        return results

    def _run(self, edge: list[ir.Node]) -> dict[ir.Node, list[Array]]:
        wanted = set(_behind(edge, self.foldable))
        region = [node for node in self.foldable if node in wanted]
        contents = iter(self.ctx.evaluate(region, [value for node in edge for value in node.outputs]))
        return {node: [next(contents) for _ in node.outputs] for node in edge}

    def _fold(self, node: ir.Node, contents: list[Array]) -> None:
        size = sum(content.nbytes for content in contents)
        freed = self._bytes_freed(node) if size > NODE_BYTES else size
        if size > self.limit or not self.growth.affords(size, freed):
            self.ctx.left(f"not folded: {size} bytes would take the place of {freed}", node)
            return
        wanted = set(_behind([node], self.foldable)) if self.ctx.check_rewrite is not None else {node}
        region = [inner for inner in self.foldable if inner in wanted]
        _substitute(node, contents, self.ctx, kind="fold", region=region)

    def _bytes_freed(self, node: ir.Node) -> int:
        """Return the bytes of the nodes and constants that only this node's region reads."""
        region = set(itertools.islice(_behind([node], self.foldable), REGION_LIMIT))
        own = {inner for inner in region if inner is node or not self._is_read_beyond(inner, region)}
        return _bytes_freed(own, region)

    def _is_read_beyond(self, node: ir.Node, region: Container[ir.Node]) -> bool:
        return any(
            value.is_graph_output() or any(use.node not in region for use in value.uses()) for value in node.outputs
        )


def _bytes_freed(nodes: Collection[ir.Node], region: Container[ir.Node]) -> int:
    """Return the bytes of some nodes, and of the constants they read that nothing outside a region does."""
    constants = {value for node in nodes for value in node.inputs if walk.constant_tensor(value) is not None}
    return NODE_BYTES * len(nodes) + sum(
        value.const_value.nbytes
        for value in constants
        if value is not None
        and value.const_value is not None
        and not value.is_graph_output()
        and all(use.node in region for use in value.uses())
    )


def _names_an_output(node: ir.Node) -> bool:
    """Return whether a node is there to give a constant the name of a graph output: that is as folded as can be."""
    if not walk.is_onnx_op(node, "Identity") or not node.outputs[0].is_graph_output():
        return False
    return walk.constant_tensor(node.inputs[0]) is not None


def _behind(nodes: Iterable[ir.Node], foldable: Container[ir.Node]) -> Iterable[ir.Node]:
    """Yield some nodes and every foldable node they depend on, each once, the nearest first."""
    frontier = list(nodes)
    seen = set(frontier)
    for node in frontier:
        yield node
        for value in node.inputs:
            producer = value.producer() if value is not None else None
            if producer is not None and producer in foldable and producer not in seen:
                seen.add(producer)
                frontier.append(producer)

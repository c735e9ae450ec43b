"""Functions of the model: each call replaced by the body of what it calls."""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import ClassVar

import onnx
import onnx_ir as ir

from graphopt import walk
from graphopt.authoring import Context, Guarantee, Pass
from graphopt.options import opt

from .dissolving import take_place
from .function_copies import BodyCopy, Shared

# Functions that call functions may stand for a number of nodes that grows without bounds.
LARGEST_RESULT = 1_000_000

Key = ir.OperatorIdentifier


@dataclass(frozen=True)
class InlineFunctions(Pass):
    """Replace calls of the model's own functions by what these compute."""

    keep: tuple[str, ...] = opt((), help="functions to keep: globs over `name` or `domain::name`")

    name = "inline-functions"
    guarantee = Guarantee.EXACT
    edits: ClassVar[Mapping[str, str]] = {
        "inline": "a call of a function gives what its body computes of the same inputs and attributes",
        "remove-function": "a function nothing calls any more has no effect",
    }

    def run(self, model: ir.Model, ctx: Context) -> None:
        """Inline from the outside in, so that each call knows the values of its attributes."""
        kept = {key for key, function in model.functions.items() if self._is_kept(function)}
        bodies = _inlinable(model, kept, ctx)
        if not bodies:
            return
        inliner = _Inliner(ctx, bodies)
        inliner.visit(model.graph, model.opset_imports)
        for key, function in model.functions.items():
            if key not in bodies:
                inliner.visit(function, function.opset_imports)
        for node, why in inliner.left.items():
            ctx.left(why, node)
        called = walk.called_functions(model)
        for key in [key for key in bodies if key not in called]:
            ctx.rewriter.remove_function(key)

    def _is_kept(self, function: ir.Function) -> bool:
        names = (function.name, f"{function.domain}::{function.name}")
        return any(fnmatchcase(name, glob) for glob in self.keep for name in names)


def _inlinable(model: ir.Model, kept: set[Key], ctx: Context) -> dict[Key, ir.Function]:
    """Return the functions that are called and may be inlined; callees come before callers."""
    called = walk.called_functions(model)
    waiting = {key: function for key, function in model.functions.items() if key in called and key not in kept}
    calls = {key: [n for n in _nodes(function) if n.op_identifier() in waiting] for key, function in waiting.items()}
    sizes: dict[Key, int] = {}
    ready = deque(key for key in waiting if not calls[key])
    missing = {key: {node.op_identifier() for node in nodes} for key, nodes in calls.items()}
    callers: dict[Key, list[Key]] = {}
    for key, needed in missing.items():
        for callee in needed:
            callers.setdefault(callee, []).append(key)
    while ready:
        key = ready.popleft()
        sizes[key] = sum(sizes.get(node.op_identifier(), 1) for node in _nodes(waiting[key]))
        for caller in callers.get(key, ()):
            missing[caller].discard(key)
            if not missing[caller]:
                ready.append(caller)
    for key in waiting.keys() - sizes.keys():
        ctx.left(f"`{key[1]}` is not inlined: it calls itself, or a function that does")
    total = sum(sizes.get(node.op_identifier(), 1) for node in _nodes(model.graph))
    if total > LARGEST_RESULT:
        ctx.left(f"functions are not inlined: they would make {total} nodes")
        return {}
    return {key: waiting[key] for key in sizes}


def _nodes(graph: ir.Graph | ir.Function) -> Iterator[ir.Node]:
    for inner in walk.graphs_within(graph):
        yield from inner


@dataclass
class _Inliner:
    """Inlines calls; ``left`` are those left as they are, and why."""

    ctx: Context
    bodies: Mapping[Key, ir.Function]
    left: dict[ir.Node, str] = field(default_factory=dict)
    shared: Shared = field(default_factory=dict)

    def visit(self, host: ir.Graph | ir.Function, imports: dict[str, int]) -> None:
        """Inline every call in a graph, and those that come to light by that."""
        calls = deque(node for node in _nodes(host) if node.op_identifier() in self.bodies)
        while calls:
            call = calls.popleft()
            function = self.bodies[call.op_identifier()]
            why = _obstacle(call, function, imports, self.ctx.model)
            if why is not None:
                self.left[call] = f"`{function.name}` is not inlined: {why}"
                continue
            shared = self.shared if isinstance(host, ir.Graph) else None
            for copy in self._inline(call, function, imports, shared):
                calls.extend(node for node in (copy, *walk.nodes_within(copy)) if node.op_identifier() in self.bodies)

    def _inline(
        self, call: ir.Node, function: ir.Function, imports: dict[str, int], shared: Shared | None
    ) -> list[ir.Node]:
        with self.ctx.rewriter.edit("inline", call):
            for domain in _domains(function):
                if _version(imports, domain) is None:
                    imports[domain] = walk.imported(function.opset_imports, domain)
            copies, results = BodyCopy(self.ctx, call, function, shared).insert()
            # Outputs that the call leaves out, at the end or by an empty name, nobody reads.
            values = [new if new is not None else old for old, new in zip(call.outputs, results, strict=False)]
            take_place(call, values, self.ctx)
        return copies


def _obstacle(call: ir.Node, function: ir.Function, imports: Mapping[str, int], model: ir.Model) -> str | None:
    """Return what stands against inlining a call, or None."""
    if len(call.inputs) > len(function.inputs) or len(call.outputs) > len(function.outputs):
        return "it has fewer inputs or outputs than the call"
    given = dict(zip(function.inputs, call.inputs, strict=False))
    for port, value in zip(call.outputs, function.outputs, strict=False):
        if value.is_graph_input() and given.get(value) is None and (port.uses() or port.is_graph_output()):
            return "it returns an input that the call leaves out"
    for name, attribute in call.attributes.items():
        default = function.attributes.get(name)
        # The attribute of the caller may be absent; the default of the callee would be lost then.
        if attribute.is_ref() and default is not None and default.type != ir.AttributeType.UNDEFINED:
            return f"its default of `{name}` hangs on what the caller is given"
    return _version_conflict(function, imports, model)


def _version_conflict(function: ir.Function, imports: Mapping[str, int], model: ir.Model) -> str | None:
    """Return an operator that is another one where the call stands than in the function, in words, or None."""
    for node in _nodes(function):
        there = _version(function.opset_imports, node.domain)
        here = _version(imports, node.domain)
        if there in (None, here) or here is None or node.op_identifier() in model.functions:
            continue
        if _since(node.domain, node.op_type, there) != _since(node.domain, node.op_type, here):
            return f"`{node.op_type}` is that of opset {there}, in the model that of {here}"
    return None


def _domains(function: ir.Function) -> set[str]:
    return {node.domain for node in _nodes(function)}


def _version(imports: Mapping[str, int], domain: str) -> int | None:
    """Return the version of an operator set, or None where it is not imported."""
    if domain in walk.ONNX_DOMAINS:
        return imports.get("", imports.get("ai.onnx"))
    return imports.get(domain)


@functools.lru_cache(maxsize=4096)
def _since(domain: str, op_type: str, version: int) -> int:
    """Return the version an operator dates from; of one that onnx does not know, the version it is asked about."""
    try:
        schema = onnx.defs.get_schema(op_type, version, "" if domain in walk.ONNX_DOMAINS else domain)
    except onnx.defs.SchemaError:
        return version
    return int(schema.since_version)

"""The structural verifier: a model's graphs checked on live objects, in time that follows the graph."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass, replace

import onnx
import onnx_ir as ir

from graphopt import provenance, walk
from graphopt.errors import VerificationError

SHOWN_PROBLEMS = 5


@dataclass(frozen=True)
class Port:
    """One input or output of the model as the outside sees it."""

    name: str
    dtype: ir.DataType | None
    rank: int | None


@dataclass(frozen=True)
class Signature:
    """A model's inputs and outputs, in order."""

    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]

    @classmethod
    def of(cls, model: ir.Model) -> Signature:
        """Return the signature of a model."""
        return cls(*(tuple(map(_port, ports)) for ports in (model.graph.inputs, model.graph.outputs)))


def _port(value: ir.Value) -> Port:
    return Port(value.name or "", value.dtype, len(value.shape) if value.shape is not None else None)


def verify(
    model: ir.Model,
    signature: Signature | None = None,
    *,
    provenance_too: bool = False,
    known: Container[str] = frozenset(),
) -> None:
    """Check a model's structure.

    Args:
        model: The model.
        signature: What inputs and outputs must still be, or None to not check them.
        provenance_too: Whether every node must have an origin.
        known: Problems the model came with, as `problems_of` told them; nobody is blamed for these again.

    Raises:
        VerificationError: Names the problems found, at most `SHOWN_PROBLEMS` of them.
    """
    problems = [problem for problem in _problems(model, signature, provenance_too) if problem not in known]
    if problems:
        shown = "; ".join(problems[:SHOWN_PROBLEMS])
        more = f"; and {len(problems) - SHOWN_PROBLEMS} more" if len(problems) > SHOWN_PROBLEMS else ""
        raise VerificationError(f"the model is malformed: {shown}{more}")


def problems_of(model: ir.Model) -> frozenset[str]:
    """Return what is wrong with a model's structure, by the letter of ONNX; runtimes are often more lenient."""
    return frozenset(_problems(model, None, provenance_too=False))


def fingerprint(model: ir.Model) -> int:
    """Return a number that changes with the structure: nodes, their order, names, attributes, and who reads what.

    It is good for comparing a model with itself within one process. What tensors hold is not looked at.
    """
    parts: list[object] = [id(output) for output in model.graph.outputs]
    for graph in walk.every_graph(model):
        parts += [(value.name, id(value)) for value in (*graph.inputs, *graph.outputs)]
        if isinstance(graph, ir.Graph):
            parts += [(name, id(value), id(value.const_value)) for name, value in graph.initializers.items()]
        for node in graph:
            attributes = tuple((name, id(attribute)) for name, attribute in node.attributes.items())
            values = tuple((id(value), value.name) for value in (*node.inputs, *node.outputs) if value is not None)
            parts.append((id(node), node.op_identifier(), node.name, attributes, len(node.inputs), values))
    return hash((tuple(parts), tuple(model.opset_imports.items()), tuple(model.functions)))


def _problems(model: ir.Model, signature: Signature | None, provenance_too: bool) -> Iterator[str]:
    functions = frozenset(model.functions)
    yield from _graph_problems(model.graph, _Surroundings(dict(model.opset_imports), functions))
    for function in model.functions.values():
        # A function may import operator sets of its own.
        imports = {**model.opset_imports, **function.opset_imports}
        yield from _graph_problems(function, _Surroundings(imports, functions))
    yield from _use_problems(model)
    if signature is not None:
        yield from _signature_problems(signature, Signature.of(model))
    if provenance_too:
        yield from (f"`{walk.label(n)}` has no origin" for n in walk.every_node(model) if not provenance.origins(n))


@dataclass(frozen=True)
class _Surroundings:
    """What a graph may use besides its own values."""

    imports: Mapping[str, int]
    functions: Container[ir.OperatorIdentifier]
    values: frozenset[ir.Value] = frozenset()
    names: frozenset[str] = frozenset()

    def version(self, domain: str) -> int | None:
        """Return the version of an operator set that is imported, or None."""
        if domain in walk.ONNX_DOMAINS:
            return self.imports.get("", self.imports.get("ai.onnx"))
        return self.imports.get(domain)


def _graph_problems(graph: ir.Graph | ir.Function, around: _Surroundings) -> Iterator[str]:
    where = f"graph `{graph.name}`"
    defined = set(graph.inputs)
    if isinstance(graph, ir.Graph):
        defined.update(graph.initializers.values())
        yield from _initializer_problems(graph, where)
    names = Counter(value.name for value in defined)
    names.update(value.name for node in graph for value in node.outputs if value.name)
    yield from (f"{where}: the name `{name}` is taken {count} times" for name, count in names.items() if count > 1)
    # A nested graph that reuses an outer name hides it: valid nowhere in ONNX.
    yield from (f"{where}: `{name}` hides an outer value" for name in names if name in around.names)
    for node in graph:
        yield from _node_problems(node, where, defined, around)
        for inner in walk.subgraphs(node):
            values = around.values | defined
            inside = replace(around, values=values, names=around.names | {name for name in names if name})
            yield from _graph_problems(inner, inside)
        defined.update(node.outputs)
    for value in graph.outputs:
        if value not in defined:
            yield f"{where}: output `{value.name}` is not produced in it"


def _initializer_problems(graph: ir.Graph, where: str) -> Iterator[str]:
    for name, value in graph.initializers.items():
        tensor = value.const_value
        if name != value.name:
            yield f"{where}: initializer `{name}` calls itself `{value.name}`"
        if tensor is None:
            yield f"{where}: initializer `{name}` holds nothing"
        elif value.dtype is not None and value.dtype != tensor.dtype:
            yield f"{where}: initializer `{name}` is declared {value.dtype} and holds {tensor.dtype}"
        elif value.shape is not None and value.shape.is_static() and tuple(value.shape) != tuple(tensor.shape):
            yield f"{where}: initializer `{name}` is declared {value.shape} and holds {tensor.shape}"


def _node_problems(node: ir.Node, where: str, defined: set[ir.Value], around: _Surroundings) -> Iterator[str]:
    name = f"{where}: `{walk.label(node)}` ({node.op_type})"
    for value in node.inputs:
        if value is not None and value not in defined and value not in around.values:
            yield f"{name} reads `{value.name}` before it is produced"
    if node.op_identifier() in around.functions:
        return
    imported = around.version(node.domain)
    if imported is None:
        yield f"{name} is of domain `{node.domain}`, which the model does not import"
    elif node.domain in walk.ONNX_DOMAINS:
        yield from _schema_problems(node, name, imported)


@functools.lru_cache(maxsize=4096)
def _schema(op_type: str, version: int) -> onnx.defs.OpSchema | None:
    try:
        return onnx.defs.get_schema(op_type, version, "")
    except onnx.defs.SchemaError:
        return None


def _schema_problems(node: ir.Node, name: str, version: int) -> Iterator[str]:
    schema = _schema(node.op_type, version)
    if schema is None:
        yield f"{name} does not exist in opset {version}"
        return
    count = len(node.inputs)
    if not schema.min_input <= count <= schema.max_input:
        yield f"{name} has {count} inputs, allowed are {schema.min_input} to {schema.max_input}"
    for index, formal in enumerate(schema.inputs[:count]):
        if formal.option == onnx.defs.OpSchema.FormalParameterOption.Single and node.inputs[index] is None:
            yield f"{name} lacks input `{formal.name}`"
    for key in node.attributes:
        if key not in schema.attributes:
            yield f"{name} has no attribute `{key}` in opset {version}"
    for key, attribute in schema.attributes.items():
        if attribute.required and key not in node.attributes:
            yield f"{name} lacks attribute `{key}`"


def _use_problems(model: ir.Model) -> Iterator[str]:
    """Check that values and their readers agree on who reads what."""
    alive = set(walk.every_node(model))
    for node in alive:
        for index, value in enumerate(node.inputs):
            if value is not None and not any(use.node is node and use.idx == index for use in value.uses()):
                yield f"`{value.name}` does not know that `{walk.label(node)}` reads it"
    for node in alive:
        for value in node.outputs:
            for use in value.uses():
                if use.node not in alive:
                    yield f"`{value.name}` is still held by the removed node `{walk.label(use.node)}`"


def _signature_problems(before: Signature, after: Signature) -> Iterator[str]:
    for kind, old, new in (("input", before.inputs, after.inputs), ("output", before.outputs, after.outputs)):
        if [port.name for port in old] != [port.name for port in new]:
            yield f"{kind}s changed from {[p.name for p in old]} to {[p.name for p in new]}"
            continue
        for a, b in zip(old, new, strict=True):
            if a != b:
                yield f"{kind} `{a.name}` changed from {a.dtype}, rank {a.rank} to {b.dtype}, rank {b.rank}"

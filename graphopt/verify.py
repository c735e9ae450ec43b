"""The structural verifier: a model's graphs checked on live objects, in time that follows the graph."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Container, Iterator, Mapping, Sequence
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
    _take_fingerprint(model.graph, parts)
    for function in model.functions.values():
        _take_fingerprint(function, parts)
    parts += (*model.opset_imports.items(), *model.functions)
    return hash(tuple(parts))


def _take_fingerprint(graph: ir.Graph | ir.Function, parts: list[object]) -> None:
    # One flat list: this runs after every pass, and a tuple for each node would take longer than all the rest.
    for value in (*graph.inputs, *graph.outputs):
        parts += (value.name, id(value))
    if isinstance(graph, ir.Graph):
        for name, value in graph.initializers.items():
            parts += (name, id(value), id(value.const_value))
    for node in graph:
        # What is read has its name where it is made.
        parts += (id(node), node.op_type, node.domain, node.overload, node.name, *map(id, node.inputs))
        for value in node.outputs:
            parts += (id(value), value.name)
        if attributes := node.attributes.data:
            parts += attributes
            parts += map(id, attributes.values())
            for inner in walk.subgraphs(node):
                _take_fingerprint(inner, parts)


def _problems(model: ir.Model, signature: Signature | None, provenance_too: bool) -> Iterator[str]:
    functions = frozenset(model.functions)
    yield from _graph_problems(model.graph, _Surroundings(dict(model.opset_imports), functions))
    for function in model.functions.values():
        # A function may import operator sets of its own.
        imports = {**model.opset_imports, **function.opset_imports}
        yield from _graph_problems(function, _Surroundings(imports, functions))
    nodes = list(walk.every_node(model))
    yield from _use_problems(nodes)
    if signature is not None:
        yield from _signature_problems(signature, Signature.of(model))
    if provenance_too:
        yield from (f"`{walk.label(node)}` has no origin" for node in nodes if not provenance.origins(node))


@dataclass(frozen=True)
class _Surroundings:
    """What a graph may use besides its own values."""

    imports: Mapping[str, int]
    functions: Container[ir.OperatorIdentifier]
    # One set for each graph around, the values defined so far: one for all would be made anew for each nested graph.
    values: tuple[Container[ir.Value], ...] = ()
    names: tuple[Container[str | None], ...] = ()

    def defines(self, value: ir.Value) -> bool:
        """Return whether a graph around defines a value."""
        return any(value in scope for scope in self.values)

    @functools.cached_property
    def opset(self) -> int | None:
        """The version of the standard operators, or None."""
        return self.imports.get("", self.imports.get("ai.onnx"))

    def version(self, domain: str) -> int | None:
        """Return the version of an operator set that is imported, or None."""
        return self.opset if domain in walk.ONNX_DOMAINS else self.imports.get(domain)


def _graph_problems(graph: ir.Graph | ir.Function, around: _Surroundings) -> Iterator[str]:
    where = f"graph `{graph.name}`"
    defined = set(graph.inputs)
    if isinstance(graph, ir.Graph):
        defined.update(graph.initializers.values())
        yield from _initializer_problems(graph, where)
    nodes = list(graph)
    names = Counter([value.name for value in defined])
    names.update([value.name for node in nodes for value in node.outputs if value.name])
    if len(names) < names.total():
        yield from (f"{where}: the name `{name}` is taken {n} times" for name, n in names.items() if n > 1)
    # A nested graph that reuses an outer name hides it: valid nowhere in ONNX.
    if around.names:
        hiding = [name for name in names if any(name in scope for scope in around.names)]
        yield from (f"{where}: `{name}` hides an outer value" for name in hiding)
    for node in nodes:
        if not _is_sound(node, defined, around):
            yield from _node_problems(node, where, defined, around)
        for inner in walk.subgraphs(node) if node.attributes.data else ():
            inside = replace(around, values=(*around.values, defined), names=(*around.names, names))
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


def _is_sound(node: ir.Node, defined: set[ir.Value], around: _Surroundings) -> bool:
    """Return whether a node is surely without fault, soon; `_node_problems` looks closer where it is not."""
    for value in node.inputs:
        if value is not None and value not in defined and not around.defines(value):
            return False
    return node.domain in walk.ONNX_DOMAINS and not around.functions and _fits(node, around.opset)


def _node_problems(node: ir.Node, where: str, defined: set[ir.Value], around: _Surroundings) -> Iterator[str]:
    for value in node.inputs:
        if value is not None and value not in defined and not around.defines(value):
            yield f"{_place(node, where)} reads `{value.name}` before it is produced"
    if around.functions and node.op_identifier() in around.functions:
        return
    imported = around.version(node.domain)
    if imported is None:
        yield f"{_place(node, where)} is of domain `{node.domain}`, which the model does not import"
    elif node.domain in walk.ONNX_DOMAINS and not _fits(node, imported):
        yield from _schema_problems(node, _place(node, where), imported)


def _place(node: ir.Node, where: str) -> str:
    return f"{where}: `{walk.label(node)}` ({node.op_type})"


@functools.lru_cache(maxsize=4096)
def _schema(op_type: str, version: int) -> onnx.defs.OpSchema | None:
    try:
        return onnx.defs.get_schema(op_type, version, "")
    except onnx.defs.SchemaError:
        return None


@dataclass(frozen=True)
class _Demands:
    """What a schema asks of a node: reading it off the schema takes long."""

    inputs: range
    needed: tuple[int, ...]
    attributes: frozenset[str]
    required: frozenset[str]


@functools.lru_cache(maxsize=4096)
def _demands(op_type: str, version: int) -> _Demands | None:
    schema = _schema(op_type, version)
    if schema is None:
        return None
    single = onnx.defs.OpSchema.FormalParameterOption.Single
    return _Demands(
        inputs=range(schema.min_input, schema.max_input + 1),
        needed=tuple(index for index, formal in enumerate(schema.inputs) if formal.option == single),
        attributes=frozenset(schema.attributes),
        required=frozenset(name for name, attribute in schema.attributes.items() if attribute.required),
    )


def _fits(node: ir.Node, version: int | None) -> bool:
    """Return whether a node is what its schema asks for; `_schema_problems` says what is wrong where it is not."""
    demands = _demands(node.op_type, version) if version is not None else None
    inputs, attributes = node.inputs, node.attributes.data
    if demands is None or len(inputs) not in demands.inputs:
        return False
    if None in inputs and any(index < len(inputs) and inputs[index] is None for index in demands.needed):
        return False
    return demands.attributes.issuperset(attributes) and demands.required.issubset(attributes)


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


def _use_problems(nodes: Sequence[ir.Node]) -> Iterator[str]:
    """Check that values and their readers agree on who reads what."""
    known: dict[ir.Value, frozenset[tuple[ir.Node, int]]] = {}
    for node in nodes:
        for index, value in enumerate(node.inputs):
            if value is None:
                continue
            uses = known.get(value)
            if uses is None:
                uses = known[value] = frozenset(value.uses())
            if (node, index) not in uses:
                yield f"`{value.name}` does not know that `{walk.label(node)}` reads it"
    alive = set(nodes)
    for node in nodes:
        for value in node.outputs:
            for reader, _ in known.get(value) or value.uses():
                if reader not in alive:
                    yield f"`{value.name}` is still held by the removed node `{walk.label(reader)}`"


def _signature_problems(before: Signature, after: Signature) -> Iterator[str]:
    for kind, old, new in (("input", before.inputs, after.inputs), ("output", before.outputs, after.outputs)):
        if [port.name for port in old] != [port.name for port in new]:
            yield f"{kind}s changed from {[p.name for p in old]} to {[p.name for p in new]}"
            continue
        for a, b in zip(old, new, strict=True):
            if a != b:
                yield f"{kind} `{a.name}` changed from {a.dtype}, rank {a.rank} to {b.dtype}, rank {b.rank}"

"""The walk that infers dtypes, shapes and small contents: one visit a node, in order, nothing serialized."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from types import MappingProxyType

import onnx
import onnx_ir as ir

from graphopt import walk
from graphopt.dims import Atom, Dim, Size, unknown
from graphopt.inference_bodies import infer_if, infer_loop, infer_scan
from graphopt.onnx_inference import infer_by_onnx
from graphopt.shape_rules.contrib import CONTRIB_RULES
from graphopt.shape_rules.layout import LAYOUT_RULES
from graphopt.shape_rules.math import MATH_RULES
from graphopt.shape_rules.reshape import RESHAPE_RULES
from graphopt.shape_rules.shape_facts import Call, Contradiction, Dims, Fact, LooseDims, Rule, symbolic
from graphopt.shape_rules.windows import WINDOW_RULES
from graphopt.value_records import fact_of, kept_fact, type_and_shape_of_file

_STANDARD: Mapping[str, Rule] = {**MATH_RULES, **WINDOW_RULES, **LAYOUT_RULES, **RESHAPE_RULES}
# ONNX Runtime has it in ONNX's own domain.
_STANDARD = MappingProxyType(
    {**_STANDARD, "SimplifiedLayerNormalization": CONTRIB_RULES["SimplifiedLayerNormalization"]}
)
_RULES: Mapping[str, Mapping[str, Rule]] = MappingProxyType({"": _STANDARD, "com.microsoft": CONTRIB_RULES})
_BODIES = MappingProxyType({"If": infer_if, "Loop": infer_loop, "Scan": infer_scan})
# What a rule meets in a node that is not as its operator says; nothing is known of its outputs then.
_MALFORMED = (LookupError, ValueError, TypeError, ArithmeticError, AttributeError, AssertionError)


class Inference:
    """One walk over a model, or a part of it.

    Attributes:
        facts: What is known of each value seen.
        contradictions: Where a node cannot take what it reads, in the order found; only in graphs that run for certain.
        clashes: Where a value is declared to be something else than what is inferred.
        malformed: Nodes that are not as their operators say, with what a rule stumbled over.
        impossible: Nested graphs in which a node cannot take what it reads: they never run.
    """

    def __init__(
        self,
        opsets: Mapping[str, int],
        functions: Mapping[ir.OperatorIdentifier, ir.Function],
        *,
        attributes: Mapping[str, ir.Attr] | None = None,
        as_stamped: bool = False,
        trust_declared: bool = True,
    ) -> None:
        """Prepare a walk.

        Args:
            opsets: Operator sets the graph imports.
            functions: The model's functions.
            attributes: What a caller gives, where the graph is a function's.
            as_stamped: Take shapes inferred before for declared ones, to find what contradicts them.
            trust_declared: Let what the file declares of inner values fill what inference does not find.
        """
        self.facts: dict[ir.Value, Fact] = {}
        self.contradictions: list[str] = []
        self.clashes: list[str] = []
        self.malformed: list[str] = []
        self.impossible: set[ir.Graph] = set()
        self._opsets, self._functions = opsets, functions
        self._as_stamped, self._trust_declared = as_stamped, trust_declared
        self._bindings = attributes
        self._calls: list[ir.OperatorIdentifier] = []
        self._minted: list[set[Atom]] = []
        self._nested = 0

    # What is known

    def fact(self, value: ir.Value) -> Fact:
        """Return what is known of a value: what the walk found, else what it came with."""
        found = self.facts.get(value)
        if found is None:
            found = self.facts[value] = fact_of(value, self.mint)
        return found

    def mint(self, *, signed: bool = False) -> Dim:
        """Return a size that equals nothing else."""
        size = unknown(signed=signed)
        if self._minted:
            self._minted[-1] |= size.unknowns
        return size

    # The walk

    def run(self, graph: ir.Graph | ir.Function) -> None:
        """Infer a graph, node by node; its inputs are known or declared."""
        for node in graph:
            self.visit(node)

    def visit(self, node: ir.Node) -> None:
        """Infer the outputs of a node."""
        if node.op_type == "Constant" and node.outputs:
            self.facts[node.outputs[0]] = fact_of(node.outputs[0], self.mint)
            return
        found = self._found(node)
        for index, value in enumerate(node.outputs):
            self.facts[value] = self._settled(value, found[index] if index < len(found) else None, node)

    def _found(self, node: ir.Node) -> list[Fact | None]:
        domain = "" if node.domain in walk.ONNX_DOMAINS else node.domain
        inputs = [None if value is None else self.fact(value) for value in node.inputs]
        call = Call(node, inputs, self._opsets.get(domain, 0), self.mint, self._bindings)
        function = self._functions.get(node.op_identifier()) if self._functions else None
        try:
            if function is not None:
                return list(self._called(function, call))
            if not domain and node.op_type in _BODIES:
                return list(_BODIES[node.op_type](self, call))
            rule = _RULES.get(domain, {}).get(node.op_type)
            if rule is None:
                return infer_by_onnx(call, domain)
            rule(call)
            return _with_dtypes(call, domain)
        except Contradiction as why:
            # A branch, or a body, may never run: then it does not matter.
            if self._nested:
                self.impossible |= {node.graph} if isinstance(node.graph, ir.Graph) else set()
            else:
                self.contradictions.append(f"{walk.label(node)} ({node.op_type}): {why}")
        except _MALFORMED as error:
            self.malformed.append(f"{walk.label(node)} ({node.op_type}): {error!r}")
            self.impossible |= {node.graph} if self._nested and isinstance(node.graph, ir.Graph) else set()
        return []

    def _settled(self, value: ir.Value, found: Fact | None, node: ir.Node) -> Fact:
        """Put together what was inferred of a node's output and what was known of it."""
        known_type, known_shape = self._declared(value)
        other = known_type if known_type is not None and not isinstance(known_type, ir.TensorType) else None
        known_dtype = known_type.dtype if known_type is not None and other is None else None
        if found is None:
            found = Fact(None, None)
        dtype = found.dtype if found.dtype is not None else known_dtype
        if known_dtype is not None and dtype is not known_dtype and known_dtype is not ir.DataType.UNDEFINED:
            self._clash(value, node, f"elem type {dtype}", str(known_dtype))
        dims = self._dims(value, found.dims, known_shape, node)
        return Fact(dtype, dims, found.contents, other=found.type or other)

    def _declared(self, value: ir.Value) -> tuple[ir.TypeProtocol | None, ir.Shape | None]:
        if self._as_stamped:
            return value.type, value.shape
        return type_and_shape_of_file(value)

    def _dims(self, value: ir.Value, found: LooseDims | None, shape: ir.Shape | None, node: ir.Node) -> Dims | None:
        declared: list[Size | None] | None = None
        if shape is not None and not self._minted and not self._calls:
            declared = [dim if isinstance(dim, int) else symbolic(dim) for dim in shape]
        if declared is not None and found is not None:
            self._compare(value, found, declared, node)
        # Of what never ran, a Loop gives other shapes than those of a run.
        trusted = None if node.op_type in ("Loop", "Scan") else declared
        known = None if self._minted or self._calls else self._remembered(value, trusted)
        if found is None:
            if known is None:
                return None
            found = [None] * len(known)
        if known is None or len(known) != len(found):
            known = [None] * len(found)
        return tuple(self._better(one, other) for one, other in zip(found, known, strict=True))

    def _remembered(self, value: ir.Value, declared: list[Size | None] | None) -> LooseDims | None:
        """Return the dimensions known of a value besides what is inferred now."""
        kept = None if self._as_stamped else kept_fact(value)
        if kept is not None and kept.dims is not None:
            return kept.dims
        return declared if self._trust_declared else None

    def _better(self, found: Size | None, known: Size | None) -> Size:
        if isinstance(found, int) and found >= 0:
            return found
        if found is None or isinstance(found, int):
            return self.mint() if known is None else known
        atom = found.atom
        vague = atom is not None and atom.kind == "unknown"
        return known if vague and known is not None else found

    def _compare(self, value: ir.Value, found: LooseDims, declared: LooseDims, node: ir.Node) -> None:
        clash = len(found) != len(declared) or any(
            isinstance(one, int) and isinstance(other, int) and one != other
            for one, other in zip(found, declared, strict=True)
        )
        if clash:
            shapes = [f"[{', '.join('?' if dim is None else str(dim) for dim in dims)}]" for dims in (found, declared)]
            self._clash(value, node, *shapes)

    def _clash(self, value: ir.Value, node: ir.Node, found: str, declared: str) -> None:
        if not self._nested:
            text = f"{walk.label(node)} ({node.op_type}) gives {found}, `{value.name}` is declared {declared}"
            self.clashes.append(text)

    # Nested graphs and functions

    def body(self, graph: ir.Graph, inputs: Sequence[Fact], *, repeated: bool) -> tuple[list[Fact], set[Atom]]:
        """Return what is known of a nested graph's outputs, and the unknown sizes that mean something in it alone."""
        self._nested += 1
        if repeated:
            self._minted.append(set())
        try:
            for value, given in zip(graph.inputs, inputs, strict=True):
                self.facts[value] = self._bound(value, given)
            self.run(graph)
            return [self.fact(value) for value in graph.outputs], self._minted[-1] if repeated else set()
        finally:
            self._nested -= 1
            if repeated:
                local = self._minted.pop()
                if self._minted:
                    self._minted[-1] |= local

    def _bound(self, value: ir.Value, given: Fact) -> Fact:
        dims = given.dims
        if dims is not None and None in dims:
            dims = tuple(self.mint() if dim is None else dim for dim in dims)
        dtype = given.dtype if given.dtype is not None else value.dtype
        return Fact(dtype, dims, given.contents, tensor=given.tensor, other=given.type)

    def _called(self, function: ir.Function, call: Call) -> list[Fact]:
        """Return what a call gives, by its function's body as this call runs it; the body's values learn nothing."""
        key = function.identifier()
        if key in self._calls:
            raise LookupError(f"`{key}` calls itself")
        outside, self.facts = self.facts, {}
        state = self._bindings, self._opsets
        given = {name: attribute for name in call.node.attributes if (attribute := call.attribute(name)) is not None}
        self._bindings = {
            name: attribute for name, attribute in function.attributes.items() if attribute.value is not None
        } | given
        self._opsets = function.opset_imports
        self._calls.append(key)
        self._nested += 1
        try:
            for index, value in enumerate(function.inputs):
                fact = call.inputs[index] if index < len(call.inputs) else None
                self.facts[value] = fact if fact is not None else Fact(None, None)
            self.run(function)
            return [self.fact(value) for value in function.outputs]
        finally:
            self.facts = outside
            self._bindings, self._opsets = state
            self._calls.pop()
            self._nested -= 1


def _with_dtypes(call: Call, domain: str) -> list[Fact | None]:
    """Return what a rule found, with the dtypes the operator's schema derives where the rule gives none."""
    plan: Sequence[int | ir.DataType | None] = ()
    facts: list[Fact | None] = []
    for index, output in enumerate(call.outputs):
        dims, dtype, contents = output if output is not None else (None, None, None)
        if dtype is None:
            plan = plan or _dtype_plan(call.node.op_type, call.opset, domain)
            source = plan[min(index, len(plan) - 1)]
            # A DataType is an int as well.
            dtype = source if source is None or isinstance(source, ir.DataType) else call.dtype(source)
        facts.append(Fact(dtype, tuple(dims) if dims is not None else None, contents))  # type: ignore[arg-type]
    return facts


@lru_cache(maxsize=4096)
def _dtype_plan(op_type: str, opset: int, domain: str) -> tuple[int | ir.DataType | None, ...]:
    """Return, for each output of an operator, the input that has its dtype, or the dtype itself."""
    try:
        schema = onnx.defs.get_schema(op_type, *((opset,) if opset else ()), domain=domain)
    except onnx.defs.SchemaError:
        return (None,)
    sources = {parameter.type_str: index for index, parameter in reversed(list(enumerate(schema.inputs)))}
    fixed = {
        constraint.type_param_str: constraint.allowed_type_strs[0]
        for constraint in schema.type_constraints
        if len(constraint.allowed_type_strs) == 1
    }
    plan: list[int | ir.DataType | None] = []
    for output in schema.outputs:
        text = fixed.get(output.type_str, output.type_str)
        plan.append(sources.get(output.type_str) if not text.startswith("tensor(") else _dtype_named(text))
    return tuple(plan) or (None,)


def _dtype_named(text: str) -> ir.DataType | None:
    names = {"tensor(float)": "FLOAT", "tensor(float16)": "FLOAT16", "tensor(double)": "DOUBLE"}
    name = names.get(text, text.removeprefix("tensor(").removesuffix(")").upper())
    return ir.DataType[name] if name in ir.DataType.__members__ else None

"""Opset up-conversion: the model says the same in a newer opset of the ONNX domain."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

import onnx
import onnx_ir as ir

from graphopt import shapes, walk
from graphopt.authoring import Context, Guarantee, Pass
from graphopt.errors import PassError
from graphopt.options import opt
from graphopt.rewriter import Rewriter

from .opset_adapters import ADAPTERS
from .opset_form import Fixed, Form, Itself, Made, Operand, Refused
from .opset_history import incompatible, schema_at, types_lost, versions

# Every change of meaning from the one of these opsets to the other is known, also where only the standard's text tells.
OLDEST, NEWEST = 7, 28


@dataclass(frozen=True)
class Opset(Pass):
    """Convert the model to a newer opset of the ONNX domain."""

    to: int | None = opt(None, help="opset to convert to, by default what the target knows well", low=OLDEST)

    name = "opset"
    # The standard says the same in both opsets, but a runtime may have another kernel: ONNX Runtime for AveragePool 19.
    guarantee = Guarantee.EQUIVALENT
    edits: ClassVar[Mapping[str, str]] = {
        "opset": "a node of one version of an operator = its form in a newer version, for all nodes at once",
    }

    def run(self, model: ir.Model, ctx: Context) -> None:
        """Plan the form of every node, then edit all of them in one edit.

        Raises:
            PassError: The model is of a newer opset, the installed onnx does not know the opset, or a node cannot be
                said in it; the model is as it was then.
        """
        newest = min(NEWEST, onnx.defs.onnx_opset_version())
        wanted = min(ctx.target.opset, newest) if self.to is None else self.to
        if wanted > newest:
            raise PassError(f"opset {wanted} is not known; the newest that is: {newest}", hint=f"`opset:to={newest}`")
        # By default nothing is asked of a model that is newer; on request that is refused.
        scopes = [one for one in _scopes(model) if one.opset < wanted or (self.to is not None and one.opset > wanted)]
        if not scopes:
            ctx.note(f"nothing is older than opset {wanted}")
            return
        ctx.analyse(shapes.infer_shapes)  # some forms depend on dtypes and ranks
        forms = [form for scope in scopes for form in _planned(scope, wanted, model)]
        oldest = min(scope.opset for scope in scopes)
        with ctx.rewriter.edit("opset", *(form.node for form in forms)):
            for scope in scopes:
                if scope.domain in scope.holder.opset_imports:
                    ctx.rewriter.import_opset(scope.holder, wanted, scope.domain)
            replaced: dict[ir.Value, ir.Value] = {}
            for form in forms:
                _Writer(ctx.rewriter, form, replaced).write()
            model.ir_version = max(model.ir_version, _least_ir_version(wanted))
        ctx.note(f"opset {oldest} → {wanted}, nodes in another form: {len(forms)}", nodes=len(forms))


@dataclass(frozen=True)
class _Scope:
    """The model or a function: what may import an opset by itself.

    Attributes:
        holder: What imports it.
        graph: Its nodes.
        domain: How it spells the ONNX domain.
        opset: What its nodes are of; a function that imports none is of the model's.
    """

    holder: ir.Model | ir.Function
    graph: ir.Graph | ir.Function
    domain: str
    opset: int

    @property
    def label(self) -> str:
        """How messages call it."""
        return f"function `{self.graph.name}`" if isinstance(self.graph, ir.Function) else "the model"


def _scopes(model: ir.Model) -> Iterator[_Scope]:
    """Yield the model and its functions, but for those that neither import an opset nor are in a model that does."""
    own = model.opset_imports.get(_onnx_domain(model))
    if own is not None:
        yield _Scope(model, model.graph, _onnx_domain(model), own)
    for function in model.functions.values():
        opset = function.opset_imports.get(_onnx_domain(function), own)
        if opset is not None:
            yield _Scope(function, function, _onnx_domain(function), opset)


def _onnx_domain(holder: ir.Model | ir.Function) -> str:
    """Return how a model or function spells the ONNX domain."""
    return next((domain for domain in walk.ONNX_DOMAINS if domain in holder.opset_imports), "")


def _least_ir_version(opset: int) -> int:
    return int(onnx.helper.find_min_ir_version_for([onnx.helper.make_opsetid("", opset)]))


def _planned(scope: _Scope, wanted: int, model: ir.Model) -> list[Form]:
    """Return what the nodes of a scope become that cannot stay as they are."""
    if scope.opset > wanted:
        raise PassError(
            f"{scope.label} is of opset {scope.opset}, newer than {wanted}: `opset` converts upwards only",
            hint="export the model anew in the older opset, or try `onnx.version_converter`",
        )
    forms = []
    for graph in walk.graphs_within(scope.graph):
        for node in graph:
            if node.domain in walk.ONNX_DOMAINS and node.op_identifier() not in model.functions:
                form = _form_in(node, scope.opset, wanted)
                if form is not None:
                    forms.append(form)
    return forms


def _form_in(node: ir.Node, given: int, wanted: int) -> Form | None:
    """Return what a node becomes in an opset, None where it may stay as it is.

    Raises:
        PassError: It cannot be said there.
    """
    if schema_at(node.op_type, given) is None:
        raise PassError(
            f"`{walk.label(node)}`: opset {given} has no operator `{node.op_type}`",
            hint="an operator of another domain must name it",
        )
    form, opset = Form.of(node, wanted), given
    changed = False
    while opset < wanted:
        step = next(versions(form.op_type, opset, wanted), None)
        if step is None:
            break
        old, new = step
        opset = new.since_version
        adapter = ADAPTERS.get((form.op_type, opset))
        try:
            if adapter is not None:
                form, changed = adapter(form), True
            else:
                _check_step(node, old, new)
        except Refused as refusal:
            raise PassError(
                f"`{walk.label(node)}`: {old.name} of opset {old.since_version} cannot become that of opset {opset}:"
                f" {refusal}",
                hint=f"`opset:to={opset - 1}` converts as far as possible; or export the model anew in a newer opset",
            ) from None
    return form if changed else None


def _check_step(node: ir.Node, old: onnx.defs.OpSchema, new: onnx.defs.OpSchema) -> None:
    """Check that a node may cross from a version of its operator to the next as it is.

    Raises:
        Refused: It may not.
    """
    if new.since_version <= OLDEST:
        raise Refused(f"changes up to opset {OLDEST} are not known; `onnx.version_converter` may bring it there")
    why = incompatible(old, new)
    if why is not None:
        raise Refused(f"{why}, and no adapter is known")
    for side, index, lost in types_lost(old, new):
        values = node.inputs if side == "input" else node.outputs
        value = values[index] if index < len(values) else None
        if value is not None and value.dtype is not None and f"tensor({_onnx_name(value.dtype)})" in lost:
            raise Refused(f"it takes no {_onnx_name(value.dtype)} any more")


def _onnx_name(dtype: ir.DataType) -> str:
    return str(dtype).lower()


class _Writer:
    """Writes one form into the model.

    Args:
        rewriter: The edit surface.
        form: The form.
        replaced: Values of forms written before to what took their places: this one was planned to read the former.
    """

    def __init__(self, rewriter: Rewriter, form: Form, replaced: dict[ir.Value, ir.Value]) -> None:
        self._rewriter = rewriter
        self._form = form
        self._replaced = replaced
        self._written: dict[Operand, ir.Value] = {}

    def write(self) -> None:
        """Change the node, or put another in its place; what its form reads comes before it."""
        inputs = [self._value(operand) for operand in self._form.inputs]
        if self._form.stays:
            self._change(inputs)
        else:
            self._exchange(inputs)

    def _change(self, inputs: list[ir.Value | None]) -> None:
        node, attributes = self._form.node, self._form.attributes
        for name in [name for name in node.attributes if name not in attributes]:
            self._rewriter.set_attribute(node, name, None)
        for name, attribute in attributes.items():
            if node.attributes.get(name) is not attribute:
                self._rewriter.set_attribute(node, name, attribute)
        for index in range(max(len(inputs), len(node.inputs))):
            value = inputs[index] if index < len(inputs) else None
            if index >= len(node.inputs) or node.inputs[index] is not value:
                self._rewriter.set_input(node, index, value)

    def _exchange(self, inputs: list[ir.Value | None]) -> None:
        form, old = self._form, self._form.node
        new = self._rewriter.make(form.op_type, inputs, form.attributes, sources=[old], outputs=form.outputs)
        self._rewriter.insert(new, before=old)
        self._written[form.itself] = new.outputs[0]
        first = self._value(form.result)
        assert first is not None, "a result is a value"
        names = [value.name for value in old.outputs]
        results = [first, *new.outputs[1:]]
        for before, after in zip(old.outputs, results, strict=False):
            self._rewriter.replace(before, after)
            self._replaced[before] = after
        self._rewriter.erase(old)
        new.name = old.name
        for name, after in zip(names, results, strict=False):
            after.name = name

    def _value(self, operand: Operand) -> ir.Value | None:
        """Return the value of an operand, made before the node where it is not there yet."""
        if operand is None:
            return None
        if isinstance(operand, ir.Value):
            return self._replaced.get(operand, operand)
        if operand not in self._written:
            self._written[operand] = self._made(operand)
        return self._written[operand]

    def _made(self, operand: Fixed | Made | Itself) -> ir.Value:
        node = self._form.node
        if isinstance(operand, Fixed):
            return self._rewriter.const(operand.array, operand.name, near=node)
        assert isinstance(operand, Made), "the node itself is written before its result"
        inputs = [self._value(one) for one in operand.inputs]
        made = self._rewriter.make(operand.op_type, inputs, operand.attributes, sources=[node])
        return self._rewriter.insert(made, before=node).outputs[0]

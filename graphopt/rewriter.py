"""The one edit surface: every change to a model goes through a Rewriter."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir as ir

from graphopt import provenance, shapes, walk
from graphopt.backend import Array
from graphopt.mapped import renamed

Attributes = Mapping[str, Any]
Observer = Callable[[ir.Node], None]


@dataclass(frozen=True)
class Edit:
    """One entry of the journal: a change that is made, or taken back, as a whole.

    Attributes:
        number: Position in the run, from 1.
        pass_name: The pass that made it.
        rule: The rule or kind of edit.
        origins: Origins of the nodes it is about; where it names none, of all it touched.
        nodes: What the nodes it is about were called before.
    """

    number: int
    pass_name: str
    rule: str
    origins: provenance.Origins
    nodes: tuple[str, ...] = ()


class EditLimitReached(BaseException):
    """Ends a run at the edit its journal is limited to: no error, and not for a pass to catch."""


@dataclass
class Journal:
    """Every edit of a run, in order, and how many single changes they were made of.

    A run of the same passes over the same model with the same setting makes the same edits. So a journal with a
    limit of N leaves the model exactly as any such run had it after its edit N.

    Attributes:
        limit: The most edits to make; entering one more raises `EditLimitReached`.
        watcher: Told of each edit once the model is whole again.
    """

    edits: list[Edit] = field(default_factory=list)
    changes: int = 0
    limit: int | None = None
    watcher: Callable[[Edit], None] | None = None

    @property
    def is_full(self) -> bool:
        """Whether no further edit may be made."""
        return self.limit is not None and len(self.edits) >= self.limit


class Rewriter:
    """Edits a model: makes fresh names, keeps output names, records provenance, counts and numbers edits.

    Args:
        model: The model to edit, in place.
        journal: Where edits are written; shared by all passes of a run.
        pass_name: Whose edits these are.
    """

    def __init__(self, model: ir.Model, journal: Journal | None = None, pass_name: str = "") -> None:
        self.model = model
        self.journal = journal if journal is not None else Journal()
        self.pass_name = pass_name
        self.edits = 0
        self._touched: set[str] | None = None
        self._changed = False
        self._names: Counter[str] | None = None
        self._suffixes: dict[str, int] = {}
        self._roots: dict[ir.Graph, ir.Graph | ir.Function] | None = None
        self._observer: Observer | None = None

    @property
    def version(self) -> int:
        """A number that grows with every change of the run, also inside an edit that is still open."""
        return self.journal.changes

    @contextmanager
    def edit(self, rule: str, *nodes: ir.Node) -> Iterator[None]:
        """Group what happens inside into one numbered edit; a group that changes nothing is no edit.

        The model must be whole before and after each outermost group, for a run may be ended at any of them.

        Raises:
            EditLimitReached: The journal is full; nothing was changed.
        """
        if self._touched is not None:  # already inside a larger edit
            self._touched.update(*(provenance.origins(node) for node in nodes))
            yield
            return
        if self.journal.is_full:
            raise EditLimitReached
        called = tuple(walk.label(node) for node in nodes)
        own = frozenset().union(*(provenance.origins(node) for node in nodes))
        self._touched = set()
        self._changed = False
        try:
            yield
        finally:
            touched, self._touched = self._touched, None
            if self._changed:
                self._write(rule, own or frozenset(touched), called)

    @contextmanager
    def observed_by(self, observer: Observer) -> Iterator[None]:
        """Tell ``observer`` of every node whose surroundings change, for a worklist to visit again."""
        outer, self._observer = self._observer, observer
        try:
            yield
        finally:
            self._observer = outer

    def fresh_name(self, base: str) -> str:
        """Return a name no value, node or initializer of any graph has: ``base``, with a suffix if taken."""
        names = self._all_names()
        name, suffix = base, self._suffixes.get(base, 0)
        while name in names:
            suffix += 1
            name = f"{base}_{suffix}"
        # Names are never given back, so that the next search goes on where this one ended.
        self._suffixes[base] = suffix
        names[name] = 1
        return name

    def make(
        self,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        attributes: Attributes | None = None,
        *,
        sources: Iterable[ir.Node] = (),
        outputs: int = 1,
        domain: str = "",
        name: str | None = None,
    ) -> ir.Node:
        """Make a node that is in no graph yet; `insert` puts it in.

        Args:
            op_type: Operator.
            inputs: Input values; None for an optional input left out.
            attributes: Attribute name to Python value, tensor or `ir.Attr`; None values are left out.
            sources: The nodes it stands for; their origins become its own.
            outputs: How many outputs it has.
            domain: Operator domain.
            name: Base of its name and of its outputs' names; by default from the sources.
        """
        sources = list(sources)
        base = name or (sources[0].name if sources and sources[0].name else op_type)
        given = {key: value for key, value in (attributes or {}).items() if value is not None}
        node = ir.Node(
            domain,
            op_type,
            inputs,
            ir.convenience.convert_attributes(given),
            num_outputs=outputs,
            name=self.fresh_name(base),
        )
        for value in node.outputs:
            value.name = self.fresh_name(f"{node.name}_output")
        provenance.record(node, sources)
        return node

    def insert(self, node: ir.Node, *, before: ir.Node | None = None, graph: ir.Graph | None = None) -> ir.Node:
        """Insert a node before another, or at the end of a graph (the main graph by default)."""
        with self.edit("insert", node):
            if before is not None:
                place = before.graph
                assert place is not None, "the node to insert before is in no graph"
                place.insert_before(before, node)
            else:
                # An empty graph is falsy.
                (graph if graph is not None else self.model.graph).append(node)
            shapes.infer_node(node, self.model)
            self._note(node)
        return node

    def insert_after(self, node: ir.Node, anchor: ir.Node) -> ir.Node:
        """Insert a node right after another."""
        with self.edit("insert", node):
            assert anchor.graph is not None, "the node to insert after is in no graph"
            anchor.graph.insert_after(anchor, node)
            shapes.infer_node(node, self.model)
            self._note(node)
        return node

    def replace(self, old: ir.Value, new: ir.Value) -> None:
        """Let every reader of ``old`` read ``new``; a graph output keeps its name.

        Raises:
            ValueError: The two are known to have different dtypes.
        """
        if old is new:
            return
        if old.dtype is not None and new.dtype is not None and old.dtype != new.dtype:
            raise ValueError(f"cannot replace `{old.name}` ({old.dtype}) by `{new.name}` ({new.dtype})")
        sources = [node for node in (old.producer(),) if node is not None]
        with self.edit("replace", *sources):
            shapes.inherit(new, old)
            readers = [use.node for use in old.uses()]
            if old.is_graph_output():
                self._take_over_output(old, new, sources)
            old.replace_all_uses_with(new)
            producer = new.producer()
            self._note(*readers, *([producer] if producer is not None else []))

    def erase(self, node: ir.Node) -> None:
        """Remove a node none of whose outputs is read; nested graphs let go of what they captured."""
        if walk.is_read(node):
            raise ValueError(f"cannot erase `{walk.label(node)}`: an output of it is still read")
        with self.edit("erase", node):
            producers = {producer for value in walk.values_read(node) if (producer := value.producer())}
            # onnx_ir leaves the uses held by nested nodes behind, which would keep captured values alive.
            for inner in walk.nodes_within(node):
                for index in range(len(inner.inputs)):
                    inner.replace_input_with(index, None)
            assert node.graph is not None, "the node was erased before"
            _take_out(node)
            self._note(*(producer for producer in producers if producer.graph is not None))

    def move(self, node: ir.Node, *, before: ir.Node) -> None:
        """Move a node out of a nested graph, to before a node of a graph around it.

        All it reads must be defined there. Outputs that share their name with a value elsewhere get another one.
        """
        with self.edit("move", node):
            assert node.graph is not None, "the node to move is in no graph"
            assert before.graph is not None, "the node to move before is in no graph"
            for value in node.outputs:
                self._make_sole(value)
            if node.name and self._all_names()[node.name] > 1:
                node.name = self.fresh_name(node.name)  # runtimes refuse two of a name in one graph
            node.graph.remove(node)
            before.graph.insert_before(before, node)
            self._note(node)

    def lift(self, value: ir.Value, near: ir.Node) -> None:
        """Move an initializer out of a nested graph, to where the node ``near`` and all around it can read it."""
        if not value.is_initializer() or value.is_graph_input() or value.is_graph_output():
            raise ValueError(f"cannot lift `{value.name}`: it is no mere initializer")
        with self.edit("lift", near):
            assert value.graph is not None, "an initializer belongs to a graph"
            self._make_sole(value)
            value.graph.initializers.pop(value.name or "")
            self.adopt(value, near)

    def leave_out(self, value: ir.Value) -> None:
        """Leave out an optional output nothing reads; behind the last output that is named, none is left."""
        node = value.producer()
        if node is None or value.uses() or value.is_graph_output():
            raise ValueError(f"cannot leave out `{value.name}`: it is still used")
        with self.edit("leave-out", node):
            value.name, value.type, value.shape = "", None, None
            node.resize_outputs(max((index + 1 for index, one in enumerate(node.outputs) if one.name), default=0))
            self._note(node)

    def const(self, content: ir.TensorProtocol | Array, name: str, *, near: ir.Node | None = None) -> ir.Value:
        """Add a constant: an initializer of the main graph, or a Constant node where there can be none.

        Args:
            content: What it holds.
            name: Base of its name.
            near: A node that will read it; decides which graph holds it.
        """
        value = self.make_const(content, name)
        self.adopt(value, near)
        return value

    def make_const(self, content: ir.TensorProtocol | Array, name: str) -> ir.Value:
        """Make a constant that is in no graph yet; `adopt` puts it in."""
        name = self.fresh_name(name)
        if isinstance(content, np.ndarray | np.generic):
            content = _as_tensor(content)
            content.name = name
        elif isinstance(content, ir.Tensor):  # it may be shared with a clone, also without a name: a Constant's
            content = ir.Tensor(content.raw, dtype=content.dtype, shape=content.shape, name=name)
        else:
            content = renamed(content, name)
        return ir.Value(
            name=name,
            shape=ir.Shape(walk.dims(content)),
            type=ir.TensorType(content.dtype),
            const_value=content,
        )

    def adopt(self, value: ir.Value, near: ir.Node | None = None) -> None:
        """Put a constant made by `make_const` where the node ``near`` can read it."""
        root = self._root(near.graph) if near is not None and near.graph is not None else self.model.graph
        with self.edit("const", *([near] if near is not None else [])):
            self._note()
            if isinstance(root, ir.Graph) and (self.model.ir_version or 0) >= walk.FIRST_IR_WITH_PURE_INITIALIZERS:
                root.register_initializer(value)
                return
            # A function has no initializers and captures nothing; earlier IR versions make an initializer an input.
            attribute = ir.AttrTensor("value", value.const_value)  # type: ignore[arg-type]
            value.const_value = None
            node = ir.Node("", "Constant", [], [attribute], outputs=[value], name=self.fresh_name("Constant"))
            provenance.record(node, [near if near is not None else root[0]])
            root.insert_before(root[0], node)

    def set_weight(self, value: ir.Value, tensor: ir.TensorProtocol | Array, *, resized: bool = False) -> None:
        """Replace what a constant holds, wherever it is read; dtype and, unless it is `resized`, shape must stay.

        Raises:
            ValueError: ``value`` is no constant, or the new content has another dtype or shape.
        """
        old = walk.constant_tensor(value)
        if isinstance(tensor, np.ndarray | np.generic):
            tensor = _as_tensor(tensor, value.name)
        if old is None or tensor.dtype != old.dtype or not (resized or tuple(tensor.shape) == tuple(old.shape)):
            raise ValueError(f"`{value.name}` cannot hold a {tensor.dtype} of shape {tuple(tensor.shape)}")
        producer = value.producer()
        readers = [use.node for use in value.uses()]
        with self.edit("set-weight", *readers):
            if producer is not None:
                producer.attributes.clear()
                producer.attributes.add(ir.AttrTensor("value", tensor))
            else:
                value.const_value = tensor
            if resized:
                value.shape = ir.Shape(walk.dims(tensor))
            self._note(*readers)

    def set_input(self, node: ir.Node, index: int, value: ir.Value | None) -> None:
        """Let a node read another value, or none, at one of its inputs."""
        with self.edit("set-input", node):
            if index >= len(node.inputs):
                node.resize_inputs(index + 1)
            node.replace_input_with(index, value)
            self._note(node)

    def set_attribute(self, node: ir.Node, name: str, value: Any) -> None:
        """Set an attribute of a node; None removes it."""
        with self.edit("set-attribute", node):
            if value is None:
                node.attributes.pop(name, None)
            else:
                node.attributes.add(ir.convenience.convert_attribute(name, value))
            self._note(node)

    def remove_initializer(self, value: ir.Value) -> None:
        """Remove an initializer nothing reads."""
        if value.uses() or value.is_graph_output() or value.is_graph_input():
            raise ValueError(f"cannot remove initializer `{value.name}`: it is still used")
        with self.edit("remove-initializer"):
            assert value.graph is not None, "not an initializer"
            value.graph.initializers.pop(value.name or "")
            self._note()

    def remove_if_unread(self, value: ir.Value) -> bool:
        """Remove an initializer if nothing reads it, and return whether it is gone."""
        used = value.uses() or value.is_graph_output() or value.is_graph_input()
        if used or not value.is_initializer():
            return False
        self.remove_initializer(value)
        return True

    def remove_function(self, key: ir.OperatorIdentifier) -> None:
        """Remove a function no node calls."""
        with self.edit("remove-function"):
            self.model.functions.pop(key)
            self._note()

    def import_opset(self, holder: ir.Model | ir.Function, version: int, domain: str = "") -> None:
        """Let a model or a function import a version of an operator set; its nodes must fit it when the edit ends."""
        with self.edit("import-opset"):
            holder.opset_imports[domain] = version
            self._note()

    def import_domain(self, domain: str, version: int = 1, *, near: ir.Node) -> None:
        """Let the model or function that holds the node ``near`` import an operator set it does not import yet."""
        root = self._root(near.graph) if near.graph is not None else self.model.graph
        holder = root if isinstance(root, ir.Function) else self.model
        if domain not in walk.ONNX_DOMAINS and domain not in holder.opset_imports:
            self.import_opset(holder, version, domain)

    def _take_over_output(self, old: ir.Value, new: ir.Value, sources: list[ir.Node]) -> None:
        """Make ``new`` (or an Identity of it) the graph output that ``old`` is, under ``old``'s name."""
        graph = old.graph
        assert graph is not None, "an output belongs to a graph"
        producer = new.producer()
        movable = producer is not None and producer.graph is graph and not new.is_graph_output()
        if not movable:
            identity = self.make("Identity", [new], sources=sources or ([producer] if producer else []))
            # At the end of the graph every value is defined, wherever `new` comes from; nothing else reads it there.
            graph.append(identity)
            new = identity.outputs[0]
        name = old.name
        old.name = self.fresh_name(f"{name}_replaced")
        # The declared type and shape belong to the signature, which an edit never changes.
        new.name = name
        new.type = old.type if old.type is not None else new.type
        if old.shape is not None or graph is self.model.graph:  # a scalar's shape is falsy
            new.shape = old.shape
        new.meta[shapes.INFERRED] = old.meta.get(shapes.INFERRED)
        while old.is_graph_output():
            # A slice is a plain list: onnx_ir's own container is slow to search where there are many outputs.
            graph.outputs[graph.outputs[:].index(old)] = new

    def _all_names(self) -> Counter[str]:
        """Return every name of the model, with the number of things that bear it."""
        if self._names is None:
            self._names = _all_names(self.model)
        return self._names

    def _make_sole(self, value: ir.Value) -> None:
        """Rename a value that is about to be seen by more graphs, if another one may have its name."""
        if value.name and self._all_names()[value.name] > 1:
            value.name = self.fresh_name(value.name)

    def _root(self, graph: ir.Graph) -> ir.Graph | ir.Function:
        """Return the main graph or function a graph is nested in."""
        if self._roots is None or graph not in self._roots:
            self._roots = {walk.body(inner): self.model.graph for inner in walk.graphs_within(self.model.graph)}
            for function in self.model.functions.values():
                self._roots.update((walk.body(inner), function) for inner in walk.graphs_within(function))
        return self._roots.get(graph, self.model.graph)

    def _note(self, *nodes: ir.Node) -> None:
        """Mark the current edit as a change, and tell the observer whose surroundings it touched."""
        self._changed = True
        self.journal.changes += 1
        for node in nodes:
            if self._touched is not None:
                self._touched.update(provenance.origins(node))
            if self._observer is not None:
                self._observer(node)

    def _write(self, rule: str, origins: provenance.Origins, nodes: tuple[str, ...]) -> None:
        self.edits += 1
        edit = Edit(len(self.journal.edits) + 1, self.pass_name, rule, origins, nodes)
        self.journal.edits.append(edit)
        if self.journal.watcher is not None:
            self.journal.watcher(edit)


def _take_out(node: ir.Node) -> None:
    """Remove a node nothing reads, and its uses of what it reads, as `ir.Graph.remove(node, safe=True)` does."""
    # That looks through every output of the graph each time.
    graph, node.graph = node.graph, None
    for index in range(len(node.inputs)):
        node.replace_input_with(index, None)
    assert isinstance(graph, ir.Graph), "a node is in no graph or in one"
    graph._nodes.remove(node)


def let_go(node: ir.Node) -> None:
    """Cut a node that is in no graph, and what is nested in it, off the values they read."""
    for one in (node, *walk.nodes_within(node)):
        for index in range(len(one.inputs)):
            one.replace_input_with(index, None)


def let_go_of_loose_nodes(model: ir.Model) -> None:
    """Cut nodes that were made and never inserted off the values of the model, as if they had not been made."""
    alive = set(walk.every_node(model))
    for graph in walk.every_graph(model):
        values = [*graph.inputs, *(value for node in graph for value in node.outputs)]
        if isinstance(graph, ir.Graph):
            values.extend(graph.initializers.values())
        for value in values:
            for use in [use for use in value.uses() if use.node not in alive]:
                use.node.replace_input_with(use.idx, None)


def _as_tensor(array: Array, name: str | None = None) -> ir.TensorProtocol:
    if array.dtype.kind in "OSU":
        encoded = [text.encode() if isinstance(text, str) else bytes(text) for text in array.reshape(-1)]
        return ir.StringTensor(encoded, shape=ir.Shape(array.shape), name=name)
    return ir.tensor(np.asarray(array, order="C"), name=name)


def _all_names(model: ir.Model) -> Counter[str]:
    names: Counter[str] = Counter()
    for graph in walk.every_graph(model):
        names.update({value.name or "" for value in graph.inputs} | set(walk.body(graph).initializers))
        for node in graph:
            # A node may be called like what it gives.
            names.update({node.name or "", *(value.name or "" for value in node.outputs)})
    return names

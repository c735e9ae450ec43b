"""Which value of one model is which of another: by name, by origin, and by what reads them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

import onnx_ir as ir

from graphopt import provenance, walk
from graphopt.comparing.layer_values import ReadValues
from graphopt.fragment import constant_content, values_read
from graphopt.provenance import Origins
from graphopt.shapes import dims_of

# What the Rewriter puts behind the name of a node that takes the place of another.
_SUFFIX = re.compile(r"_\d+$")

# What quantization leaves out where codes cannot say anything that it would change.
_CLIPPING = ("Clip", "Relu")


class OriginIndex:
    """Nodes of a second model by the origins they share with the first.

    Where the second was made of the first in this process, it is known which nodes stand for which. A file holds no
    origins; there a node has those of its name, or those of the name it was made from.
    """

    def __init__(self, a: ir.Model, b: ir.Model) -> None:
        self.known: set[str] = set()
        for node in walk.every_node(a):
            self.known |= provenance.origins(node)
        self._of: dict[ir.Node, Origins] = {}
        self.guessed: set[ir.Node] = set()
        self._nodes: dict[str, list[ir.Node]] = {}
        for node in walk.every_node(b):
            own = provenance.origins(node) & self.known
            if not own:
                own = self._guess(node.name or "")
                self.guessed.update([node] if own else [])
            self._of[node] = own
            for origin in own:
                self._nodes.setdefault(origin, []).append(node)

    def _guess(self, name: str) -> Origins:
        """Return the origin that the name of a node was made from, if it was."""
        while (stem := _SUFFIX.sub("", name)) != name:
            if stem in self.known:
                return frozenset({stem})
            name = stem
        return frozenset()

    def of(self, node: ir.Node) -> Origins:
        """Return the origins a node of the second model shares with the first."""
        return self._of[node]

    def made_from(self, node: ir.Node) -> list[ir.Node]:
        """Return the nodes of the second model, in order, that stand for a node of the first, or for part of it."""
        return list(dict.fromkeys(one for origin in provenance.origins(node) for one in self._nodes.get(origin, ())))

    def is_clipped(self, node: ir.Node) -> bool:
        """Return whether a node only cuts values off, and the second model leaves that to the codes it writes."""
        return walk.is_onnx_op(node, *_CLIPPING) and not any(one.op_type in _CLIPPING for one in self.made_from(node))

    def is_gone(self, node: ir.Node) -> bool:
        """Return whether nothing in the second model stands for a node of the first."""
        return not any(origin in self._nodes for origin in provenance.origins(node))


def pair_values(a: ir.Model, b: ir.Model, read_a: ReadValues, read_b: ReadValues) -> dict[ir.Value, ir.Value]:
    """Return values of the first model's main graph with their counterparts, those that codes stand for included.

    They come in the order of the graph, so that a model run up to one after the other is run once.

    Args:
        a: The first model, with origins.
        b: The second, with origins.
        read_a: What is read of the first.
        read_b: What is read of the second.
    """
    pairing = _Pairing(a, b, read_a, read_b)
    pairing.by_name()
    pairing.by_readers()
    pairing.by_origin()
    return {value: pairing.pairs[value] for value in read_a.readings if value in pairing.pairs}


class _Pairing:
    def __init__(self, a: ir.Model, b: ir.Model, read_a: ReadValues, read_b: ReadValues) -> None:
        self._a, self._b = a, b
        self._read_a, self._read_b = read_a, read_b
        self._index = OriginIndex(a, b)
        self._place = {node: index for index, node in enumerate(a.graph)}
        self._order = {node: index for index, node in enumerate(b.graph)}
        self._by_origin: dict[str, list[ir.Node]] = {}
        for node in a.graph:
            for origin in provenance.origins(node):
                self._by_origin.setdefault(origin, []).append(node)
        self.pairs: dict[ir.Value, ir.Value] = {}
        self._taken: set[ir.Value] = set()

    def _pair(self, value: ir.Value, other: ir.Value) -> bool:
        """Pair two values if both are read and yet single."""
        if other in self._read_b.readings and self._read_b.readings[other].codes is not None:
            value = self._behind_clipping(value)
        if value not in self._read_a.readings or other not in self._read_b.readings:
            return False
        if value in self.pairs or other in self._taken:
            return False
        self.pairs[value] = other
        self._taken.add(other)
        return True

    def _behind_clipping(self, value: ir.Value) -> ir.Value:
        """Return what codes of a value stand for where they cannot say what a Relu or Clip behind it would cut off."""
        while True:
            readers = [use.node for use in value.uses()]
            if len(readers) != 1 or value.is_graph_output() or not self._index.is_clipped(readers[0]):
                return value
            value = readers[0].outputs[0]

    def by_name(self) -> None:
        """Pair what has the same name; the `Rewriter` gives no name to two values, and leaves those of outputs.

        Outputs come first: codes further up that stand for one, too, say nothing of what lies between.
        """
        others = {value.name: value for value in self._read_b.readings}
        for value in sorted(self._read_a.readings, key=lambda value: not value.is_graph_output()):
            other = others.get(value.name)
            if other is not None and _may_be_same(value, other, loosely=True):
                self._pair(value, other)

    def by_readers(self) -> None:
        """Pair what is read in the same place by nodes of the same name and operator, from the outputs up."""
        counterparts = {node.name: node for node in self._b.graph if node.name}
        same: dict[ir.Node, ir.Node] = {}
        for node in self._a.graph:
            namesake = counterparts.get(node.name) if node.name else None
            if namesake is not None and _same_operator(node, namesake):
                same[node] = namesake
        for node in reversed(list(self._a.graph)):
            if node not in same:
                continue
            open_places = self._open_places(node, same[node])
            # Two that are open in one node may have changed places.
            if len(open_places) != 1 or not _may_be_same(*open_places[0], loosely=False):
                continue
            value, other = open_places[0]
            if self._pair(value, other):
                maker, made = value.producer(), other.producer()
                if maker is not None and made is not None and maker not in same and _same_operator(maker, made):
                    same[maker] = made

    def _open_places(self, node: ir.Node, made: ir.Node) -> list[tuple[ir.Value, ir.Value]]:
        """Return what two nodes read in the same places, where neither side has a counterpart yet."""
        both = [
            (self._read_a.meant(one), self._read_b.meant(two))
            for one, two in zip(node.inputs, made.inputs, strict=True)
            if one is not None and two is not None
        ]
        return [(one, two) for one, two in both if one not in self.pairs and two not in self._taken]

    def by_origin(self) -> None:
        """Pair the last value of what a group of nodes became with the last of the group."""
        for value in self._read_a.readings:
            node = value.producer()
            if value in self.pairs or node is None:
                continue
            # What comes before the last, such as a Reshape of an input, is no counterpart.
            made = max(self._index.made_from(node), key=lambda one: self._order.get(one, -1), default=None)
            if made is None or made.graph is not self._b.graph or not self._is_last_of_group(node, made):
                continue
            other = _same_port(value, node, made)
            if other is not None and _may_be_same(value, other, loosely=False):
                self._pair(value, other)

    def _is_last_of_group(self, node: ir.Node, made: ir.Node) -> bool:
        """Return whether no node that ``made`` stands for, too, comes behind ``node``."""
        group = {one for origin in self._index.of(made) for one in self._by_origin.get(origin, ())}
        if any(self._place[one] > self._place[node] for one in group):
            return False
        # By its name alone, a node may have taken the place of more than the one it is named after.
        readers = {use.node for value in node.outputs for use in value.uses()}
        return made not in self._index.guessed or not any(self._index.is_gone(reader) for reader in readers)


def _same_port(value: ir.Value, node: ir.Node, made: ir.Node) -> ir.Value | None:
    if len(node.outputs) == len(made.outputs):
        return made.outputs[value.index() or 0]
    return made.outputs[0] if len(made.outputs) == 1 and value.index() == 0 else None


def _same_operator(node: ir.Node, other: ir.Node) -> bool:
    return node.op_identifier() == other.op_identifier() and len(node.inputs) == len(other.inputs)


def _may_be_same(value: ir.Value, other: ir.Value, *, loosely: bool) -> bool:
    """Return whether dtypes and shapes let two values be the same: loosely, shapes do not matter.

    The same rows, along one axis or along several, are the same value.
    """
    kinds = [one.dtype.is_floating_point() for one in (value, other) if one.dtype is not None]
    if len(set(kinds)) > 1:
        return False
    first, second = dims_of(value), dims_of(other)
    if loosely or first is None or second is None:
        return True
    if len(first) != len(second):
        return len(first) > 1 and len(second) > 1 and first[-1] == second[-1]
    return all(x == y for x, y in zip(first, second, strict=True) if isinstance(x, int) and isinstance(y, int))


def nodes_up_to(
    values: Iterable[ir.Value], stops: Mapping[ir.Value, object], order: Mapping[ir.Node, int]
) -> tuple[list[ir.Node], list[ir.Value]]:
    """Return the nodes between some values and those that are known, in order, and the known ones they hang on.

    Args:
        values: Where to begin; they are walked up from even where they are known.
        stops: What is known.
        order: Nodes of the main graph with their places.
    """
    found: dict[ir.Node, None] = {}
    known: dict[ir.Value, None] = {}
    stack = [node for value in values if (node := value.producer()) is not None and node in order]
    while stack:
        node = stack.pop()
        if node in found:
            continue
        found[node] = None
        for value in values_read(node):
            if constant_content(value) is not None:
                continue
            if value in stops:
                known[value] = None
            elif (producer := value.producer()) is not None and producer in order:
                stack.append(producer)
    return sorted(found, key=order.__getitem__), list(known)

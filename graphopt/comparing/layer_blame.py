"""Who is to blame for what differs: layers put together of errors, and what was changed on the way to them."""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir as ir

from graphopt import provenance, walk
from graphopt.comparing.layer_errors import Difference, LayerError
from graphopt.comparing.layer_pairs import OriginIndex, nodes_up_to
from graphopt.comparing.layer_values import ReadValues
from graphopt.comparing.node_changes import ChangeFinder
from graphopt.comparing.structural_differences import left_alone
from graphopt.comparison import SQNR_CEILING_DB, OutputError
from graphopt.fragment import constant_content, values_read

# Of how many layers at which a difference begins the changes are looked for, which reads their weights; and how many
# nodes and changes each names.
_EXPLAINED, _NAMED = 16, 8
# Which share of the error of what it is made of a value has at least, if it hands the difference on.
_HANDED_ON = 0.5


class Blame:
    """Makes layers of errors.

    Args:
        a: The first model, shapes inferred.
        b: The second.
        index: Nodes of the second by origin.
        pairs: Values of the first with their counterparts.
        read_a: What was read of the first.
        read_b: What was read of the second.
        errors: What was found, by value of the first; pairs that nothing could be run of are missing.
    """

    def __init__(
        self,
        a: ir.Model,
        b: ir.Model,
        index: OriginIndex,
        pairs: Mapping[ir.Value, ir.Value],
        read_a: ReadValues,
        read_b: ReadValues,
        errors: Mapping[ir.Value, OutputError],
    ) -> None:
        self._a, self._b = a, b
        self._pairs, self._errors = pairs, errors
        self._read_a, self._read_b = read_a, read_b
        self._order_a = {node: place for place, node in enumerate(a.graph)}
        self._order_b = {node: place for place, node in enumerate(b.graph)}
        self._known_a = self._known(read_a, set(errors))
        self._known_b = self._known(read_b, {pairs[value] for value in errors})
        self._index, self._finder = index, ChangeFinder(index, pairs)

    @staticmethod
    def _known(read: ReadValues, compared: set[ir.Value]) -> dict[ir.Value, ir.Value]:
        """Return what was compared, codes and what is read back from them included, each with the value meant."""
        known = {value: value for value in compared}
        return known | {value: meant for value, meant in read.stands_for.items() if meant in compared}

    def left_alone(self) -> list[Difference]:
        """Return nodes that were left as they were, unlike all others like them."""
        return left_alone(self._a, self._finder)

    def layers(self, samples: int, tolerance: float | None) -> list[LayerError]:
        """Return one entry for each value that was compared, in the order of the first model."""
        depths = _depths(self._a)
        differ = {value for value, error in self._errors.items() if not error.within(tolerance)}
        on_the_way = self._on_the_way(differ)
        found: list[LayerError] = []
        explained = 0
        for value in self._read_a.readings:
            error, node = self._errors.get(value), value.producer()
            if error is None or node is None:
                continue
            nodes, hangs_on = self._around(value, self._read_a, self._known_a, self._order_a)
            others, _ = self._around(self._pairs[value], self._read_b, self._known_b, self._order_b)
            sqnr = min((self._errors[one].sqnr_db for one in hangs_on), default=SQNR_CEILING_DB)
            begins = value in on_the_way and not on_the_way.intersection(hangs_on)
            explained += begins
            other = self._pairs[value]
            written_as_codes = self._read_b.readings[other].codes is not None
            there = [node for node in nodes if not (written_as_codes and self._index.is_clipped(node))]
            changes = self._finder.changes(there, others) if begins and explained <= _EXPLAINED else []
            found.append(
                LayerError(
                    origin=_origin(node),
                    name=value.name or "",
                    other=self._read_b.readings[other].asked.name or "",
                    op_type=node.op_type,
                    other_op_type=_operator(other),
                    depth=depths[node],
                    error=error,
                    inputs_sqnr_db=sqnr,
                    nodes=tuple(map(walk.label, nodes[-_NAMED:])),
                    other_nodes=tuple(map(walk.label, others[-_NAMED:])),
                    changes=tuple(change.what for change in changes[:_NAMED]),
                    samples=samples,
                    suspect=changes[0].origin if changes else _origin(node),
                    is_output=value.is_graph_output(),
                    on_the_way=value in on_the_way,
                    begins=begins,
                    tolerance=tolerance,
                )
            )
        return found

    def _around(
        self, value: ir.Value, read: ReadValues, known: Mapping[ir.Value, ir.Value], order: Mapping[ir.Node, int]
    ) -> tuple[list[ir.Node], list[ir.Value]]:
        """Return what lies between a value and those compared before it, and which of them it hangs on."""
        asked = read.readings[value].asked
        nodes, found = nodes_up_to([value], known, order)
        if asked is not value and (quantize := asked.producer()) is not None:
            nodes.append(quantize)
        return nodes, list(dict.fromkeys(known[one] for one in found if known[one] is not value))

    def _on_the_way(self, differ: set[ir.Value]) -> set[ir.Value]:
        """Return the values that differ and from which a difference goes on, past others that do, to an output."""
        found: set[ir.Value] = set()
        stack = [value for value in self._a.graph.outputs if value in differ]
        seen: set[ir.Value] = set(stack)
        while stack:
            value = stack.pop()
            if value in self._errors:
                found.add(value)
            node = value.producer()
            if node is None or node not in self._order_a:
                continue
            for one in values_read(node):
                meant = self._read_a.meant(one)
                if meant in seen or constant_content(meant) is not None:
                    continue
                if meant in differ or meant not in self._errors or self._hands_on(meant, differ):
                    seen.add(meant)
                    stack.append(meant)
        return found

    def _hands_on(self, value: ir.Value, differ: set[ir.Value]) -> bool:
        """Return whether a value has the error of one it is made of, though beside its own peak that looks small.

        A mask of large negative numbers, added to scores, hides how far these are off.
        """
        node, error = value.producer(), self._errors[value].max_abs
        made_of = [self._read_a.meant(one) for one in node.inputs if one is not None] if node is not None else []
        return any(error >= _HANDED_ON * self._errors[one].max_abs for one in made_of if one in differ)


def _depths(model: ir.Model) -> dict[ir.Node, int]:
    """Return the number of nodes on the longest way from an input or a constant to each node."""
    depths: dict[ir.Node, int] = {}
    for node in model.graph:
        before = [
            depths[producer]
            for value in values_read(node)
            if constant_content(value) is None and (producer := value.producer()) in depths and producer is not None
        ]
        depths[node] = max(before, default=-1) + 1
    return depths


def _origin(node: ir.Node) -> str:
    return min(provenance.origins(node), default=walk.label(node))


def _operator(value: ir.Value) -> str:
    producer = value.producer()
    return producer.op_type if producer is not None else ""

"""Classes of elements, against a graph of single elements; and which side of a split is cut."""

from __future__ import annotations

import networkx as nx
import numpy as np
import onnx_ir as ir
import pytest

from graphopt.passes.analyses.axis_classes import ElementClasses, element_classes
from graphopt.passes.analyses.axis_ties import Axis, Emit, Layout, Side, length_of


def axis(length: int, name: str = "v") -> Axis:
    return Axis(ir.Value(name=name, shape=ir.Shape([length]), type=ir.TensorType(ir.DataType.FLOAT)), 0)


def classes_of(components: list[ElementClasses]) -> set[tuple[frozenset[tuple[Axis, int]], bool]]:
    """Return each class as its elements, and whether it stays."""
    found = set()
    for component in components:
        for number, freeze in enumerate(component.frozen):
            members = {
                (one, int(place))
                for one in component.axes
                for place in np.flatnonzero(component.numbers[one] == number)
            }
            found.add((frozenset(members), freeze is not None))
    return found


@pytest.mark.parametrize("seed", range(30))
def test_classes_are_what_hangs_together(seed: int) -> None:
    rng = np.random.default_rng(seed)
    emit, graph = Emit(), nx.Graph()
    axes = [axis(int(rng.integers(2, 6)), f"v{index}") for index in range(8)]
    sizes = {one: length_of(one) or 0 for one in axes}
    held: set[tuple[Axis, int]] = set()
    for one in axes:
        emit.freeze(one, "nothing", [])
        graph.add_nodes_from((one, place) for place in range(sizes[one]))
    for _ in range(int(rng.integers(2, 9))):
        a, b = (axes[index] for index in rng.integers(0, len(axes), 2))
        if sizes[a] == sizes[b] and rng.random() < 0.5:
            emit.tie(a, b)
            pairs = [(place, place) for place in range(sizes[a])]
        else:
            count = int(rng.integers(1, 3))
            pairs = list(zip(rng.integers(0, sizes[a], count), rng.integers(0, sizes[b], count), strict=True))
            emit.tie(a, b, [int(i) for i, _ in pairs], [int(j) for _, j in pairs])
        graph.add_edges_from(((a, int(i)), (b, int(j))) for i, j in pairs)
    for _ in range(2):
        one = axes[int(rng.integers(len(axes)))]
        place = int(rng.integers(sizes[one]))
        emit.freeze(one, "held", [place])
        held.add((one, place))
    expected = set()
    for members in nx.connected_components(graph):
        whole = any({(one, place) for place in range(sizes[one])} <= members for one in axes)
        expected.add((frozenset(members), whole or not held.isdisjoint(members)))
    assert classes_of(element_classes(emit, Layout())) == expected


def test_the_first_reason_counts() -> None:
    emit, a, b = Emit(), axis(3), axis(3)
    emit.freeze(b, "first", [1])
    emit.freeze(a, "second")
    emit.tie(a, b)
    (found,) = element_classes(emit, Layout())
    reasons = [freeze.reason for freeze in found.frozen if freeze is not None]
    assert reasons == ["second", "first", "second"]


def numbers(emit: Emit, wanted: Axis, layout: Layout) -> list[int] | None:
    """Return the classes of an axis, numbered as they occur; None where any stays."""
    for component in element_classes(emit, layout):
        if wanted in component.axes:
            own = component.numbers[wanted].tolist()
            first = {number: index for index, number in enumerate(dict.fromkeys(own))}
            return None if any(component.frozen[number] for number in own) else [first[number] for number in own]
    raise AssertionError("no rule named it")


@pytest.mark.parametrize(
    ("side", "frozen", "expected"),
    [
        (Side.MINOR, None, [0, 1, 2, 0, 1, 2]),
        (Side.MAJOR, None, [0, 0, 0, 1, 1, 1]),
        (Side.MINOR, "inner", [0, 0, 0, 1, 1, 1]),
        (Side.MAJOR, "outer", [0, 1, 2, 0, 1, 2]),
        (Side.MINOR, "whole", None),
    ],
)
def test_one_side_of_a_split_is_cut(side: Side, frozen: str | None, expected: list[int] | None) -> None:
    emit = Emit()
    axes = {"whole": axis(6), "outer": axis(2), "inner": axis(3), "copy": axis(6)}
    emit.split(axes["whole"], [axes["outer"], axis(1), axes["inner"]])
    emit.tie(axes["copy"], axes["whole"])
    if frozen is not None:
        emit.freeze(axes[frozen], "told to")
    layout = Layout(splits=side)
    assert numbers(emit, axes["whole"], layout) == expected
    assert numbers(emit, axes["copy"], layout) == expected
    assert (numbers(emit, axes["outer"], layout) is None) == (expected != [0, 0, 0, 1, 1, 1])
    assert (numbers(emit, axes["inner"], layout) is None) == (expected != [0, 1, 2, 0, 1, 2])


def test_a_part_that_was_cut_is_cut_again() -> None:
    # [6] to [2, 3], swapped, to [6]: the inner part first, the outer part then.
    emit, first, second = Emit(), axis(6), axis(6)
    outer, inner = axis(2), axis(3)
    emit.split(first, [outer, inner])
    emit.split(second, [inner, outer])
    assert numbers(emit, first, Layout()) == [0, 1, 2, 0, 1, 2]
    assert numbers(emit, second, Layout()) == [0, 0, 1, 1, 2, 2]
    assert numbers(emit, second, Layout(splits=Side.MAJOR)) == [0, 1, 0, 1, 0, 1]


def test_parts_of_unknown_size_hold_the_others() -> None:
    emit, whole, part = Emit(), axis(6), axis(3)
    unknown = Axis(ir.Value(name="u", shape=ir.Shape([None]), type=ir.TensorType(ir.DataType.FLOAT)), 0)
    emit.split(whole, [unknown, part])
    assert numbers(emit, whole, Layout()) is None
    assert numbers(emit, part, Layout()) is None


def test_ties_that_do_not_fit_hold_both() -> None:
    emit, short, long = Emit(), axis(2), axis(3)
    emit.tie(short, long)
    assert numbers(emit, short, Layout()) is None
    assert numbers(emit, long, Layout()) is None

"""Views in a row: Reshape, Flatten, Squeeze, Unsqueeze, and Transpose where it moves nothing but axes of size 1."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from graphopt import shapes, walk
from graphopt.dims import Size, at_least
from graphopt.pattern import Match, Miss, Rule

from .arguments import REDUCTIONS, axes_of, has_axes, integers, over_axes, rank_of
from .bypass import bypass

VIEWS = ("Flatten", "Reshape", "Squeeze", "Transpose", "Unsqueeze")
PICKS = ("ArgMax", "ArgMin")


def view_rules() -> Sequence[Rule]:
    """Return one rule per kind of chain; those that need to know the least come first."""
    return (
        Unsqueezes(),
        Squeezes(),
        SqueezedUnsqueeze(),
        UnsqueezedSqueeze(),
        *(UnsqueezedReduction(op_type) for op_type in (*REDUCTIONS, *PICKS)),
        *(ReshapedReduction(op_type) for op_type in (*REDUCTIONS, *PICKS)),
        *(InverseViews(op_type) for op_type in VIEWS),
        *(Views(op_type) for op_type in VIEWS),
    )


class Unsqueezes(Rule):
    """Unsqueeze(Unsqueeze(x, a), b) = Unsqueeze(x, b and a moved behind it)."""

    name = "unsqueezes"

    def pattern(self, op: Any, x: Any, a: Any = None, b: Any = None) -> Any:
        return op.Unsqueeze(op.Unsqueeze(x, a, _id="first"), b)

    def applies(self, m: Match) -> bool:
        return self._axes(m) is not None

    def rewrite(self, op: Any, m: Match) -> Any:
        axes = self._axes(m)
        assert axes is not None, "it applies"
        return over_axes(op, "Unsqueeze", m.x, axes, m.root)

    def _axes(self, m: Match) -> list[int] | None:
        first, second = _new_axes(m.first, m.x), _new_axes(m.root, m.first.outputs[0])
        if first is None or second is None:
            return None
        # The axes that are free of the second are the axes of its input, in order.
        free = [axis for axis in range(max((0, *first)) + len(second) + 1) if axis not in second]
        return sorted([*second, *(free[axis] for axis in first)])


def _new_axes(unsqueeze: ir.Node, x: ir.Value) -> tuple[int, ...] | None:
    """Return the axes of an Unsqueeze, from 0 up, or None where they are unknown."""
    rank = rank_of(x)
    raw = integers(unsqueeze.inputs[1]) if len(unsqueeze.inputs) > 1 else unsqueeze.attributes.get_ints("axes")
    return None if raw is None else axes_of(unsqueeze, None if rank is None else rank + len(raw))


class Squeezes(Rule):
    """Squeeze(Squeeze(x, a), b) = Squeeze(x, a and b counted over x)."""

    name = "squeezes"

    def pattern(self, op: Any, x: Any, a: Any = None, b: Any = None) -> Any:
        return op.Squeeze(op.Squeeze(x, a, _id="first"), b)

    def applies(self, m: Match) -> bool:
        return self._axes(m) is not None

    def rewrite(self, op: Any, m: Match) -> Any:
        axes = self._axes(m)
        assert axes is not None, "it applies"
        return over_axes(op, "Squeeze", m.x, axes, m.root)

    def _axes(self, m: Match) -> list[int] | None:
        rank = rank_of(m.x)
        first = axes_of(m.first, rank)
        second = axes_of(m.root, None if rank is None or first is None else rank - len(first))
        if not first or not second:
            return None
        left = [axis for axis in range(max(*first, *second) + len(first) + 1) if axis not in first]
        return sorted([*first, *(left[axis] for axis in second)])


class SqueezedUnsqueeze(Rule):
    """Squeeze(Unsqueeze(x, a), b) = x, or what is left of one of them, where one has all axes of the other."""

    name = "squeezed-unsqueeze"

    def pattern(self, op: Any, x: Any, a: Any = None, b: Any = None) -> Any:
        return op.Squeeze(op.Unsqueeze(x, a, _id="first"), b)

    def applies(self, m: Match) -> bool:
        axes = self._axes(m)
        return axes is not None and (axes[0] <= axes[1] or axes[1] <= axes[0])

    def rewrite(self, op: Any, m: Match) -> Any:
        axes = self._axes(m)
        assert axes is not None, "it applies"
        added, removed = axes
        if added == removed:
            return bypass(m)
        if added < removed:
            # Counted over x, which does not have the axes that came and go.
            left = [axis - sum(other < axis for other in added) for axis in sorted(removed - added)]
            return over_axes(op, "Squeeze", m.x, left, m.root)
        left = [axis - sum(other < axis for other in removed) for axis in sorted(added - removed)]
        return over_axes(op, "Unsqueeze", m.x, left, m.root)

    def _axes(self, m: Match) -> tuple[set[int], set[int]] | None:
        added = _new_axes(m.first, m.x)
        rank = rank_of(m.x)
        removed = axes_of(m.root, None if rank is None or added is None else rank + len(added))
        return (set(added), set(removed)) if added and removed else None


class UnsqueezedSqueeze(Rule):
    """Unsqueeze(Squeeze(x, a), a) = x: the axes squeezed had size 1."""

    name = "unsqueezed-squeeze"
    inner_may_be_read = True

    def pattern(self, op: Any, x: Any, a: Any = None, b: Any = None) -> Any:
        return op.Unsqueeze(op.Squeeze(x, a, _id="first"), b)

    def applies(self, m: Match) -> bool:
        rank = rank_of(m.x)
        squeezed = axes_of(m.first, rank)
        # Without any, the same axes are counted over the same rank.
        added = axes_of(m.root, rank)
        return bool(squeezed) and added is not None and set(squeezed or ()) == set(added)

    def rewrite(self, op: Any, m: Match) -> Any:
        return bypass(m)


class UnsqueezedReduction(Rule):
    """Unsqueeze(Reduce(x, axes), axes) = Reduce(x, axes, keepdims=1)."""

    name = "unsqueezed-reduction"

    def __init__(self, op_type: str) -> None:
        self._op_type = op_type

    def pattern(self, op: Any, x: Any, axes: Any = None, b: Any = None) -> Any:
        return op.Unsqueeze(getattr(op, self._op_type)(x, axes, _id="reduce", keepdims=0), b)

    def applies(self, m: Match) -> bool:
        rank = rank_of(m.x)
        reduced, added = _reduced(m.reduce, rank), axes_of(m.root, rank)
        return bool(reduced) and added is not None and set(reduced or ()) == set(added)

    def rewrite(self, op: Any, m: Match) -> Any:
        attributes = {**m.reduce.attributes, "keepdims": 1}
        return getattr(op, self._op_type)(*m.reduce.inputs, _name=m.reduce.name, **attributes)


def _reduced(reduction: ir.Node, rank: int | None) -> tuple[int, ...] | None:
    """Return the axes a reduction or pick goes over, from 0 up; None where unknown, or all of them by default."""
    if reduction.op_type in PICKS:
        axis = reduction.attributes.get_int("axis", 0)
        return (axis % rank,) if rank else (axis,) if axis >= 0 else None
    return axes_of(reduction, rank) if has_axes(reduction) else None


class ReshapedReduction(Rule):
    """Reshape(Reduce(x, axes), shape of x with 1 along the axes) = Reduce(x, axes, keepdims=1)."""

    name = "reshaped-reduction"

    def __init__(self, op_type: str) -> None:
        self._op_type = op_type

    def pattern(self, op: Any, x: Any, shape: Any, axes: Any = None) -> Any:
        return op.Reshape(getattr(op, self._op_type)(x, axes, _id="reduce", keepdims=0), shape)

    def applies(self, m: Match) -> bool:
        dims = shapes.dims_of(m.x)
        reduced = _reduced(m.reduce, len(dims)) if dims is not None else None
        if dims is None or not reduced:
            return False
        kept = tuple(1 if axis in reduced else size for axis, size in enumerate(dims))
        return shapes.dims_of(m.root.outputs[0]) == kept

    def rewrite(self, op: Any, m: Match) -> Any:
        attributes = {**m.reduce.attributes, "keepdims": 1}
        return getattr(op, self._op_type)(*m.reduce.inputs, _name=m.reduce.name, **attributes)


class InverseViews(Rule):
    """View(View(x)) = x where the shape of x comes out: views keep the elements in order."""

    name = "inverse-views"
    inner_may_be_read = True

    def __init__(self, op_type: str) -> None:
        self._op_type = op_type

    def pattern(self, op: Any) -> Any:
        return getattr(op, self._op_type)(...)

    def applies(self, m: Match) -> bool:
        first = _view_before(m.root)
        if first is None or not shapes.same_shape(first.inputs[0], m.root.outputs[0]):
            return False
        m.include([first])
        return True

    def rewrite(self, op: Any, m: Match) -> Any:
        first = _view_before(m.root)
        assert first is not None, "it applies"
        return bypass(m, first.inputs[0])


class Views(Rule):
    """View(View(x)) = Reshape(x, shape) where numbers, copied axes and one computed axis can tell the shape."""

    name = "views"

    def __init__(self, op_type: str) -> None:
        self._op_type = op_type

    def pattern(self, op: Any) -> Any:
        return getattr(op, self._op_type)(...)

    def applies(self, m: Match) -> bool:
        first = _view_before(m.root)
        if first is None:
            return False
        m.include([first])
        return True

    def check(self, m: Match) -> Miss | None:
        first = _view_before(m.root)
        assert first is not None, "it applies"
        return None if _direct(first, m.root) is not None else Miss("no constant tells its shape", m.root)

    def rewrite(self, op: Any, m: Match) -> Any:
        first = _view_before(m.root)
        assert first is not None, "it applies"
        sizes = _direct(first, m.root)
        assert sizes is not None, "checked"
        if m.root.op_type == "Reshape" and integers(m.root.inputs[1]) == tuple(sizes):
            return op.like(m.root, first.inputs[0], m.root.inputs[1])
        return op.Reshape(first.inputs[0], op.const(np.array(sizes, np.int64), f"{m.root.name or 'view'}_shape"))


def _view_before(root: ir.Node) -> ir.Node | None:
    """Return the view that feeds a view, or None; two Transposes are another matter."""
    if not _is_view(root):
        return None
    first = root.inputs[0].producer() if root.inputs and root.inputs[0] is not None else None
    if first is None or first.graph is not root.graph or walk.has_references(first) or not _is_view(first):
        return None
    return None if first.op_type == root.op_type == "Transpose" else first


def _is_view(node: ir.Node) -> bool:
    """Return whether an operator keeps the elements of its input in order."""
    if not walk.is_onnx_op(node, *VIEWS) or node.inputs[0] is None:
        return False
    if node.op_type != "Transpose":
        return True
    dims, perm = shapes.dims_of(node.inputs[0]), node.attributes.get_ints("perm")
    if dims is None:
        return False
    moved = [axis for axis in (perm if perm is not None else range(len(dims))[::-1]) if dims[axis] != 1]
    return moved == sorted(moved)


def _direct(first: ir.Node, root: ir.Node) -> list[int] | None:
    """Return what a Reshape in place of two views would be told, or None where no constant can say it."""
    told = integers(root.inputs[1]) if root.op_type == "Reshape" else None
    if told is not None and 0 not in told:
        return list(told)
    source, result = shapes.dims_of(first.inputs[0]), shapes.dims_of(root.outputs[0])
    if source is None or result is None or 0 in result:
        return None
    sizes = [_told(index, size, source) for index, size in enumerate(result)]
    computed = [index for index, size in enumerate(sizes) if size is None]
    copied = {size for index, size in enumerate(result) if sizes[index] == 0 and not at_least(size, 1)}
    if len(computed) > 1:
        return None
    # An axis is computed by dividing by the others: a copied one that is 0 at run time would be refused. It must have
    # been refused before.
    if computed and not copied <= _never_zero(first) | _never_zero(root):
        return None
    return [-1 if size is None else size for size in sizes]


def _told(index: int, size: Size, source: Sequence[Size]) -> int | None:
    """Return the size of an axis, 0 if it copies that of the source; None if it can be neither told nor copied."""
    if isinstance(size, int):
        return size
    return 0 if index < len(source) and source[index] == size else None


def _never_zero(view: ir.Node) -> set[Size]:
    """Return the symbolic sizes that a Reshape refuses to be 0, as it copies them and computes another one."""
    told = integers(view.inputs[1]) if view.op_type == "Reshape" else None
    dims = shapes.dims_of(view.inputs[0])
    if told is None or -1 not in told or dims is None or view.attributes.get_int("allowzero", 0) != 0:
        return set()
    return {dims[index] for index, size in enumerate(told) if size == 0 and index < len(dims)}

"""Motifs in which operators undo, repeat or swallow one another: casts, bounds, cuts and joins, loops and branches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import onnx
from onnx import TensorProto

if TYPE_CHECKING:
    from .graph_generator import Builder, Value

FLOAT, FLOAT16, DOUBLE = TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.DOUBLE
INT32, INT64, BOOL = TensorProto.INT32, TensorProto.INT64, TensorProto.BOOL


def cast_around(b: Builder) -> Value:
    """Something computed in another type, between two casts, one of which may not be needed."""
    x = b.pick(b.rng.choice((FLOAT, FLOAT, FLOAT16, DOUBLE)))
    inner = b.rng.choice((FLOAT, FLOAT16, DOUBLE))
    y = b.op(b.rng.choice(("Neg", "Abs", "Relu", "Sqrt", "Tanh")), _positive(b, b.op("Cast", x, to=inner)))
    y = b.op("Cast", y, to=b.rng.choice((FLOAT, FLOAT, x.dtype)))
    if b.opset >= 15 and b.chance(0.4):
        y = b.op("CastLike", y, b.weight(dtype=b.rng.choice((FLOAT, DOUBLE))))
    return b.op("Neg", y)


def cast_integers(b: Builder) -> Value:
    """Whole numbers cast to narrower and wider types and back, and compared or counted with on the way."""
    x = b.pick(INT64)
    for dtype in b.rng.choice(((INT32, INT64), (FLOAT, INT64), (INT32, FLOAT), (BOOL, INT64), (DOUBLE, FLOAT))):
        x = b.op("Cast", x, to=dtype)
    if x.dtype == INT64 and b.opset >= 11:
        x = b.op("Where", b.op("Equal", x, b.ints(0)), b.ints(1), x)
    return b.op("Neg", x)


def bounds_chain(b: Builder) -> Value:
    """Clip, Relu, Max and Min by constants in a row: overlapping, disjoint, or the wrong way round."""
    x = b.pick(FLOAT if b.opset < 12 else b.rng.choice((FLOAT, FLOAT, FLOAT16, DOUBLE)))
    dtype = onnx.helper.tensor_dtype_to_np_dtype(x.dtype)
    for _ in range(b.rng.randint(2, 4)):
        low, high = b.rng.choice(((0.0, 6.0), (-1.0, 1.0), (-2.0, 0.0), (2.0, 1.0), (0.5, 0.5), (-0.0, 3.0)))
        match b.rng.choice(("Relu", "Clip", "Clip", "Max", "Min")):
            case "Relu":
                x = b.op("Relu", x)
            case "Clip" if b.opset < 11:
                x = b.op("Clip", x, min=min(low, high), max=max(low, high))  # ONNX Runtime refuses the other
            case "Clip":
                low_value = None if b.chance(0.2) else b.const(np.array(low, dtype))
                rest = [] if low_value and b.chance(0.2) else [b.const(np.array(high, dtype))]
                x = b.op("Clip", x, low_value, *rest, bound=max(x.bound, 6.0))
            case op:
                shape = b.rng.choice(((), (1,)))
                number = b.const(np.full(shape, low if op == "Max" else high, dtype))
                x = b.op(str(op), *((x, number) if b.chance(0.7) else (number, x)), bound=max(x.bound, 6.0))
    return x


def cuts_and_joins(b: Builder) -> Value:
    """Neighbouring slices joined again, slices of slices, slices and Gathers of what was joined, in or out of order."""
    x = _wide(b)
    axis = b.rng.choice((-1, len(x.shape) - 1)) if b.opset >= 11 else len(x.shape) - 1
    match b.rng.choice(("joined", "joined", "nested", "of_concat", "stacked")):
        case "joined":
            cut = b.rng.randint(1, 3)
            parts = [_slice(b, x, 0, cut, axis), _slice(b, x, cut, b.rng.choice((4, 2**31 - 1)), axis)]
            parts = parts[::-1] if b.chance(0.3) else parts
            parts = [parts[0], b.op("Relu", parts[1])] if b.chance(0.2) else parts
            return b.op("Concat", *parts, axis=axis)
        case "nested":
            y = _slice(b, x, *b.rng.choice(((0, 3), (1, 4), (-3, 2**31 - 1), (0, 4))), axis)
            if b.chance(0.3):
                y = b.op("Slice", y, b.ints([-1]), b.ints([-(2**31)]), b.ints([axis]), b.ints([-1]))
            if len(y.shape) > 1 and isinstance(y.shape[0], int) and b.chance(0.3):
                return _slice(b, y, 0, 1, 0)
            return _slice(b, y, *b.rng.choice(((0, 2), (1, 3), (-1, 2**31 - 1))), axis)
        case "of_concat":
            joined = b.op("Concat", x, b.op("Neg", x), axis=axis)
            if b.chance(0.3):
                return b.op("Gather", joined, b.ints(b.rng.choice((0, [1, 5], [-1, 0]))), axis=len(x.shape) - 1)
            return _slice(b, joined, *b.rng.choice(((0, 4), (4, 8), (2, 6), (1, 3))), axis)
    rows = [_unsqueeze(b, _slice(b, x, i, i + 1, axis)) for i in (0, 1)]
    return b.op("Concat", *rows, axis=0)


def split_and_join(b: Builder) -> Sequence[Value] | Value:
    """Split in two, three or four, its parts joined in order, swapped, or with one left out."""
    x = _wide(b)
    axis = len(x.shape) - 1
    sizes = b.rng.choice(([2, 2], [1, 3], [1, 1, 2], [1, 1, 1, 1]))
    wanted = [True] * len(sizes)
    if b.opset >= 18 and len(set(sizes)) == 1 and b.chance(0.5):
        parts = b.ops("Split", [x], wanted, axis=axis, num_outputs=len(sizes))
    elif b.opset >= 13:
        parts = b.ops("Split", [x, b.ints(sizes)], wanted, axis=axis)
    else:
        parts = b.ops("Split", [x], wanted, axis=axis, split=sizes)
    match b.rng.choice(("in order", "swapped", "some", "apart")):
        case "in order":
            return b.op("Concat", *parts, axis=axis)
        case "swapped":
            return b.op("Concat", *reversed(parts), axis=axis)
        case "some":
            return b.op("Mul", parts[0], b.op("Sigmoid", parts[0]))
    return parts


def loop_invariant(b: Builder) -> Sequence[Value]:
    """A Loop whose body computes from constants and captures alone what it might as well be given."""
    x = b.pick()
    body = b.child()
    body.formal(_type(INT64, ()))
    go = body.formal(_type(BOOL, ()))
    state = body.formal(x.type, max(1.0, x.bound))
    fixed = body.op("Mul", body.op("Tanh", x), body.weight())
    if b.chance(0.4):
        fixed = body.op("Add", fixed, body.op("Sqrt", body.op("Abs", body.weight())), bound=3.0)
    y = body.op("Tanh", body.op("Add", state, fixed))
    more = body.op("Identity", go) if b.chance(0.5) else body.const(np.array(b.chance(0.5)))
    if more.data is not None and all(more.name not in node.output for node in body.nodes):
        more = body.op("Identity", more)
    outputs = [more, y, *([body.op("Identity", fixed)] if b.depth == 0 and b.chance(0.5) else [])]
    trips = b.rng.choice((lambda: b.ints(b.rng.choice((0, 1, 1, 2))), lambda: b.new_input(INT64, ())))()
    start = b.rng.choice((None, b.const(np.array(b.chance(0.8)))))
    types = [x.type, *([_type(x.dtype, (None, *x.shape))] if len(outputs) == 3 else [])]
    graph = body.graph(body.name("body"), outputs)
    return b.ops("Loop", [trips, start, x], [True] * len(types), types=types, body=graph)


def branches_alike(b: Builder) -> Value:
    """An If both of whose branches do the same, capture the same, or only pass a value on."""
    x, condition = b.pick(), b.pick(BOOL, 0)
    graphs, form = [], b.rng.choice(("same", "prefix", "pass"))
    weight = b.root.initializer(np.array(0.5, np.float32))
    for place in range(2):
        branch = b.child()
        y = branch.op("Mul", x, weight) if form != "pass" else branch.op("Identity", x)
        y = branch.op("Relu" if place else "Abs", y) if form == "prefix" or (form == "pass" and place) else y
        graphs.append(branch.graph(b.name("branch"), [y]))
    return b.op("If", condition, types=[x.type], bound=x.bound, then_branch=graphs[0], else_branch=graphs[1])


def index_chain(b: Builder) -> Value:
    """Squeeze, Unsqueeze and Reshape around Gather, and ArgMax or TopK of it, as heads of classifiers have."""
    x = _wide(b)
    if b.chance(0.4):
        return b.op("Cast", b.op("ArgMax", x, axis=len(x.shape) - 1, keepdims=int(b.chance(0.5))), to=FLOAT, bound=4.0)
    one = b.op("Gather", x, b.ints(b.rng.choice((0, -1))), axis=len(x.shape) - 1)
    row = _unsqueeze(b, one)
    if b.opset >= 13:
        return b.op("Squeeze", row, b.ints([0])) if b.chance(0.5) else row
    return b.op("Squeeze", row, axes=[0]) if b.chance(0.5) else row


# Parts


def _type(dtype: int, shape: Sequence[int | str | None]) -> onnx.TypeProto:
    return onnx.helper.make_tensor_type_proto(dtype, shape)


def _wide(b: Builder) -> Value:
    """Return a value whose last axis has four elements."""
    return b.pick(where=lambda s: len(s) > 0 and s[-1] == 4, fresh=("batch", "seq", 4))


def _slice(b: Builder, x: Value, start: int, stop: int, axis: int) -> Value:
    return b.op("Slice", x, b.ints([start]), b.ints([stop]), b.ints([axis]))


def _positive(b: Builder, x: Value) -> Value:
    return b.op("Abs", x)


def _unsqueeze(b: Builder, x: Value) -> Value:
    return b.op("Unsqueeze", x, b.ints([0])) if b.opset >= 13 else b.op("Unsqueeze", x, axes=[0])

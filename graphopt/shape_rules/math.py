"""Shapes and small integer contents of arithmetic: elementwise operators, reductions, products of matrices."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import numpy as np
import onnx_ir as ir

from graphopt import dims as d
from graphopt.dims import Size
from graphopt.shape_rules.shape_facts import (
    CONTENT_RANGES,
    CONTENTS_LIMIT,
    Call,
    Contents,
    Contradiction,
    Dims,
    Rule,
    axis_of,
)

# Broadcasting


def broadcast(*shapes: Dims | None) -> Dims | None:
    """Return what shapes broadcast to, or None where one of them is not known.

    Raises:
        Contradiction: They do not.
    """
    known = [shape for shape in shapes if shape is not None]
    if len(known) < len(shapes) or not known:
        return None
    result = known[0]
    for shape in known[1:]:
        if shape != result:
            result = _broadcast_two(result, shape)
    return result


def _broadcast_two(a: Dims, b: Dims) -> Dims:
    if len(a) < len(b):
        a, b = b, a
    extra = len(a) - len(b)
    result = list(a[:extra])
    for one, other in zip(a[extra:], b, strict=True):
        dim = one if one is other else d.joined(one, other)
        if dim is None:
            raise Contradiction(f"[{_text(a)}] and [{_text(b)}] do not broadcast")
        result.append(dim)
    return tuple(result)


def _text(dims: Dims) -> str:
    return ", ".join(map(str, dims))


# Elementwise


def unary(call: Call) -> None:
    """The shape of its first input."""
    call.give(call.dims())


def elementwise(call: Call) -> None:
    """What its inputs broadcast to."""
    if call.integer("broadcast"):  # before opset 7: the second input fits the first, along `axis`
        call.give(call.dims())
        return
    call.give(broadcast(*(call.dims(i) for i in range(len(call.inputs)))), contents=_computed(call))


def unary_with_contents(call: Call) -> None:
    """The shape of its input; integers are followed."""
    call.give(call.dims(), contents=_computed(call))


def _computed(call: Call) -> Contents | None:
    """Return an elementwise operator applied to the contents of its inputs, or None where one of them is not known."""
    function = _FUNCTIONS.get(call.node.op_type)
    if function is None or call.dtype() not in CONTENT_RANGES or len(call.inputs) > 8:
        return None
    operands = []
    for index in range(len(call.inputs)):
        contents = call.contents(index)
        if contents is None:
            return None
        operands.append(contents.array)
    result_type = ir.DataType.BOOL if call.node.op_type in _COMPARISONS else call.dtype(len(call.inputs) - 1)
    result = operands[0]
    if len(operands) == 1:
        result = applied(lambda a: function(call, a, 0), result)
    for operand in operands[1:]:
        result = applied(lambda a, b: function(call, a, b), result, operand)
    return within_range(Contents(result), result_type)


def applied(function: Callable[..., Size], *operands: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Return a function of sizes applied to each element of arrays that broadcast."""
    result = np.frompyfunc(function, len(operands), 1)(*operands)
    if isinstance(result, np.ndarray):
        return result
    scalar = np.empty((), dtype=object)
    scalar[()] = result
    return scalar


def within_range(contents: Contents, dtype: ir.DataType | None) -> Contents | None:
    """Return contents, or None where a number does not fit the dtype, and a runtime would wrap it around."""
    if dtype is None or dtype not in CONTENT_RANGES or contents.array.size > CONTENTS_LIMIT:
        return None
    low, high = CONTENT_RANGES[dtype]
    fits = all(low <= entry <= high for entry in contents.entries if isinstance(entry, int))
    return contents if fits else None


def divided(a: Size, b: Size) -> Size:
    """Return the quotient as ONNX divides integers: rounded toward zero.

    Raises:
        ArithmeticError: The divisor is zero.
    """
    if b == 0:
        raise ZeroDivisionError
    if isinstance(a, int) and isinstance(b, int):
        quotient = abs(a) // abs(b)
        return quotient if (a < 0) == (b < 0) else -quotient
    exact = d.divide_exactly(a, b)
    if exact is not None:
        return exact
    if d.at_least(a, 0) and d.at_least(b, 0):
        return d.floordiv(a, b)
    return d.operation("quotient", (a, b))


def _remainder(call: Call, a: Size, b: Size) -> Size:
    if b == 0:
        raise ZeroDivisionError
    if not call.integer("fmod") or (d.at_least(a, 0) and d.at_least(b, 0)):
        return d.mod(a, b)
    if isinstance(a, int) and isinstance(b, int):
        rest = abs(a) % abs(b)
        return rest if a >= 0 else -rest
    return d.operation("remainder", (a, b))


def _magnitude(a: Size) -> Size:
    return a if d.at_least(a, 0) else d.maximum(a, -a)


def _sign(a: Size) -> Size:
    return d.less(0, a) - d.less(a, 0)


def _either(a: Size, b: Size) -> Size:
    return a if a == b else a + b - a * b


def _both(a: Size, b: Size) -> Size:
    return a if a == b else a * b


def _differ(a: Size, b: Size) -> Size:
    return a + b - 2 * (a * b)


_FUNCTIONS: Mapping[str, Callable[[Call, Size, Size], Size]] = MappingProxyType(
    {
        "Add": lambda _, a, b: a + b,
        "Sum": lambda _, a, b: a + b,
        "Sub": lambda _, a, b: a - b,
        "Mul": lambda _, a, b: a * b,
        "Div": lambda _, a, b: divided(a, b),
        "Mod": _remainder,
        "Min": lambda _, a, b: d.minimum(a, b),
        "Max": lambda _, a, b: d.maximum(a, b),
        "Neg": lambda _, a, __: -a,
        "Abs": lambda _, a, __: _magnitude(a),
        "Sign": lambda _, a, __: _sign(a),
        "Not": lambda _, a, __: 1 - a,
        "And": lambda _, a, b: _both(a, b),
        "Or": lambda _, a, b: _either(a, b),
        "Xor": lambda _, a, b: _differ(a, b),
        "Equal": lambda _, a, b: d.equal(a, b),
        "Less": lambda _, a, b: d.less(a, b),
        "Greater": lambda _, a, b: d.less(b, a),
        "LessOrEqual": lambda _, a, b: 1 - d.less(b, a),
        "GreaterOrEqual": lambda _, a, b: 1 - d.less(a, b),
    }
)
_COMPARISONS = frozenset({"Equal", "Less", "Greater", "LessOrEqual", "GreaterOrEqual", "And", "Or", "Xor", "Not"})


def where(call: Call) -> None:
    """Three inputs that broadcast; a condition that is known chooses."""
    dims = broadcast(call.dims(0), call.dims(1), call.dims(2))
    condition, first, second = (call.contents(i) for i in range(3))
    contents = None
    if condition is not None and first is not None and second is not None:
        contents = Contents(applied(d.choose, condition.array, first.array, second.array))
    call.give(dims, call.dtype(1), within_range(contents, call.dtype(1)) if contents is not None else None)


def clip(call: Call) -> None:
    """The shape of its input, of bounds that are numbers."""
    contents = call.contents(0) if call.opset >= 11 else None
    for index, function in ((1, d.maximum), (2, d.minimum)):
        limit = call.sizes(index) if call.has(index) else None
        if contents is None or (call.has(index) and (limit is None or len(limit) != 1)):
            contents = None
        elif limit is not None:
            contents = Contents(applied(lambda a, f=function, b=limit[0]: f(a, b), contents.array))
    call.give(call.dims(), contents=contents)


def cast(call: Call) -> None:
    """The dtype `to`; integers stay what they are where they fit."""
    to = ir.DataType(call.integer("to"))
    contents = _whole(call) if to in CONTENT_RANGES else None
    if contents is not None and to is ir.DataType.BOOL and call.dtype() is not to:
        contents = Contents(applied(lambda a: 1 - d.equal(a, 0), contents.array))
    call.give(call.dims(), to, within_range(contents, to) if contents is not None else None)


def cast_like(call: Call) -> None:
    """The dtype of its second input."""
    to = call.dtype(1)
    contents = _whole(call) if to is ir.DataType.INT64 or to is call.dtype() else None
    call.give(call.dims(), to, within_range(contents, to) if contents is not None else None)


def _whole(call: Call) -> Contents | None:
    """Return the contents of the first input, also where it is a float constant of whole numbers."""
    if call.dtype() in CONTENT_RANGES:
        return call.contents(0)
    array = call.constant(0)
    if (
        array is None
        or array.dtype.kind != "f"
        or not np.all(np.abs(array) < 2**24)
        or np.any(array != np.trunc(array))
    ):
        return None
    return Contents(array.astype(np.int64).astype(object))


def cumulative_sum(call: Call) -> None:
    """The shape of its input."""
    contents, axis = call.contents(0), call.numbers(1)
    result = None
    if contents is not None and len(contents.shape) == 1 and axis == (0,):
        step, array = (-1 if call.integer("reverse") else 1), contents.array
        sums = np.add.accumulate(array[::step])
        if call.integer("exclusive"):
            sums = np.concatenate([np.zeros(1, dtype=object), sums[:-1]])[: len(array)]
        result = within_range(Contents(sums[::step]), call.dtype())
    call.give(call.dims(), contents=result)


# Reductions


def reduced_axes(call: Call) -> tuple[int, ...] | None:
    """Return the axes a reduction runs over, from the front, or None where they are not known."""
    dims, axes = call.dims(), call.integers("axes")
    if dims is None:
        return None
    if axes is None and call.has(1):
        axes = call.numbers(1)
        if axes is None:
            return None
    if not axes:
        return () if call.integer("noop_with_empty_axes") else tuple(range(len(dims)))
    return tuple(axis_of(axis, len(dims)) for axis in axes)


def reduction(call: Call) -> None:
    """Its axes gone, or 1."""
    dims, axes, keep = call.dims(), reduced_axes(call), call.integer("keepdims", 1)
    if dims is None:
        return call.give(None)
    if axes is None:
        return call.give([None] * len(dims) if keep else None)
    kept = [1 if axis in axes else dim for axis, dim in enumerate(dims) if keep or axis not in axes]
    return call.give(kept, contents=_reduced(call, axes))


def _reduced(call: Call, axes: tuple[int, ...]) -> Contents | None:
    function = _REDUCTIONS.get(call.node.op_type)
    if function is None or call.dtype() not in CONTENT_RANGES:
        return None
    contents = call.contents(0)
    if contents is None or len(contents.shape) != 1 or axes != (0,) or not contents.entries:
        return None
    total = contents.entries[0]
    for entry in contents.entries[1:]:
        total = function(total, entry)
    shape = (1,) if call.integer("keepdims", 1) else ()
    return within_range(Contents.of([total], shape), call.dtype())


_REDUCTIONS: Mapping[str, Callable[[Size, Size], Size]] = MappingProxyType(
    {
        "ReduceSum": lambda a, b: a + b,
        "ReduceProd": lambda a, b: a * b,
        "ReduceMin": d.minimum,
        "ReduceMax": d.maximum,
    }
)


def arg_extreme(call: Call) -> None:
    """One axis gone, or 1."""
    dims = call.dims()
    if dims is None:
        return call.give(None)
    axis = axis_of(call.integer("axis"), len(dims))
    middle = (1,) if call.integer("keepdims", 1) else ()
    return call.give([*dims[:axis], *middle, *dims[axis + 1 :]])


# Products of matrices


def matmul(call: Call, first: int = 0, second: int = 1, dtype: ir.DataType | None = None) -> None:
    """Rows of the first, columns of the second, leading axes broadcast."""
    a, b = call.dims(first), call.dims(second)
    call.give(product_of_matrices(a, b), dtype)


def product_of_matrices(a: Dims | None, b: Dims | None) -> Dims | None:
    """Return the shape of a matrix product by NumPy's rules, or None.

    Raises:
        Contradiction: The inner dimensions differ.
    """
    if a is None or b is None:
        return None
    if not a or not b:
        raise Contradiction("a scalar is no matrix")
    inner = b[-2] if len(b) > 1 else b[0]
    if d.differ(a[-1], inner):
        raise Contradiction(f"inner dimensions {a[-1]} and {inner} differ")
    batch = broadcast(a[:-2], b[:-2])
    rows, columns = (a[-2:-1] if len(a) > 1 else ()), (b[-1:] if len(b) > 1 else ())
    return (*(batch or ()), *rows, *columns)


def quantized_matmul(call: Call) -> None:
    """A matrix product with a scale and zero point behind each matrix."""
    matmul(call, 0, 3, call.dtype(7))


def gemm(call: Call) -> None:
    """Rows of A, columns of B, either transposed on request."""
    a, b = call.dims(0), call.dims(1)
    trans_a, trans_b = call.integer("transA"), call.integer("transB")
    rows, inner = (None, None) if a is None or len(a) != 2 else (a[1], a[0]) if trans_a else (a[0], a[1])
    deep, columns = (None, None) if b is None or len(b) != 2 else (b[1], b[0]) if trans_b else (b[0], b[1])
    if inner is not None and deep is not None and d.differ(inner, deep):
        raise Contradiction(f"inner dimensions {inner} and {deep} differ")
    call.give([rows, columns])


def einsum(call: Call) -> None:
    """The equation's letters, and whatever its dots stand for."""
    equation = call.text("equation").replace(" ", "")
    left, arrow, right = equation.partition("->")
    sizes: dict[str, Size] = {}
    dots: Dims = ()
    for index, term in enumerate(left.split(",")):
        dims = call.dims(index)
        if dims is None:
            return call.give(None)
        head, ellipsis, tail = term.partition("...")
        hidden = len(dims) - len(head) - len(tail)
        if hidden < 0 or (hidden and not ellipsis):
            raise Contradiction(f"`{term}` does not fit a tensor of rank {len(dims)}")
        dots = broadcast(dots, dims[len(head) : len(head) + hidden]) or ()
        for letter, dim in zip(head + tail, (*dims[: len(head)], *dims[len(dims) - len(tail) :]), strict=True):
            joined = d.joined(sizes.get(letter, 1), dim)
            if joined is None:
                raise Contradiction(f"`{letter}` is {sizes[letter]} and {dim}")
            sizes[letter] = joined
    if not arrow:
        letters = left.replace("...", "").replace(",", "")
        right = "..." * ("..." in left) + "".join(sorted(c for c in set(letters) if letters.count(c) == 1))
    head, _, tail = right.partition("...")
    middle = dots if "..." in right else ()
    return call.give([*(sizes[c] for c in head), *middle, *(sizes[c] for c in tail)])


_SAME = (
    "Acos Acosh Asin Asinh Atan Atanh BitwiseNot Ceil Celu Cos Cosh Elu Erf Exp Floor Gelu HardSigmoid "
    "HardSwish Hardmax Identity IsInf IsNaN LeakyRelu Log LogSoftmax LpNormalization LRN "
    "MeanVarianceNormalization Mish Reciprocal Relu Round ScaledTanh Selu Shrink Sigmoid Sin Sinh Softmax "
    "Softplus Softsign Sqrt Swish Tan Tanh ThresholdedRelu InstanceNormalization GroupNormalization "
    "Scatter ScatterElements ScatterND TensorScatter ReverseSequence Trilu ParametricSoftplus Affine "
    "ImageScaler"
)
_BROADCASTING = (
    "Add And BitShift BitwiseAnd BitwiseOr BitwiseXor Div Equal Greater GreaterOrEqual Less LessOrEqual "
    "Max Mean Min Mod Mul Or Pow Sub Sum Xor"
)
_REDUCING = (
    "ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp ReduceMax ReduceMean ReduceMin ReduceProd ReduceSum ReduceSumSquare"
)


def _each(operators: str, rule: Rule) -> dict[str, Rule]:
    return dict.fromkeys(operators.split(), rule)


MATH_RULES: Mapping[str, Rule] = MappingProxyType(
    {
        **_each(_SAME, unary),
        **_each(_BROADCASTING, elementwise),
        **_each(_REDUCING, reduction),
        **dict.fromkeys(("Neg", "Abs", "Sign", "Not"), unary_with_contents),
        "PRelu": unary,
        "Where": where,
        "Clip": clip,
        "Cast": cast,
        "CastLike": cast_like,
        "CumSum": cumulative_sum,
        "CumProd": unary,
        "ArgMax": arg_extreme,
        "ArgMin": arg_extreme,
        "MatMul": matmul,
        "MatMulInteger": matmul,
        "QLinearMatMul": quantized_matmul,
        "Gemm": gemm,
        "Einsum": einsum,
    }
)

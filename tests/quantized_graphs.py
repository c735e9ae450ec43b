"""Small quantized models: what tools write, what runtimes fuse, and what keeps them from it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

SCALE, WEIGHT_SCALE = 0.02, 0.01
IMAGE, ROWS = [1, 16, 8, 8], [8, 16]
NARROW = {
    TensorProto.INT2: ml_dtypes.int2,
    TensorProto.UINT2: ml_dtypes.uint2,
    TensorProto.INT4: ml_dtypes.int4,
    TensorProto.UINT4: ml_dtypes.uint4,
    TensorProto.INT8: np.int8,
    TensorProto.UINT8: np.uint8,
}


class Builder:
    """A model put together node by node; every result goes through an Erf, which nothing fuses with."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.inputs: list[onnx.ValueInfoProto] = []
        self.outputs: list[onnx.ValueInfoProto] = []
        self.constants: list[onnx.TensorProto] = []
        self._count = 0

    def input(self, shape: list[int], dtype: int = TensorProto.FLOAT) -> str:
        name = f"x{len(self.inputs)}"
        self.inputs.append(helper.make_tensor_value_info(name, dtype, shape))
        return name

    def const(self, array: Any) -> str:
        name = f"c{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(np.asarray(array), name))
        return name

    def op(self, op: str, inputs: list[str], outputs: int = 1, **attributes: Any) -> Any:
        self._count += 1
        names = [f"v{self._count}_{index}" for index in range(outputs)]
        self.nodes.append(helper.make_node(op, inputs, names, name=f"{op}_{self._count}", **attributes))
        return names if outputs > 1 else names[0]

    def grid(self, dtype: Any, scale: float, zero: int | None) -> list[str]:
        middle = {np.uint8: 128, np.uint16: 32768}.get(dtype, 0) if zero is None else zero
        return [self.const(np.float32(scale)), self.const(np.array(middle, dtype))]

    def q(self, value: str, dtype: Any = np.uint8, scale: float = SCALE, zero: int | None = None) -> str:
        return self.op("QuantizeLinear", [value, *self.grid(dtype, scale, zero)])

    def dq(self, value: str, dtype: Any = np.uint8, scale: float = SCALE, zero: int | None = None) -> str:
        return self.op("DequantizeLinear", [value, *self.grid(dtype, scale, zero)])

    def qdq(self, value: str, dtype: Any = np.uint8, scale: float = SCALE, zero: int | None = None) -> str:
        return self.dq(self.q(value, dtype, scale, zero), dtype, scale, zero)

    def weight(self, shape: tuple[int, ...], axis: int | None, dtype: Any = np.int8, zero: bool = True) -> str:
        count = () if axis is None else (shape[axis],)
        codes = np.random.default_rng(0).integers(1, 60, shape).astype(dtype)
        inputs = [self.const(codes), self.const(np.full(count, WEIGHT_SCALE, np.float32))]
        inputs += [self.const(np.zeros(count, dtype))] * zero
        return self.op("DequantizeLinear", inputs, **({} if axis is None else {"axis": axis}))

    def bias(self, count: int, scale: float = SCALE * WEIGHT_SCALE) -> str:
        inputs = [self.const(np.ones(count, np.int32)), self.const(np.full(count, scale, np.float32))]
        return self.op("DequantizeLinear", inputs, axis=0)

    def result(self, *values: str) -> onnx.ModelProto:
        for value in values:
            self.output(self.op("Erf", [value]))
        return self.model()

    def output(self, name: str, dtype: int = TensorProto.FLOAT) -> None:
        self.outputs.append(helper.make_tensor_value_info(name, dtype, None))

    def model(self, opset: int = 21) -> onnx.ModelProto:
        graph = helper.make_graph(self.nodes, "g", self.inputs, self.outputs, self.constants)
        imports = [helper.make_opsetid("", opset), helper.make_opsetid("com.microsoft", 1)]
        return helper.make_model(graph, opset_imports=imports, ir_version=10)


def conv(
    dtype: Any = np.uint8,
    out: Any = None,
    weight: Any = np.int8,
    bias: str | None = "int32",
    axis: int | None = 0,
    bias_scale: float = SCALE * WEIGHT_SCALE,
    tail: str | None = None,
    zero: int | None = None,
    ending: str = "q",
    op: str = "Conv",
) -> onnx.ModelProto:
    """Return a convolution in codes, with one thing or another about it changed."""
    b = Builder()
    data = b.qdq(b.input(IMAGE), dtype)
    inputs = [
        data,
        b.const(np.ones((16, 16, 3, 3), np.float32)) if weight is None else b.weight((16, 16, 3, 3), axis, weight),
    ]
    inputs += [b.bias(16, bias_scale)] if bias == "int32" else []
    inputs += [b.const(np.ones(16, np.float32))] if bias == "float" else []
    made = b.op(op, inputs, pads=[1] * 4)
    if tail == "Relu":
        made = b.op("Relu", [made])
    if tail == "Clip":
        made = b.op("Clip", [made, b.const(np.float32(0)), b.const(np.float32(6))])
    if ending == "output":
        b.output(made)
    quantized = made if ending == "float" else b.qdq(made, out or dtype, 0.05, zero)
    if ending == "both":
        return b.result(quantized, b.op("Tanh", [made]))
    if ending == "two":
        return b.result(quantized, b.op("Tanh", [b.qdq(made, out or dtype, 0.5)]))
    return b.result(quantized)


def product(
    op: str = "MatMul",
    dtype: Any = np.uint8,
    out: Any = None,
    weight: Any = np.int8,
    zero: bool = True,
    bias: str | None = None,
    shape: list[int] | None = None,
    ending: str = "q",
    tail: bool = False,
    **attributes: Any,
) -> onnx.ModelProto:
    """Return a matrix product in codes; of a MatMul the bias is an Add behind it."""
    b = Builder()
    data = b.qdq(b.input(shape or ROWS), dtype)
    turned = attributes.get("transB", 0)
    inputs = [data, b.weight((32, 16) if turned else (16, 32), 0 if turned else 1, weight, zero)]
    added = {"int32": lambda: b.bias(32), "float": lambda: b.const(np.ones(32, np.float32))}
    if bias is not None and op == "Gemm":
        inputs.append(added[bias]())
    made = b.op(op, inputs, **attributes)
    if bias is not None and op == "MatMul":
        made = b.op("Add", [made, added[bias]()])
    made = b.op("Relu", [made]) if tail else made
    return b.result(b.qdq(made, out or dtype, 0.1) if ending == "q" else made)


def unary(
    op: str,
    dtype: Any = np.uint8,
    out: Any = None,
    inputs: tuple[Any, ...] = (),
    scale: float = SCALE,
    zero: int | None = None,
    ending: str = "q",
    shape: list[int] | None = None,
    opset: int = 21,
    **attributes: Any,
) -> onnx.ModelProto:
    """Return an operator of one input in codes."""
    b = Builder()
    others = ["" if value is None else b.const(value) for value in inputs]
    made = b.op(op, [b.qdq(b.input(shape or IMAGE), dtype), *others], **attributes)
    if ending == "q":
        made = b.qdq(made, out or dtype, scale, zero)
    b.output(made if ending == "output" else b.op("Erf", [made]))
    return b.model(opset)


def join(
    op: str, second: str = "qdq", dtypes: tuple[Any, Any] = (np.uint8, np.uint8), out: Any = None, ending: str = "q"
) -> onnx.ModelProto:
    """Return an operator of two inputs, the first of them in codes."""
    b = Builder()
    first = b.qdq(b.input(IMAGE), dtypes[0])
    other = {
        "qdq": lambda: b.qdq(b.input(IMAGE), dtypes[1], 0.03),
        "same": lambda: first,
        "float": lambda: b.input(IMAGE),
        "constant": lambda: b.const(np.ones(IMAGE, np.float32)),
        "codes": lambda: b.dq(b.const(np.ones(IMAGE, dtypes[1])), dtypes[1]),
        "quantized constant": lambda: b.qdq(b.const(np.ones(IMAGE, np.float32)), dtypes[1]),
    }[second]()
    condition = [b.input(IMAGE, TensorProto.BOOL)] if op == "Where" else []
    made = b.op(op, [*condition, first, other], **({"axis": 1} if op == "Concat" else {}))
    return b.result(b.qdq(made, out or dtypes[0], 0.05) if ending == "q" else made)


def few_bits(
    dtype: int = TensorProto.INT4,
    op: str = "MatMul",
    block: int = 32,
    axis: int = 0,
    form: str = "block",
    shape: tuple[int, int] = (64, 32),
    bias: tuple[int, ...] | None = None,
    readers: int = 1,
    rank: int = 2,
    tail: bool = False,
    quantized: bool = False,
    **attributes: Any,
) -> onnx.ModelProto:
    """Return a product in float with a weight of few bits."""
    b = Builder()
    count = {"tensor": (), "channel": (shape[axis],)}.get(
        form, tuple(-(-size // block) if at == axis else size for at, size in enumerate(shape))
    )
    codes = b.const(np.ones(shape, np.int32).astype(NARROW[dtype]))
    layout = {} if form == "tensor" else {"axis": axis} | ({"block_size": block} if form == "block" else {})
    weight = b.op("DequantizeLinear", [codes, b.const(np.full(count, WEIGHT_SCALE, np.float32))], **layout)
    if op == "Gather":
        return b.result(b.op("Gather", [weight, b.input([2, 5], TensorProto.INT64)]))
    inner = shape[1] if attributes.get("transB") else shape[0]
    data = b.input([3, inner] if rank == 2 else [2, 3, inner])
    data = b.qdq(data) if quantized else data
    made = [
        b.op(op, [data, weight, *([b.const(np.ones(bias, np.float32))] if bias and op == "Gemm" else [])], **attributes)
        for _ in range(readers)
    ]
    if bias and op == "MatMul":
        made = [b.op("Add", [value, b.const(np.ones(bias, np.float32))]) for value in made]
    made = [b.op("Relu", [value]) for value in made] if tail else made
    opset = 25 if dtype in (TensorProto.INT2, TensorProto.UINT2) else 21
    for value in made:
        b.output(b.op("Erf", [value]))
    return b.model(opset)


def dynamic(bias: bool = False, rank: int = 2, readers: int = 1, weight: Any = np.int8) -> onnx.ModelProto:
    """Return a product whose input is quantized when it runs."""
    b = Builder()
    codes, scale, zero = b.op("DynamicQuantizeLinear", [b.input([3, 16] if rank == 2 else [2, 3, 16])], outputs=3)
    results = []
    for _ in range(readers):
        sums = b.op("MatMulInteger", [codes, b.const(np.ones((16, 32), weight)), zero, b.const(np.zeros(32, weight))])
        scales = b.op("Mul", [scale, b.const(np.full(32, WEIGHT_SCALE, np.float32))])
        made = b.op("Mul", [b.op("Cast", [sums], to=TensorProto.FLOAT), scales])
        results.append(b.op("Add", [made, b.const(np.ones(32, np.float32))]) if bias else made)
    return b.result(*results)


def fan_out(dtype: Any) -> onnx.ModelProto:
    """Return a residual block: one DQ that a convolution and an Add read."""
    b = Builder()
    data = b.qdq(b.input(IMAGE), dtype)
    made = b.qdq(b.op("Conv", [data, b.weight((16, 16, 3, 3), 0), b.bias(16)], pads=[1] * 4), dtype, 0.05)
    return b.result(b.qdq(b.op("Add", [made, data]), dtype, 0.07))


def split(scale: float = SCALE, quantized: int = 2) -> onnx.ModelProto:
    """Return a Split in codes."""
    b = Builder()
    left, right = b.op("Split", [b.qdq(b.input([1, 16, 8]))], outputs=2, axis=1, num_outputs=2)
    return b.result(b.qdq(left, scale=scale), b.qdq(right) if quantized == 2 else right)


def moved(
    *ops: str, before: bool, dtype: Any = np.uint8, readers: int = 1, source: str = "operator"
) -> onnx.ModelProto:
    """Return moves between Q and DQ on one side, and a float operator on the other."""
    b = Builder()
    sources = {
        "operator": lambda: b.op("Erf", [b.input(IMAGE)]),
        "input": lambda: b.input(IMAGE),
        "constant": lambda: b.const(np.ones(IMAGE, np.float32)),
    }
    value = sources[source]() if before else b.qdq(b.input(IMAGE), dtype)
    sizes = b.input([1], TensorProto.INT64) if source == "constant" else ""
    for op in ops:
        extra = [b.const(np.array([1, -1]))] if op == "Reshape" else []
        extra = [b.const(integers(0)), sizes] if op == "Slice" else extra
        attributes = {"Transpose": {"perm": [0, 2, 3, 1]}, "MaxPool": {"kernel_shape": [2, 2]}}.get(op, {})
        value = b.op(op, [value, *extra], **attributes)
    if before:
        return b.result(b.qdq(value, dtype))
    for _ in range(readers - 1):
        b.output(b.op("Tanh", [value]))
    return b.result(value)


def two_moves(first: Any, second: Any, scale: float = SCALE, readers: int = 1) -> onnx.ModelProto:
    """Return two moves, one after the other, between a DQ and a Q of other codes."""
    b = Builder()
    value = b.op("Transpose", [b.qdq(b.input(IMAGE), first)], perm=[0, 2, 3, 1])
    codes = b.q(b.op("Reshape", [value, b.const(integers(1, -1))]), second, scale)
    return b.result(*(b.dq(codes, second, scale) for _ in range(readers)))


def table_in_codes() -> onnx.ModelProto:
    """Return an embedding whose rows go on in codes."""
    b = Builder()
    table = b.dq(b.const(np.ones((64, 16), np.uint8)))
    return b.result(b.qdq(b.op("Gather", [table, b.input([2], TensorProto.INT64)])))


def weight_in_codes(op: str, shape: tuple[int, ...], data: list[int]) -> onnx.ModelProto:
    """Return an operator in float with its weight in codes."""
    b = Builder()
    return b.result(b.op(op, [b.input(data), b.weight(shape, 0)]))


def few_bits_moved() -> onnx.ModelProto:
    """Return a product with a weight of few bits, and a Q that the runtime carries up to it."""
    b = Builder()
    codes = b.const(np.ones((64, 32), np.int32).astype(ml_dtypes.int4))
    weight = b.op(
        "DequantizeLinear", [codes, b.const(np.full((2, 32), WEIGHT_SCALE, np.float32))], axis=0, block_size=32
    )
    made = b.op("MatMul", [b.input([3, 64]), weight])
    return b.result(b.qdq(b.op("Reshape", [made, b.const(integers(1, -1))])))


def integers(*values: int) -> np.ndarray[Any, Any]:
    """Return int64 indices or sizes."""
    return np.array(values, np.int64)


# Operators of one input, by what they need besides.
UNARY: dict[str, dict[str, Any]] = {
    "AveragePool": {"kernel_shape": [2, 2]},
    "GlobalAveragePool": {},
    "LeakyRelu": {},
    "Sigmoid": {"scale": 1 / 256, "zero": 0},
    "Softmax": {"scale": 1 / 256, "zero": 0},
    "MaxPool": {"kernel_shape": [2, 2]},
    "ReduceMax": {"inputs": (integers(1),)},
    "ReduceMin": {"inputs": (integers(1),)},
    "DepthToSpace": {"blocksize": 2},
    "Expand": {"inputs": (integers(2, 16, 8, 8),)},
    "Flatten": {},
    "Gather": {"inputs": (integers(1, 2),), "axis": 1},
    "GatherElements": {"inputs": (np.zeros((1, 2, 8, 8), np.int64),), "axis": 1},
    "Reshape": {"inputs": (integers(1, -1),)},
    "Resize": {"inputs": (None, np.array([1, 1, 2, 2], np.float32)), "mode": "nearest"},
    "Slice": {"inputs": (integers(1), integers(5), integers(1))},
    "Squeeze": {"inputs": (integers(0),)},
    "Tile": {"inputs": (integers(1, 2, 1, 1),)},
    "Transpose": {"perm": [0, 2, 3, 1]},
    "Unsqueeze": {"inputs": (integers(0),)},
}
# Operators that stay in float, Q and DQ around them or not.
FLOAT_ONLY: dict[str, dict[str, Any]] = {
    "Clip": {"inputs": (np.float32(0), np.float32(6))},
    "Erf": {},
    "GatherND": {"inputs": (np.zeros((1, 2), np.int64),)},
    "GlobalMaxPool": {},
    "HardSigmoid": {},
    "InstanceNormalization": {"inputs": (np.ones(16, np.float32), np.ones(16, np.float32))},
    "LayerNormalization": {"inputs": (np.ones(8, np.float32),)},
    "Pad": {"inputs": (integers(0, 0, 1, 1, 0, 0, 1, 1),)},
    "ReduceMean": {"inputs": (integers(2, 3),)},
    "ReduceSum": {"inputs": (integers(1),)},
    "Relu": {},
    "SpaceToDepth": {"blocksize": 2},
    "Sqrt": {},
    "Tanh": {},
}
Made = Callable[[], onnx.ModelProto]


def every_case() -> dict[str, Made]:
    """Return models by what is special about them."""
    cases: dict[str, Made] = {
        "conv": conv,
        "conv, float bias": lambda: conv(bias="float"),
        "conv, no bias": lambda: conv(bias=None),
        "conv, float weight": lambda: conv(weight=None, bias="float"),
        "conv, float weight, no bias": lambda: conv(weight=None, bias=None),
        "conv, int8": lambda: conv(np.int8),
        "conv, int8 out of uint8": lambda: conv(out=np.int8),
        "conv, uint8 weights": lambda: conv(weight=np.uint8),
        "conv, uint16": lambda: conv(np.uint16),
        "conv, int16 weights": lambda: conv(weight=np.int16),
        "conv, one weight scale": lambda: conv(axis=None, bias=None),
        "conv, scales of inputs": lambda: conv(axis=1),
        "conv, bias off its grid": lambda: conv(bias_scale=0.001),
        "conv, bias near its grid": lambda: conv(bias_scale=0.000201),
        "conv, Relu within the codes": lambda: conv(tail="Relu"),
        "conv, Relu at the end of the codes": lambda: conv(tail="Relu", zero=0),
        "conv, Relu, int8": lambda: conv(np.int8, tail="Relu", zero=-128),
        "conv, Clip beyond the codes": lambda: conv(tail="Clip", zero=0),
        "conv, Clip within the codes": lambda: conv(tail="Clip", zero=10),
        "conv, output of the model": lambda: conv(ending="output"),
        "conv, result in float": lambda: conv(ending="float"),
        "conv, result read in float, too": lambda: conv(ending="both"),
        "conv, result quantized twice": lambda: conv(ending="two"),
        "transposed conv": lambda: conv(op="ConvTranspose"),
        "fan-out": lambda: fan_out(np.uint8),
        "fan-out, int8": lambda: fan_out(np.int8),
        "split": split,
        "split, other scale": lambda: split(scale=0.05),
        "split, half of it": lambda: split(quantized=1),
    }
    for rank, shape in (("", ROWS), (", rows of rows", [2, 8, 16])):
        for bias in (None, "float", "int32"):
            for ending in ("q", "float"):
                cases[f"matmul{rank}, bias {bias}, to {ending}"] = lambda s=shape, x=bias, e=ending: product(
                    shape=s, bias=x, ending=e
                )
    for name, options in {
        "": {},
        ", turned": {"transB": 1},
        ", float bias": {"bias": "float"},
        ", bias": {"bias": "int32"},
        ", float bias, to float": {"bias": "float", "ending": "float"},
        ", beta": {"bias": "int32", "beta": 0.5},
        ", alpha": {"alpha": 0.5},
        ", alpha and bias": {"bias": "int32", "alpha": 0.5},
        ", no zero point": {"zero": False},
        ", int8": {"dtype": np.int8},
        ", to float": {"ending": "float"},
        ", to int8": {"out": np.int8},
        ", Relu": {"tail": True},
        ", Relu, to float": {"tail": True, "ending": "float"},
        ", uint16": {"dtype": np.uint16},
        ", int16, to float": {"dtype": np.int16, "ending": "float"},
        ", int16 to uint8": {"dtype": np.int16, "out": np.uint8},
        ", uint16, int16 weights": {"dtype": np.uint16, "weight": np.int16},
        ", uint8 weights": {"weight": np.uint8},
    }.items():
        cases[f"gemm{name}"] = lambda o=options: product("Gemm", **o)
        if not {"beta", "alpha", "transB", "bias"} & set(options):
            cases[f"matmul{name}"] = lambda o=options: product(**o)
    for op, options in {**UNARY, **FLOAT_ONLY}.items():
        cases[op] = lambda p=op, o=options: unary(p, **o)
    for op in ("MaxPool", "Transpose", "Resize", "Reshape", "Sigmoid", "AveragePool", "Slice", "Squeeze", "Gather"):
        # A move in int8 that leads to float breaks ONNX Runtime 1.31 when it loads the model.
        for name, options in {
            "to float": {"ending": "float"},
            "to output": {"ending": "output"},
            "other scale": {"scale": 0.05},
            "int8": {"dtype": np.int8},
            "uint16": {"dtype": np.uint16},
        }.items():
            zero = {"zero": None} if "dtype" in options else {}
            cases[f"{op}, {name}"] = lambda p=op, o=options, z=zero: unary(p, **{**UNARY[p], **z, **o})
    for op in ("Add", "Mul", "Sub", "Div", "Where", "Max", "Concat"):
        for second in ("qdq", "same", "float", "constant", "codes", "quantized constant"):
            cases[f"{op}, {second}"] = lambda p=op, s=second: join(p, s)
    for op in ("Add", "Concat"):
        cases[f"{op}, int8"] = lambda p=op: join(p, dtypes=(np.int8, np.int8))
        cases[f"{op}, uint8 and int8"] = lambda p=op: join(p, dtypes=(np.uint8, np.int8))
        cases[f"{op}, uint8 and int8 codes"] = lambda p=op: join(p, "codes", dtypes=(np.uint8, np.int8))
        cases[f"{op}, to int8"] = lambda p=op: join(p, out=np.int8)
        cases[f"{op}, uint16"] = lambda p=op: join(p, dtypes=(np.uint16, np.uint16))
        cases[f"{op}, to float"] = lambda p=op: join(p, ending="float")
    cases |= {
        f"few bits, {TensorProto.DataType.Name(d)}, {form}": lambda d=d, form=form: few_bits(
            d, form=form, axis=0 if form == "block" else 1
        )
        for d in NARROW
        for form in ("block", "channel", "tensor")
    }
    for name, options in {
        "blocks of 8": {"block": 8},
        "blocks of 16": {"block": 16},
        "other axis": {"axis": 1},
        "ragged": {"shape": (48, 32)},
        "two readers": {"readers": 2},
        "rows of rows": {"rank": 3},
        "Relu": {"tail": True},
        "Gemm": {"op": "Gemm"},
        "Gemm, bias": {"op": "Gemm", "bias": (32,)},
        "Gemm, bias of two axes": {"op": "Gemm", "bias": (1, 32)},
        "Gemm, turned": {"op": "Gemm", "shape": (32, 64), "axis": 1, "transB": 1},
        "bias": {"bias": (32,)},
        "bias of two axes": {"bias": (1, 32)},
        "input in codes": {"quantized": True},
        "Gather": {"op": "Gather"},
    }.items():
        cases[f"few bits, {name}"] = lambda o=options: few_bits(**o)
    for name, options in {
        "": {},
        ", bias": {"bias": True},
        ", rows of rows": {"rank": 3},
        ", two readers": {"readers": 2},
        ", uint8 weights": {"weight": np.uint8},
    }.items():
        cases[f"dynamic{name}"] = lambda o=options: dynamic(**o)
    for ops in (("Transpose",), ("Transpose", "Reshape"), ("MaxPool",), ("Flatten",)):
        for before in (True, False):
            cases[f"{' and '.join(ops)}, float {'before' if before else 'behind'}"] = lambda o=ops, b=before: moved(
                *o, before=b
            )
    for dtypes in ((np.uint8, np.int8), (np.int8, np.uint8)):
        name = " and ".join(np.dtype(one).name for one in dtypes)
        cases[f"two moves, {name}"] = lambda d=dtypes: two_moves(*d)
        cases[f"two moves of other scales, {name}"] = lambda d=dtypes: two_moves(*d, scale=0.05)
        cases[f"two moves of other scales, {name}, two readers"] = lambda d=dtypes: two_moves(*d, scale=0.05, readers=2)
    cases["Gather of a table in codes"] = table_in_codes
    cases["weight of a conv in codes"] = lambda: weight_in_codes("Conv", (16, 16, 1, 1), IMAGE)
    cases["few bits, Reshape and Q behind"] = few_bits_moved
    cases["Reshape, int8 to output"] = lambda: unary("Reshape", np.int8, **UNARY["Reshape"], ending="output", opset=13)
    cases["Transpose of an input"] = lambda: moved("Transpose", before=True, source="input")
    cases["Slice of a constant"] = lambda: moved("Slice", before=True, source="constant")
    cases["Transpose, two readers"] = lambda: moved("Transpose", before=False, readers=2)
    cases["Transpose, two readers, int8"] = lambda: moved("Transpose", before=False, readers=2, dtype=np.int8)
    return cases

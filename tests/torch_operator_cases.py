"""Cases of operators for torch, as data: what ONNX's own cases leave out, and what gradients are checked of."""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np

# A shape to fill with normal numbers, an array as it is, or an input that is left out.
Input: TypeAlias = tuple[int, ...] | np.ndarray | None

HALF = 2e-3  # of float16
WINDOWED = 1e-4  # of float32 sums of some dozens of products


@dataclass(frozen=True, eq=False)
class Case:
    """One operator, its inputs and attributes; ``learned`` says which inputs have gradients, None: all floats."""

    op: str
    inputs: tuple[Input, ...]
    attributes: Mapping[str, Any] = field(default_factory=dict)
    opset: int = 18
    outputs: int = 1
    tolerance: float = 1e-5
    learned: tuple[int, ...] | None = None

    def __str__(self) -> str:
        """Return a name for the list of tests."""
        given = ",".join(f"{name}={value}" for name, value in self.attributes.items())
        shapes = "/".join("-" if one is None else "x".join(map(str, np.shape(one))) for one in self._shaped())
        return f"{self.op}-{self.opset}({shapes};{given})".replace(" ", "")

    def arrays(self, dtype: Any = np.float32) -> list[np.ndarray | None]:
        """Return the inputs; numbers drawn by the case's own seed, floats in the type asked for."""
        rng = np.random.default_rng(zlib.crc32(str(self).encode()))
        found: list[np.ndarray | None] = []
        for one in self.inputs:
            if isinstance(one, tuple):
                found.append(np.asarray(rng.normal(size=one)).astype(dtype))
            else:
                wide = one is not None and one.dtype == np.float32 and dtype != np.float32
                found.append(one.astype(dtype) if one is not None and wide else one)
        return found

    def _shaped(self) -> list[np.ndarray | None]:
        return [np.empty(one) if isinstance(one, tuple) else one for one in self.inputs]


def floats(*numbers: float) -> np.ndarray:
    return np.array(numbers, np.float32)


def ints(*numbers: int) -> np.ndarray:
    return np.array(numbers, np.int64)


def positive(*shape: int) -> np.ndarray:
    return (np.abs(np.random.default_rng(len(shape)).normal(size=shape)) + 0.1).astype(np.float32)


def halves(*shape: int) -> np.ndarray:
    return np.random.default_rng(len(shape)).normal(size=shape).astype(np.float16)


def _pooling() -> Iterator[Case]:
    for op, opset in (("MaxPool", 8), ("MaxPool", 12), ("AveragePool", 10), ("AveragePool", 19), ("LpPool", 18)):
        for sizes in ((9,), (9, 8), (6, 7, 5)):
            rank = len(sizes)
            plain = {"kernel_shape": [3] * rank, "strides": [2] * rank}
            for pads in ([1] * 2 * rank, [0] * rank + [1] * rank):
                yield Case(op, ((2, 3, *sizes),), plain | {"pads": pads}, opset, tolerance=WINDOWED)
            for auto in ("SAME_UPPER", "SAME_LOWER", "VALID"):
                yield Case(op, ((2, 3, *sizes),), plain | {"auto_pad": auto}, opset, tolerance=WINDOWED)
            if opset >= 10:
                cut = plain | {"ceil_mode": 1, "kernel_shape": [2] * rank, "strides": [3] * rank}
                yield Case(op, ((2, 3, *sizes),), cut, opset, tolerance=WINDOWED)
            if opset >= 12:
                spread = plain | {"dilations": [2] * rank, "pads": [1] * 2 * rank}
                yield Case(op, ((2, 3, *sizes),), spread, opset, tolerance=WINDOWED)
    for order, auto in itertools.product((0, 1), ("NOTSET", "SAME_LOWER")):
        attributes = {"kernel_shape": [2, 3], "strides": [2, 1], "storage_order": order, "auto_pad": auto}
        yield Case("MaxPool", ((2, 3, 5, 6),), attributes, 12, outputs=2)
    counted = {"kernel_shape": [3, 3], "strides": [2, 2], "count_include_pad": 1, "ceil_mode": 1}
    yield Case("AveragePool", ((1, 2, 6, 7),), counted | {"pads": [1, 1, 1, 1]}, 11)
    yield Case("AveragePool", ((1, 2, 6, 7),), counted | {"pads": [0, 1, 1, 0], "dilations": [1, 2]}, 19)
    yield Case("GlobalLpPool", ((2, 3, 4, 5),), {"p": 3}, 2)
    yield Case("MaxPool", ((0, 3, 6, 6),), {"kernel_shape": [3, 3]}, 12)
    unpooled = (floats(1, 2, 3, 4).reshape(1, 1, 2, 2), ints(6, 8, 16, 18).reshape(1, 1, 2, 2), ints(1, 1, 5, 5))
    yield Case("MaxUnpool", unpooled, {"kernel_shape": [2, 2], "strides": [2, 2]}, 11)


def _products() -> Iterator[Case]:
    for sizes, group in itertools.product(((7,), (6, 7), (4, 5, 4)), (1, 2)):
        rank = len(sizes)
        kernel = (3, 2, 2)[:rank]
        plain = {"group": group, "strides": [2] * rank}
        inputs: tuple[Input, ...] = ((2, 4, *sizes), (4, 4 // group, *kernel))
        uneven = plain | {"pads": [1] * rank + [0] * rank, "dilations": [2] + [1] * (rank - 1)}
        for op in ("Conv", "ConvTranspose"):
            bias = (4,) if op == "Conv" else (4 // group * group,)
            yield Case(op, inputs, plain | {"auto_pad": "SAME_LOWER"}, 11, tolerance=WINDOWED)
            yield Case(op, (*inputs, bias), uneven, 11, tolerance=WINDOWED)
        more = uneven | {"output_padding": [1] * rank}
        yield Case("ConvTranspose", (*inputs, (4,)), more, 11, tolerance=WINDOWED)
        shaped = plain | {"output_shape": [2 * size for size in sizes], "auto_pad": "SAME_UPPER"}
        yield Case("ConvTranspose", (*inputs, (4,)), shaped, 11, tolerance=WINDOWED)
    yield Case("Conv", ((0, 4, 5, 5), (4, 4, 3, 3)), {}, 11)
    deformed = {"pads": [1, 0, 1, 1], "strides": [2, 1], "dilations": [1, 2]}
    for group, offsets in itertools.product((1, 2), (1, 2)):
        inputs = ((2, 4, 7, 6), (4, 4 // group, 3, 2), (2, offsets * 12, 4, 5), (4,), (2, offsets * 6, 4, 5))
        attributes = deformed | {"group": group, "offset_group": offsets}
        yield Case("DeformConv", inputs, attributes, 19, tolerance=WINDOWED)
    for a, b, opset in itertools.product((0, 1), (0, 1), (7, 11)):
        left, right = ((4, 3) if a else (3, 4)), ((5, 4) if b else (4, 5))
        for scaled in ({}, {"alpha": 0.5, "beta": 2.0}):
            yield Case("Gemm", (left, right, (5,)), {"transA": a, "transB": b} | scaled, opset)
        yield Case("Gemm", (left, right, (3, 1)), {"transA": a, "transB": b}, opset)
    yield Case("Gemm", ((3, 4), (5, 4)), {"transB": 1}, 11)
    yield Case("Gemm", ((3, 4), (5, 4), floats(2.0)), {"transB": 1}, 11)
    for pair in (((4,), (2, 4, 3)), ((2, 3, 4), (4,)), ((2, 1, 3, 4), (5, 4, 2)), ((0, 4), (4, 3)), ((3, 0), (0, 4))):
        yield Case("MatMul", pair, {}, 13)
    for equation, shapes in (("ij,jk", ((2, 3), (3, 4))), ("ba", ((2, 3),)), ("...ii->...i", ((2, 3, 3),))):
        yield Case("Einsum", shapes, {"equation": equation}, 12)


def _normalizations() -> Iterator[Case]:
    for shape in ((2, 4, 5), (2, 4, 3, 3), (2, 4, 1, 1), (0, 4, 3)):
        statistics: tuple[Input, ...] = ((4,), (4,), (4,), positive(4))
        for opset in (9, 14, 15):
            yield Case("BatchNormalization", (shape, *statistics), {"epsilon": 1e-3}, opset, tolerance=WINDOWED)
        yield Case("InstanceNormalization", (shape, (4,), (4,)), {}, 6, tolerance=WINDOWED)
        whole = shape[1:]
        yield Case("LayerNormalization", (shape, whole, whole), {"axis": 1}, 17, 3, WINDOWED)
        yield Case("LayerNormalization", (shape, whole, whole), {"axis": 1}, 17, 1, WINDOWED)
        yield Case("RMSNormalization", (shape, shape[-1:]), {}, 23, tolerance=WINDOWED)
    yield Case("BatchNormalization", ((2, 4), (4,), (4,), (4,), positive(4)), {}, 15, tolerance=WINDOWED)
    trained = {"training_mode": 1, "momentum": 0.7}
    yield Case("BatchNormalization", ((3, 4, 5), (4,), (4,), (4,), positive(4)), trained, 15, 3, WINDOWED)
    mixed = (halves(2, 3, 4), halves(3), halves(3), floats(0.1, 0.2, 0.3), floats(1, 2, 3))
    yield Case("BatchNormalization", mixed, {}, 15, tolerance=HALF)
    yield Case("GroupNormalization", ((2, 4, 3, 3), (2,), (2,)), {"num_groups": 2}, 18, tolerance=WINDOWED)
    yield Case("GroupNormalization", ((2, 4, 3, 3), (4,), (4,)), {"num_groups": 2}, 21, tolerance=WINDOWED)
    yield Case("LRN", ((2, 7, 3, 3),), {"size": 5, "alpha": 0.1, "beta": 0.6, "bias": 2.0}, 13)
    yield Case("MeanVarianceNormalization", ((2, 3, 4),), {"axes": [0, 1]}, 13, tolerance=WINDOWED)
    for p, axis in itertools.product((1, 2), (0, -1)):
        yield Case("LpNormalization", ((3, 4),), {"p": p, "axis": axis}, 1)


def _activations() -> Iterator[Case]:
    for op, opset, axis in itertools.product(("Softmax", "LogSoftmax", "Hardmax"), (11, 12, 13), (0, 1, -1)):
        yield Case(op, ((2, 3, 4),), {"axis": axis}, opset)
    for op in ("Softmax", "Hardmax"):
        for opset in (11, 13):
            yield Case(op, ((0, 3),), {}, opset)
    given: tuple[tuple[str, dict[str, float]], ...] = (
        ("LeakyRelu", {"alpha": 0.3}),
        ("ThresholdedRelu", {"alpha": 0.5}),
        ("Elu", {"alpha": 0.7}),
        ("Celu", {"alpha": 0.7}),
        ("Selu", {"alpha": 2.0, "gamma": 3.0}),
        ("HardSigmoid", {"alpha": 0.3, "beta": 0.4}),
        ("Shrink", {"bias": 0.2, "lambd": 0.3}),
    )
    for op, attributes in given:
        yield Case(op, (floats(-90, -3, -0.4, -0.0, 0.2, 0.6, 5, 90),), attributes, 16)
    for op in ("Softplus", "Softsign", "Mish", "HardSwish", "Sigmoid", "Tanh", "Erf"):
        yield Case(op, (floats(-90, -30, -3, -0.0, 0.2, 5, 35, 90),), {}, 18, tolerance=1e-6)
    yield Case("PRelu", ((2, 3, 4), (3, 1)), {}, 9)
    yield Case("PRelu", (np.array([3, 4], np.uint32), np.array([2], np.uint32)), {}, 16)
    for op in ("Softmax", "Sigmoid", "Gelu", "Softplus", "Elu", "ReduceMean", "ReduceL2"):
        yield Case(op, (halves(3, 4),), {}, 20, tolerance=HALF)


def _reductions() -> Iterator[Case]:
    names = ("L1", "L2", "LogSum", "LogSumExp", "Max", "Mean", "Min", "Prod", "Sum", "SumSquare")
    for name in names:
        old, new = (11, 13) if name == "Sum" else (12, 18)
        for shape, axes in (((2, 3, 4), [0, -1]), ((2, 0, 3), [1]), ((2, 3), None)):
            inputs: tuple[Input, ...] = (positive(*shape),)
            given = {} if axes is None else {"axes": axes}
            yield Case(f"Reduce{name}", inputs, {"keepdims": 0} | given, old)
            by_input = inputs if axes is None else (*inputs, ints(*axes))
            yield Case(f"Reduce{name}", by_input, {}, new)
        yield Case(f"Reduce{name}", (floats(2.0).reshape(()),), {"keepdims": 0}, new)
        yield Case(f"Reduce{name}", (positive(2, 3), ints()), {"noop_with_empty_axes": 1}, new)
    for name in ("L1", "L2", "Max", "Mean", "Min", "Prod", "Sum", "SumSquare"):
        yield Case(f"Reduce{name}", (np.arange(-5, 7, dtype=np.int32).reshape(3, 4), ints(1)), {}, 18)
    ties = np.array([[1, 3, 3], [2, 2, 0]], np.int32)
    for op, last, keep in itertools.product(("ArgMax", "ArgMin"), (0, 1), (0, 1)):
        yield Case(op, (ties,), {"axis": -1, "select_last_index": last, "keepdims": keep}, 12)
    yield Case("ArgMax", (ties,), {"axis": 0}, 11)
    for exclusive, reverse in itertools.product((0, 1), (0, 1)):
        for shape in ((3, 4), (3, 0)):
            yield Case("CumSum", (shape, np.array(-1)), {"exclusive": exclusive, "reverse": reverse}, 11)


def _resizing() -> Iterator[Case]:
    modes = ("half_pixel", "pytorch_half_pixel", "align_corners", "asymmetric")
    for coordinates, opset in (*itertools.product(modes, (11, 18)), ("half_pixel_symmetric", 19)):
        for mode in ("nearest", "linear", "cubic"):
            attributes = {"mode": mode, "coordinate_transformation_mode": coordinates}
            image: Input = (1, 2, 5, 6)
            yield Case("Resize", (image, floats(), floats(1, 1, 0.6, 2.3)), attributes, opset, tolerance=WINDOWED)
            sizes = (image, None, None if opset > 11 else floats(), ints(1, 2, 9, 1))
            if opset > 11:
                yield Case("Resize", sizes, attributes, opset, tolerance=WINDOWED)
                yield Case("Resize", (image, None, None, ints(1, 2, 9, 4)), attributes, opset, tolerance=WINDOWED)
    for nearest in ("round_prefer_floor", "round_prefer_ceil", "floor", "ceil"):
        attributes = {"nearest_mode": nearest, "coordinate_transformation_mode": "asymmetric"}
        yield Case("Resize", ((1, 1, 6, 6), None, floats(1, 1, 2, 1 / 3)), attributes, 13)
        yield Case("Resize", ((1, 1, 6, 6), None, floats(1, 1, 2, 0.5)), attributes, 13)
        # In float32 they are 7 and 9 elements, in wider types a bit less.
        yield Case("Resize", ((1, 1, 10, 10), None, floats(1, 1, 0.7, 0.9)), attributes, 13, tolerance=WINDOWED)
    for mode, outside in itertools.product(("linear", "cubic"), (0, 1)):
        attributes = {"mode": mode, "antialias": 1, "exclude_outside": outside if mode == "cubic" else 0}
        yield Case("Resize", ((1, 2, 9, 7), None, floats(1, 1, 0.4, 0.6)), attributes, 18, tolerance=WINDOWED)
    region = floats(0, 0, 0.1, 0.2, 1, 1, 0.8, 1.3)
    for mode in ("nearest", "linear", "cubic"):
        cropped = {"mode": mode, "coordinate_transformation_mode": "tf_crop_and_resize", "extrapolation_value": 7.0}
        yield Case("Resize", ((1, 2, 5, 6), region, floats(1, 1, 1.5, 2)), cropped, 13, tolerance=WINDOWED)
    for policy in ("not_larger", "not_smaller"):
        attributes = {"mode": "linear", "axes": [2, 3], "keep_aspect_ratio_policy": policy}
        yield Case("Resize", ((1, 2, 5, 6), None, None, ints(9, 9)), attributes, 18, tolerance=WINDOWED)
    codes = np.arange(60, dtype=np.uint8).reshape(1, 2, 5, 6)
    yield Case("Resize", (codes, None, floats(1, 1, 2, 1.5)), {"mode": "linear"}, 13)
    for mode in ("nearest", "linear"):
        yield Case("Upsample", ((1, 2, 4, 5),), {"mode": mode, "scales": [1.0, 1.0, 2.0, 1.5]}, 7)
        yield Case("Upsample", ((1, 2, 4, 5), floats(1, 1, 2, 1.5)), {"mode": mode}, 9)
        yield Case("Resize", ((1, 2, 4, 5), floats(1, 1, 0.5, 0.6)), {"mode": mode}, 10)


def _sampling() -> Iterator[Case]:
    for opset, linear, cubic in ((16, "bilinear", "bicubic"), (20, "linear", "cubic")):
        for padding, corners in itertools.product(("zeros", "border", "reflection"), (0, 1)):
            for mode in (linear, "nearest", cubic):
                attributes = {"mode": mode, "padding_mode": padding, "align_corners": corners}
                yield Case("GridSample", ((2, 3, 5, 6), (2, 4, 3, 2)), attributes, opset, tolerance=WINDOWED)
    volume = {"mode": "linear", "align_corners": 1}
    yield Case("GridSample", ((2, 3, 4, 5, 6), (2, 4, 3, 2, 3)), volume, 20, tolerance=WINDOWED)
    yield Case("AffineGrid", ((2, 3, 4), ints(2, 3, 4, 5, 6)), {}, 20)
    regions = floats(0, 0, 8, 9, 2, 3, 12, 15, -3, -2, 30, 20, 5, 5, 5, 5).reshape(4, 4)
    for mode, ratio, half in itertools.product(("avg", "max"), (0, 2), (0, 1)):
        attributes = {"mode": mode, "sampling_ratio": ratio, "output_height": 3, "output_width": 2}
        attributes |= {"spatial_scale": 0.5}
        if half:
            attributes |= {"coordinate_transformation_mode": "half_pixel"}
        inputs = ((2, 3, 8, 9), regions, ints(0, 1, 0, 1))
        yield Case("RoiAlign", inputs, attributes, 16 if half else 10, tolerance=WINDOWED)
    boxes = floats(0, 0, 0, 8, 9, 1, 2, 3, 6, 7, 1, 1, 1, 2, 2, 0, 3, 3, 40, 40).reshape(4, 5)
    yield Case("MaxRoiPool", ((2, 3, 8, 9), boxes), {"pooled_shape": [3, 2], "spatial_scale": 0.5}, 11)
    yield Case("CenterCropPad", ((4, 5, 6), ints(3, 9)), {"axes": [-1, 0]}, 18)
    overlapping = {"pads": [1, 0, 0, 1], "strides": [2, 1], "dilations": [1, 3]}
    yield Case("Col2Im", ((2, 12, 12), ints(5, 6), ints(2, 2)), overlapping, 18)
    yield Case("Col2Im", ((1, 16, 12), ints(3, 4, 3), ints(2, 2, 2)), {}, 18)


def _signals() -> Iterator[Case]:
    for inverse, onesided, parts in ((0, 0, 1), (0, 0, 2), (0, 1, 1), (1, 0, 1), (1, 0, 2)):
        attributes = {"inverse": inverse, "onesided": onesided}
        for length in (6, 10):
            inputs: tuple[Input, ...] = ((2, 8, 3, parts), np.array(length))
            yield Case("DFT", inputs, attributes | {"axis": 1}, 17, tolerance=WINDOWED)
            yield Case("DFT", (*inputs, np.array(-3)), attributes, 20, tolerance=WINDOWED)
    yield Case("STFT", ((2, 40, 1), np.array(4), (8,)), {"onesided": 1}, 17, tolerance=WINDOWED)
    yield Case("STFT", ((2, 40, 1), np.array(4), None, np.array(8)), {"onesided": 0}, 17, tolerance=WINDOWED)
    for op, periodic in itertools.product(("HannWindow", "HammingWindow", "BlackmanWindow"), (0, 1)):
        yield Case(op, (np.array(7),), {"periodic": periodic, "output_datatype": 11}, 17)
    mel = (np.array(20), np.array(512), np.array(16000), floats(20).reshape(()), floats(7600).reshape(()))
    yield Case("MelWeightMatrix", mel, {}, 17)


def _losses() -> Iterator[Case]:
    labels = np.random.default_rng(0).integers(0, 4, (3, 2, 2))
    for reduction, ignored, weighted in itertools.product(("none", "mean", "sum"), (None, -1, 1), (False, True)):
        target = labels.copy()
        target[0] = 0 if ignored is None else ignored
        attributes: dict[str, Any] = {"reduction": reduction}
        attributes |= {} if ignored is None else {"ignore_index": ignored}
        inputs: tuple[Input, ...] = ((3, 4, 2, 2), target, *([positive(4)] if weighted else []))
        yield Case("NegativeLogLikelihoodLoss", inputs, attributes, 12)
        yield Case("SoftmaxCrossEntropyLoss", inputs, attributes, 12, outputs=2)


def _arithmetic() -> Iterator[Case]:
    special = floats(0.0, -0.0, 1, -1, 2.5, -2.5, np.inf, -np.inf, np.nan, 0.5, 1e30)
    for op in ("Round", "Floor", "Ceil", "Sign", "Sqrt", "Log", "Reciprocal", "IsNaN", "IsInf", "Relu", "Clip"):
        yield Case(op, (special,), {}, 13)
    for op in ("Add", "Mul", "Div", "Max", "Min", "Less", "Equal", "GreaterOrEqual"):
        yield Case(op, (special[:, None], special[None, :]), {}, 13)
    yield Case("Mod", (special[:, None], special[None, :]), {"fmod": 1}, 13)
    for positive_side, negative_side in itertools.product((0, 1), (0, 1)):
        sides = {"detect_positive": positive_side, "detect_negative": negative_side}
        yield Case("IsInf", (special,), sides, 10)
    for exponent in (2.0, 0.5, 3.0, -1.0, 1.7):
        yield Case("Pow", (positive(4, 3), floats(exponent)), {}, 13)
    yield Case("Pow", (positive(4, 3), ints(2)), {}, 13)
    yield Case("Pow", (np.arange(-4, 5, dtype=np.int32), floats(2)), {}, 13)
    yield Case("Pow", (floats(2).reshape(()), floats(1, 2)), {}, 13)
    yield Case("Clip", ((3, 4),), {"min": -0.5, "max": 0.5}, 6)
    yield Case("Clip", ((3, 4), None, floats(0.3).reshape(())), {}, 11)
    for op in ("Sum", "Mean", "Max", "Min"):
        yield Case(op, ((3, 1), (4,), (1,)), {}, 8)
    yield Case("Det", ((2, 3, 3),), {}, 11)
    for opset in (7, 10):
        yield Case("Dropout", ((3, 4),), {"ratio": 0.3}, opset, outputs=2)
    yield Case("Dropout", ((3, 4),), {}, 12, outputs=2)


CASES = [
    *_pooling(),
    *_products(),
    *_normalizations(),
    *_activations(),
    *_reductions(),
    *_resizing(),
    *_sampling(),
    *_signals(),
    *_losses(),
    *_arithmetic(),
]


def _elementwise() -> Iterator[Case]:
    for op in ("Exp", "Erf", "Sin", "Tan", "Atan", "Sinh", "Asinh", "Sigmoid", "Tanh", "Softplus", "Softsign", "Mish"):
        yield Case(op, ((2, 3),), opset=22)
    for op in ("Relu", "Elu", "Celu", "Selu", "LeakyRelu", "HardSwish", "HardSigmoid", "Gelu", "Abs", "Neg", "Det"):
        yield Case(op, ((3, 3),), opset=22)
    for op in ("Log", "Sqrt", "Reciprocal", "Acosh"):
        yield Case(op, (positive(2, 3) + np.float32(1),), opset=22)
    for op in ("Asin", "Acos", "Atanh"):
        yield Case(op, (floats(-0.5, 0.1, 0.7),), opset=22)
    for op in ("Add", "Sub", "Mul", "Max", "Min", "Mean", "Sum", "PRelu"):
        yield Case(op, ((2, 3), (3,)), opset=16)
    yield Case("Div", ((2, 3), positive(3)), opset=14)
    yield Case("Mod", (positive(2, 3) * 5, floats(2, 3, 4)), {"fmod": 1}, opset=14)
    yield Case("Pow", (positive(2, 3), floats(2.0)), opset=15)
    yield Case("Pow", (positive(2, 3), (3,)), opset=15)
    yield Case("Where", (np.array([True, False, True]), (2, 3), (2, 3)), opset=16)
    yield Case("Clip", ((3, 4), floats(-0.7).reshape(()), floats(0.7).reshape(())), opset=13)
    for op in ("Swish", "ThresholdedRelu", "Shrink"):
        yield Case(op, ((3, 4),), {"alpha": 0.7} if op != "Shrink" else {}, opset=24)
    yield Case("SwiGLU", ((3, 4), (3, 4)), opset=28)
    for op, opset in itertools.product(("Softmax", "LogSoftmax"), (11, 13)):
        yield Case(op, ((2, 3, 2),), {"axis": 1}, opset)


def _reducing() -> Iterator[Case]:
    for name in ("L1", "L2", "LogSum", "LogSumExp", "Max", "Mean", "Min", "Prod", "Sum", "SumSquare"):
        yield Case(f"Reduce{name}", (positive(2, 3, 2), ints(0, -1)), opset=20)
    yield Case("CumSum", ((2, 3), np.array(1)), {"exclusive": 1, "reverse": 1}, 14)
    yield Case("CumProd", ((2, 3), np.array(1)), {"exclusive": 1}, 26)
    for op in ("MaxPool", "AveragePool", "LpPool"):
        for pads in ([1, 1, 1, 1], [0, 1, 1, 0]):
            yield Case(op, ((1, 2, 4, 4),), {"kernel_shape": [2, 2], "strides": [2, 1], "pads": pads}, 18)
    yield Case("MaxPool", ((1, 2, 4, 4),), {"kernel_shape": [2, 2]}, 12, outputs=2)
    yield Case("AveragePool", ((1, 1, 5, 5),), {"kernel_shape": [2, 2], "dilations": [2, 1], "ceil_mode": 1}, 19)
    for op in ("GlobalAveragePool", "GlobalMaxPool", "GlobalLpPool"):
        yield Case(op, ((2, 2, 3, 2),), opset=2)
    places = ints(0, 3, 9, 14).reshape(1, 1, 2, 2)
    yield Case("MaxUnpool", ((1, 1, 2, 2), places), {"kernel_shape": [2, 2], "strides": [2, 2]}, 11)


def _weighing() -> Iterator[Case]:
    yield Case("MatMul", ((2, 3), (3, 2)), opset=13)
    yield Case("Gemm", ((3, 2), (2, 3), (2,)), {"transA": 1, "transB": 1, "alpha": 0.5, "beta": 2.0}, 13)
    yield Case("Gemm", ((2, 3), (2, 3), (2,)), {"transB": 1}, 13)
    yield Case("Einsum", ((2, 3), (3, 2)), {"equation": "ij,jk->ki"}, 12)
    uneven = {"pads": [1, 0, 0, 1], "group": 2, "strides": [2, 1]}
    yield Case("Conv", ((1, 2, 4, 4), (2, 1, 2, 2), (2,)), uneven, 11)
    yield Case("ConvTranspose", ((1, 2, 3, 3), (2, 1, 2, 2), (2,)), uneven, 11)
    yield Case("DeformConv", ((1, 2, 3, 3), (2, 1, 2, 2), (1, 8, 2, 2), (2,), (1, 4, 2, 2)), {"group": 2}, 19)
    yield Case("CausalConvWithState", ((2, 3, 4), (3, 1, 3), (3,), (2, 3, 2)), {"activation": "silu"}, 27, 2)
    for op, opset in (("BatchNormalization", 15), ("BatchNormalization", 9)):
        yield Case(op, ((2, 3, 2), (3,), (3,), (3,), positive(3)), opset=opset)
    trained = {"training_mode": 1}
    yield Case("BatchNormalization", ((3, 2, 2), (2,), (2,), (2,), positive(2)), trained, 15, outputs=3)
    yield Case("InstanceNormalization", ((2, 3, 4), (3,), (3,)), opset=6)
    yield Case("GroupNormalization", ((2, 4, 3), (4,), (4,)), {"num_groups": 2}, 21)
    yield Case("LayerNormalization", ((2, 3, 2), (2,), (2,)), opset=17)
    yield Case("LayerNormalization", ((2, 3, 2), (3, 2), (3, 2)), {"axis": 1, "stash_type": 11}, 17, outputs=3)
    yield Case("RMSNormalization", ((2, 3), (3,)), {"stash_type": 11}, 23)
    yield Case("LRN", ((1, 5, 2),), {"size": 3, "alpha": 0.5}, 13)
    yield Case("MeanVarianceNormalization", ((2, 2, 3),), {"axes": [0, 2]}, 13)
    yield Case("LpNormalization", ((2, 3),), opset=22)


def _looking() -> Iterator[Case]:
    for mode in ("nearest", "linear", "cubic"):
        attributes = {"mode": mode}
        yield Case("Resize", ((1, 1, 3, 4), None, floats(1, 1, 1.5, 0.6)), attributes, 13, learned=(0,))
        yield Case("Resize", ((1, 1, 3, 4), None, floats(1, 1, 2, 0.5)), attributes, 13, learned=(0,))
    attributes = {"mode": "linear", "antialias": 1}
    yield Case("Resize", ((1, 1, 5, 6), None, floats(1, 1, 0.5, 0.6)), attributes, 18, learned=(0,))
    yield Case("GridSample", ((1, 2, 3, 3), (1, 2, 2, 2)), {"align_corners": 1, "padding_mode": "border"}, 20)
    yield Case("AffineGrid", ((2, 2, 3), ints(2, 1, 2, 3)), opset=20)
    for mode in ("avg", "max"):
        attributes = {"mode": mode, "output_height": 2, "output_width": 2, "sampling_ratio": 2}
        region = floats(0.0, 0.5, 3.0, 3.5).reshape(1, 4)
        yield Case("RoiAlign", ((1, 2, 4, 4), region, ints(0)), attributes, 16, learned=(0,))
    yield Case("CenterCropPad", ((3, 4), ints(5, 2)), opset=18)
    yield Case("Col2Im", ((1, 4, 6), ints(3, 4), ints(2, 2)), opset=18)
    for inverse, onesided, parts in ((0, 0, 1), (0, 1, 1), (1, 0, 2), (1, 1, 2)):
        yield Case("DFT", ((1, 4, parts), None, np.array(1)), {"inverse": inverse, "onesided": onesided}, 20)
    yield Case("STFT", ((1, 10, 1), np.array(2), (4,)), opset=17)
    for reduction in ("none", "mean", "sum"):
        inputs = ((3, 4), ints(1, 3, 0), positive(4))
        yield Case("SoftmaxCrossEntropyLoss", inputs, {"reduction": reduction}, 13, learned=(0,))


GRADIENTS = [*_elementwise(), *_reducing(), *_weighing(), *_looking()]

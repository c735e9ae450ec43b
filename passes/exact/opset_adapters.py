"""How a node of one version of an operator is said in the next, for each version that changed its meaning.

The key of `ADAPTERS` is an operator and the opset whose version of it the adapter arrives at. ConvTranspose is not
among them: of its first version, one sentence says and another denies what opset 11 says of odd paddings, and runtimes
never told the two apart.
"""

from __future__ import annotations

import functools
from dataclasses import replace
from types import MappingProxyType

import numpy as np
import onnx_ir as ir

from graphopt.backend import Array

from .opset_form import Adapter, Fixed, Form, Made, Operand, Refused, known, read_outputs

# The defaults of Clip's attributes up to opset 10; a float32 that inputs replace means the same without them.
_CLIP_DEFAULTS = {"min": -3.4028234663852886e38, "max": 3.4028234663852886e38}


def attribute_to_input(name: str, form: Form) -> Form:
    """Hand on integers as the second input; empty ones mean the same as none but for Unsqueeze."""
    value = form.integers(name)
    if value is not None and not value.array.size and form.op_type != "Unsqueeze":
        value = None
    return form.with_attributes(**{name: None}).with_inputs(form.input(0), value)


def slice_10(form: Form) -> Form:
    """Starts, ends and axes became inputs."""
    inputs = (form.integers(name) for name in ("starts", "ends", "axes"))
    return form.with_attributes(starts=None, ends=None, axes=None).with_inputs(form.input(0), *inputs)


def top_k_10(form: Form) -> Form:
    """K became an input, a vector of one element."""
    k = Fixed(np.array([form.get("k")], np.int64), form.named("k"))
    return form.with_attributes(k=None).with_inputs(form.input(0), k)


def clip_11(form: Form) -> Form:
    """Bounds became inputs of the dtype that is clipped, and their defaults the ends of that dtype."""
    bounds = []
    for name, default in _CLIP_DEFAULTS.items():
        value = form.get(name)
        if value is None and form.dtype is not ir.DataType.FLOAT:
            value = default
        bounds.append(None if value is None else Fixed(_scalar(value, form.dtype), form.named(name)))
    return form.with_attributes(min=None, max=None).with_inputs(form.input(0), *bounds)


def pad_11(form: Form) -> Form:
    """Pads and the value became inputs."""
    value = form.get("value", 0.0)
    plain = value == 0 and not np.signbit(value)
    constant = None if plain else Fixed(_scalar(value, form.dtype), form.named("value"))
    return form.with_attributes(pads=None, value=None).with_inputs(form.input(0), form.integers("pads"), constant)


def _scalar(value: float, dtype: ir.DataType) -> Array:
    with np.errstate(over="ignore"):  # a bound beyond a float16 is an infinity there, and bounds nothing
        return np.array(value, dtype.numpy())


def batch_normalization_9(form: Form) -> Form:
    """The attribute `spatial` went; what it said by default became the only meaning."""
    if form.get("spatial", 1) != 1:
        raise Refused("it normalizes each element by itself (`spatial = 0`)")
    return form.with_attributes(spatial=None)


def batch_normalization_14(form: Form) -> Form:
    """Training became an attribute; before, it was told by further outputs, which are others now."""
    if any(value.name for value in form.node.outputs[1:]) or len(read_outputs(form.node)) > 1:
        raise Refused("it is in training mode: it has more outputs than one")
    return replace(form, outputs=1)


def dropout_10(form: Form) -> Form:
    """The mask became boolean; what it holds at inference was left open before opset 12."""
    if any(index for index in read_outputs(form.node)):
        raise Refused("its mask is read, whose content at inference is undefined before opset 12")
    return replace(form, outputs=1)


def dropout_12(form: Form) -> Form:
    """The ratio became an input, a float32 whatever is dropped."""
    form = dropout_10(form)
    ratio = form.get("ratio")
    constant = None if ratio is None else Fixed(np.array(ratio, np.float32), form.named("ratio"))
    return form.with_attributes(ratio=None).with_inputs(form.input(0), constant)


def split_18(form: Form) -> Form:
    """Equal parts must say how many they are."""
    return form if form.input(1) is not None else form.with_attributes(num_outputs=len(form.node.outputs))


def upsample_9(form: Form) -> Form:
    """Scales became an input."""
    scales = Fixed(np.array(form.get("scales"), np.float32), form.named("scales"))
    return form.with_attributes(scales=None).with_inputs(form.input(0), scales)


def upsample_10(form: Form) -> Form:
    """Upsample became Resize, which does the same in opset 10."""
    return replace(form, op_type="Resize")


def resize_11(form: Form) -> Form:
    """Coordinates got other defaults; until then they were asymmetric, and the nearest pixel the one before.

    ONNX Runtime takes the pixel behind where an axis shrinks.
    """
    data, scales = form.input(0), form.input(1)
    roi = Fixed(np.zeros(0, np.float32), form.named("roi"))
    form = form.with_attributes(coordinate_transformation_mode="asymmetric").with_inputs(data, roi, scales)
    if form.get("mode", "nearest") != "nearest":
        return form
    return form.with_attributes(nearest_mode="floor" if form.node.op_type == "Upsample" else _nearest(known(scales)))


def _nearest(scales: Array | None) -> str:
    if scales is None:
        raise Refused("its scales vary, and with them what the nearest pixel is")
    if (scales >= 1).all():
        return "floor"
    if (scales <= 1).all():
        return "ceil"
    raise Refused("it shrinks some axes and stretches others: no one mode finds the nearest pixel of both")


def resize_13(form: Form) -> Form:
    """One coordinate mode went; what is not given is left out, instead of empty."""
    if form.get("coordinate_transformation_mode") == "tf_half_pixel_for_nn":
        raise Refused("its coordinates are `tf_half_pixel_for_nn`, which went")
    data, *optional = (form.input(index) for index in range(4))
    return form.with_inputs(data, *(None if _is_empty(one) else one for one in optional))


def _is_empty(operand: Operand) -> bool:
    held = known(operand)
    return held is not None and not held.size


def softmax_13(form: Form) -> Form:
    """The axis became the one normalized over; before, all axes from it on were, flattened into one."""
    axis = form.get("axis", 1)
    data = form.node.inputs[0]
    only = axis if axis == -1 else _only_axis_from(axis, data)
    if only is not None:
        return form.with_attributes(axis=only)
    flat = Made("Flatten", (data,), {"axis": axis})
    # A dimension of 0 is one to copy, unless that is said.
    back = Made("Reshape", (form.itself, Made("Shape", (data,))), {"allowzero": 1 if form.to >= 14 else None})
    return replace(form.with_attributes(axis=-1).with_inputs(flat), result=back)


def _only_axis_from(axis: int, data: ir.Value | None) -> int | None:
    """Return the one axis, from one on, that is longer than 1, counted from the back; None if there may be more."""
    if data is None or data.shape is None or not -len(data.shape) <= axis < len(data.shape):
        return None
    rank = len(data.shape)
    longer = [index - rank for index in range(axis % rank, rank) if data.shape[index] != 1]
    return (longer or [-1])[0] if len(longer) <= 1 else None


def roi_align_16(form: Form) -> Form:
    """Coordinates are shifted by half a pixel unless it is said that they are not."""
    return form.with_attributes(coordinate_transformation_mode="output_half_pixel")


def dft_20(form: Form) -> Form:
    """The axis became an input with another default."""
    axis = Fixed(np.array(form.get("axis", 1), np.int64), form.named("axis"))
    return form.with_attributes(axis=None).with_inputs(form.input(0), form.input(1), axis)


def grid_sample_20(form: Form) -> Form:
    """Two modes have other names, since the grid may have any number of axes."""
    names = {"bilinear": "linear", "bicubic": "cubic"}
    mode = form.get("mode", "bilinear")
    return form.with_attributes(mode=names.get(mode, mode))


def group_normalization_21(form: Form) -> Form:
    """Scale and bias became per channel, and the arithmetic that of float32 unless it is said otherwise."""
    if form.dtype is not ir.DataType.FLOAT:
        form = form.with_attributes(stash_type=form.dtype.value)
    groups = form.get("num_groups")
    data = form.input(0)
    channels = Made("Shape", (data,), {"start": 1, "end": 2})
    each = Made("Div", (channels, Fixed(np.array([groups], np.int64), form.named("groups"))))
    shape = Made("Concat", (Fixed(np.array([1], np.int64), form.named("one")), each), {"axis": 0})
    column = Fixed(np.array([-1, 1], np.int64), form.named("column"))
    flat = Fixed(np.array([-1], np.int64), form.named("flat"))

    def per_channel(index: int) -> Made:
        expanded = Made("Expand", (Made("Reshape", (form.input(index), column)), shape))
        return Made("Reshape", (expanded, flat))

    return form.with_inputs(data, per_channel(1), per_channel(2))


def scan_9(form: Form) -> Form:
    """Opset 8 scans each row of a batch by itself."""
    raise Refused("Scan of opset 8 runs over a batch, which no later one does")


def scatter_11(form: Form) -> Form:
    """Scatter is called ScatterElements."""
    return replace(form, op_type="ScatterElements")


_axes_to_input = functools.partial(attribute_to_input, "axes")
_REDUCTIONS_18 = ("L1", "L2", "LogSum", "LogSumExp", "Max", "Mean", "Min", "Prod", "SumSquare")

ADAPTERS: MappingProxyType[tuple[str, int], Adapter] = MappingProxyType(
    {
        ("BatchNormalization", 9): batch_normalization_9,
        ("BatchNormalization", 14): batch_normalization_14,
        ("Clip", 11): clip_11,
        ("DFT", 20): dft_20,
        ("Dropout", 10): dropout_10,
        ("Dropout", 12): dropout_12,
        ("GridSample", 20): grid_sample_20,
        ("GroupNormalization", 21): group_normalization_21,
        ("Hardmax", 13): softmax_13,
        ("LogSoftmax", 13): softmax_13,
        ("Pad", 11): pad_11,
        **{(f"Reduce{kind}", 18): _axes_to_input for kind in _REDUCTIONS_18},
        ("ReduceSum", 13): _axes_to_input,
        ("Resize", 11): resize_11,
        ("Resize", 13): resize_13,
        ("RoiAlign", 16): roi_align_16,
        ("Scan", 9): scan_9,
        ("Scatter", 11): scatter_11,
        ("Slice", 10): slice_10,
        ("Softmax", 13): softmax_13,
        ("Split", 13): functools.partial(attribute_to_input, "split"),
        ("Split", 18): split_18,
        ("Squeeze", 13): _axes_to_input,
        ("TopK", 10): top_k_10,
        ("Unsqueeze", 13): _axes_to_input,
        ("Upsample", 9): upsample_9,
        ("Upsample", 10): upsample_10,
    }
)

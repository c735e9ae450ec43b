"""Why a layer that is in float stays so on a target, or how to quantize it."""

from __future__ import annotations

import onnx_ir as ir

from graphopt import walk
from graphopt.explaining.codes import only_reader
from graphopt.target import IntegerScheme, Target
from graphopt.unfit_layers import has_narrow_groups, is_attention_product, is_depthwise, unfit_for_tiles

_RECURRENT = ("LSTM", "GRU", "RNN")
_NO_KERNEL = "no integer kernel on this target"
_NOT_QUANTIZED = "not quantized"
_TOO_SMALL = "leave it in float: too small to pay there"
# How many operators on from a narrow convolution the slow one may be that it leads to.
_FARTHEST = 8
_SLOW = "leave it in float: slower in codes where codes begin or end with it"
_ATTENTION = "com.microsoft::MultiHeadAttention"
# Weights that are decoded or are views of others are made by at most ten operators in a row.
_DEEPEST = 16


def advise(node: ir.Node, target: Target, *, dynamic: bool) -> tuple[str, str]:
    """Return why a layer that neither reads nor writes codes does not, and what would help.

    Args:
        node: The layer.
        target: What it runs on.
        dynamic: Whether other layers of the model are quantized as they run.
    """
    name = node.op_type
    if f"com.microsoft::DynamicQuantize{name}" in target.fusions.written and name == "LSTM":
        return _NOT_QUANTIZED, "DynamicQuantizeLSTM, written as such"
    if name in _RECURRENT or (not target.static and not target.weight_only):
        return _NOT_QUANTIZED, _NO_KERNEL
    index = constant_factor(node)
    if index is None:
        return _of_two_activations(node, target)
    better = better_in_float(node, target, dynamic=dynamic)
    if better is not None:
        return better
    if target.static is not None and name in target.integer_ops:
        if index == 0:
            return "its weight is the left factor", f"`--passes quant:mode=weights --target {target.name}`"
        return _NOT_QUANTIZED, f"`--passes quant --target {target.name}`"
    if name in target.weight_only_ops:
        return _NOT_QUANTIZED, f"`--passes quant:mode=weights --target {target.name}`"
    return _NOT_QUANTIZED, _NO_KERNEL


def better_in_float(node: ir.Node, target: Target, *, dynamic: bool) -> tuple[str, str] | None:
    """Return why a layer with a constant weight pays in float, and what to do; None where it does not."""
    if constant_factor(node) is None:
        return None
    small = _too_small(node, target) or (_small_for_dynamic(node, target) if dynamic else None)
    if small is not None:
        return small, _TOO_SMALL
    slow = _slow_at_ends(node, target.static)
    return (slow, _SLOW) if slow is not None else None


def constant_factor(node: ir.Node) -> int | None:
    """Return which of the first two inputs of a product is its weight, a constant of two axes and more, or None."""
    for index in (1, 0) if node.op_type in ("Gemm", "MatMul") else (1,):
        tensor = walk.constant_tensor(node.inputs[index]) if index < len(node.inputs) else None
        if tensor is not None and len(walk.dims(tensor)) > 1:
            return index
    return None


def made_of_constants(value: ir.Value | None, depth: int = _DEEPEST) -> bool:
    """Return whether a value is computed from constants alone, which a runtime does once, as it loads the model."""
    if walk.constant_tensor(value) is not None:
        return True
    node = value.producer() if value is not None else None
    if node is None or not depth or walk.is_random(node) or any(walk.subgraphs(node)):
        return False
    return bool(node.inputs) and all(made_of_constants(one, depth - 1) for one in node.inputs if one is not None)


def has_made_weight(node: ir.Node) -> bool:
    """Return whether a product multiplies by a weight that is decoded, or a view of another one."""
    factors = node.inputs[:2] if node.op_type in ("Gemm", "MatMul") else node.inputs[1:2]
    return constant_factor(node) is None and any(map(made_of_constants, factors))


def _too_small(node: ir.Node, target: Target) -> str | None:
    """Return why a layer with a constant weight is too small for a target's integer kernels, or None if it is not."""
    index = constant_factor(node)
    if index is None or target.static is None or node.op_type not in target.integer_ops:
        return None
    weight, read = node.inputs[index], node.inputs[1 - index]
    assert weight is not None, "it holds a constant"
    if read is None:
        return None
    floats = target.static.weight.startswith("float")
    return unfit_for_tiles(node, weight, read, target.static.least_channels, floats=floats)


def _of_two_activations(node: ir.Node, target: Target) -> tuple[str, str]:
    """Return what `advise` does, of a product whose factors are both computed."""
    if has_made_weight(node):
        able = target.static is not None and node.op_type in target.integer_ops
        fix = f"`--passes quant:mode=static --target {target.name}`" if able else _NO_KERNEL
        return "its weight is made as the model is loaded", fix
    if node.op_type != "MatMul":
        return "its weight is no constant", "leave it in float: only constants are stored as codes"
    if is_attention_product(node) and (_ATTENTION in target.fast_ops or target.static is None):
        return "an attention product of two activations", "leave it in float: attention costs less as a whole"
    why = "a product of two activations"
    scheme = target.static
    if scheme is None or node.op_type not in target.integer_ops:
        return why, "leave it in float: only weights pay in codes there"
    if not scheme.quantize_outputs:
        return why, "leave it in float: the runtime fuses it with what is around it"
    return why, f"`--passes quant:mode=static --target {target.name}` on the float model"


def _small_for_dynamic(node: ir.Node, target: Target) -> str | None:
    index = constant_factor(node)
    tensor = walk.constant_tensor(node.inputs[index]) if index is not None else None
    if node.op_type not in target.dynamic_ops or tensor is None:
        return None
    least = target.dynamic_least
    return f"fewer than {least} inputs or outputs" if min(walk.dims(tensor)[-2:]) < least else None


def _slow_at_ends(node: ir.Node, scheme: IntegerScheme | None) -> str | None:
    """Return why a convolution, or the one it leads to, is slower in codes at an end of them, or None if it is not."""
    weight = node.inputs[1] if node.op_type == "Conv" else None
    if scheme is None or weight is None:
        return None
    if has_narrow_groups(node, weight, scheme.least_group):
        return f"a convolution in groups of fewer than {scheme.least_group} channels"
    first: ir.Node = node
    reader: ir.Node | None = node
    for _ in range(_FARTHEST):
        if reader is None or reader.graph is not first.graph or len(reader.outputs) != 1:
            return None
        if walk.is_onnx_op(reader, "Conv") and constant_factor(reader) is not None:
            if _outputs(reader) >= scheme.least_depthwise:
                return None
            if is_depthwise(reader, _weight(reader)):
                is_it = "" if reader is first else "leads to "
                return f"{is_it}a depthwise convolution of fewer than {scheme.least_depthwise} channels"
        reader = only_reader(reader.outputs[0])
    return None


def _weight(node: ir.Node) -> ir.Value:
    weight = node.inputs[1]
    assert weight is not None, "it is a constant"
    return weight


def _outputs(node: ir.Node) -> int:
    tensor = walk.constant_tensor(_weight(node))
    assert tensor is not None, "asked for of a constant weight"
    return walk.dims(tensor)[0]

"""What keeps a quantized operator from its integer kernel: dtypes, grids and weights, and what would help."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from graphopt import walk
from graphopt.explaining.codes import Codes
from graphopt.fusion_rules import Fusion

# How far ONNX Runtime 1.31 lets the scale of a bias be from the product of the two others.
_BIAS_RELATIVE, _BIAS_ABSOLUTE = 1e-2, 1e-6
_BYTE_BITS = 8
_OUTPUT_AXES = {"Conv": 0, "ConvTranspose": 1, "MatMul": 1}


class Obstacle(Exception):
    """Why an operator stays in float, and what would help."""

    def __init__(self, why: str, fix: str) -> None:
        super().__init__(why)
        self.why, self.fix = why, fix


def check_surplus(rule: Fusion, index: int) -> None:
    """Refuse codes in an input that the kernel wants in float."""
    if index == rule.float_bias:
        raise Obstacle("its bias is in codes", "a float bias")
    if rule.float_bias is None and rule.weights is None:
        raise Obstacle(f"input {index} is dequantized, too", "let it be what it was")


def check_stored_whole(rule: Fusion, first: Codes) -> None:
    """Refuse a table that is dequantized as a whole, in every run, for the rows that are read of it."""
    if rule.op == "Gather" and first.constant:
        why = "the whole table is dequantized in every run"
        raise Obstacle(why, "GatherBlockQuantized, or a Gather of the codes with the rows scaled behind it")


def check_other_dtypes(rule: Fusion, first: Codes, reads: Sequence[Codes], second: Codes | None) -> None:
    """Refuse dtypes that do not go with those of the first input."""
    if rule.weights is None:
        if len({code.dtype for code in reads}) > 1:
            raise mixed("its inputs are in codes of different dtypes", reads)
        return
    if second is not None and second.dtype not in rule.weights:
        raise Obstacle(f"{second.dtype} weights have no kernel here", f"{' or '.join(sorted(rule.weights))} weights")
    if second is not None and first.dtype == "int8" and second.dtype != "int8":
        raise Obstacle("int8 activations meet weights of another dtype", "int8 weights, or uint8 activations")


def check_factors(rule: Fusion, node: ir.Node) -> None:
    """Refuse factors the kernel does not have."""
    odd = [name for name in rule.factors if node.attributes.get_float(name, 1.0) != 1.0]
    if odd:
        raise Obstacle(f"`{odd[0]}` is not 1", "fold it into the weight or the bias")


def check_bias(rule: Fusion, node: ir.Node, bias: Codes, first: Codes, weight: Codes | None) -> str:
    """Refuse a bias the kernel cannot add to its sums; return what is wrong with one it adds all the same."""
    check_factors(rule, node)
    if bias.dtype != "int32":
        raise Obstacle(f"its bias is in {bias.dtype}", "int32, on the scales of input and weight multiplied")
    if weight is None or _on_grid(bias, first, weight):
        return ""
    if rule.bias_on_grid:
        raise Obstacle("the scale of its bias is not that of input and weight multiplied", "make it so")
    return "the kernel takes its bias to be on the scales of input and weight multiplied, and it is not: WRONG results"


def axis_remark(rule: Fusion, node: ir.Node, weight: Codes | None) -> str:
    """Return what is wrong where a weight has scales along another axis than the kernel reads them."""
    if rule.weights is None or weight is None or weight.scale is not None or not weight.constant:
        return ""
    expected = _OUTPUT_AXES.get(node.op_type, 0 if is_transposed(node) else 1)
    rank = len(weight.node.inputs[0].shape or ()) if weight.node.inputs[0] is not None else 0
    axis = weight.node.attributes.get_int("axis", 1)
    axis = axis + rank if axis < 0 else axis
    if rank and axis != expected:
        return f"its weight has scales along axis {axis}, which the kernel reads along axis {expected}: WRONG results"
    return ""


def check_scales(rule: Fusion, node: ir.Node, weight: Codes | None) -> None:
    """Refuse a matrix with several scales that are not those of its outputs, where the kernel looks."""
    if rule.weight_scales == "any" or weight is None or weight.scale is not None or not weight.constant:
        return
    tensor, scale = (walk.constant_tensor(value) for value in weight.node.inputs[:2])
    if tensor is None or scale is None or len(walk.dims(tensor)) != 2:
        return
    expected = 0 if is_transposed(node) else 1
    along = weight.node.attributes.get_int("axis", 1) % 2 == expected
    fits = along if rule.weight_scales == "placed" else scale.size == walk.dims(tensor)[expected]
    if weight.node.attributes.get_int("block_size", 0) or not fits:
        raise Obstacle("its weight has other scales than one for each output", "one scale for each output")


def check_weight(weight: Codes, dtypes: frozenset[str], least_block: int, whole_bytes: frozenset[str]) -> str:
    """Refuse a weight in few bits in a layout that no kernel reads; return what is wrong with one it misreads."""
    node = weight.node
    if weight.dtype not in dtypes:
        raise Obstacle(f"{weight.dtype} weights have no kernel here", f"{', '.join(sorted(dtypes))} weights")
    if len(node.outputs[0].uses()) != 1:
        raise Obstacle("its DQ has several readers", "one DQ for each of them")
    tensor, scale = walk.constant_tensor(node.inputs[0]), walk.constant_tensor(node.inputs[1])
    if tensor is None or scale is None or len(walk.dims(tensor)) != 2:
        raise Obstacle("its weight is no constant matrix", "a matrix of constant codes")
    axis, block = node.attributes.get_int("axis", 1) % 2, node.attributes.get_int("block_size", 0)
    if block:
        if block < least_block or block & (block - 1) or axis != 0:
            fix = f"blocks of a power of two from {least_block} along axis 0"
            raise Obstacle(f"its weight is in blocks of {block} along axis {axis}", fix)
    elif len(walk.dims(scale)) == 1 and (axis != 1 or scale.size != walk.dims(tensor)[1]):
        raise Obstacle("its weight has a scale for each input", "a scale for each output, or for each block")
    columns = walk.dims(tensor)[1]
    if weight.dtype in whole_bytes and columns * tensor.dtype.bitwidth % _BYTE_BITS:
        return f"the kernel takes rows of {weight.dtype} to begin with a new byte, and {columns} do not: WRONG results"
    return ""


def check_product(node: ir.Node, bias: ir.Value | None) -> None:
    """Refuse a Gemm, or a product with what is added to it, that is more than a product and a vector."""
    factors = [name for name in ("alpha", "beta") if node.attributes.get_float(name, 1.0) != 1.0]
    turned = [name for name in ("transA", "transB") if node.attributes.get_int(name, 0)]
    if factors or turned:
        raise Obstacle(f"`{(factors + turned)[0]}` is set", "the plain product A·B")
    shape = bias.shape if bias is not None else None
    if bias is not None and (shape is None or len(shape) != 1):
        raise Obstacle("its bias is no vector", "a bias of one axis")


def mixed(what: str, codes: Sequence[Codes]) -> Obstacle:
    """Return the obstacle of codes of different dtypes, which may be the runtime's own doing."""
    if {code.stored for code in codes} != {"int8"}:
        return Obstacle(what, "one dtype for all of them")
    why = (
        "the runtime makes uint8 of int8 codes only where one DQ alone reads them; with the others they no longer match"
    )
    return Obstacle(why, "uint8 activations")


def is_transposed(node: ir.Node) -> bool:
    """Return whether a Gemm reads its weight as outputs by inputs."""
    return node.attributes.get_int("transB", 0) != 0


def is_scalar(codes: Codes) -> bool:
    """Return whether a scale is one number, be it constant or not."""
    scale = codes.node.inputs[1]
    return scale is not None and scale.shape is not None and len(scale.shape) == 0


def _on_grid(bias: Codes, first: Codes, weight: Codes) -> bool:
    scales = [walk.constant_tensor(codes.node.inputs[1]) for codes in (bias, first, weight)]
    if any(scale is None for scale in scales):
        return True
    own, left, right = (scale.numpy().astype(np.float64).reshape(-1) for scale in scales if scale is not None)
    product = left * right
    if own.size not in (1, product.size) and product.size != 1:
        return False
    return bool(np.all(np.abs(own - product) <= _BIAS_ABSOLUTE + _BIAS_RELATIVE * np.abs(product)))

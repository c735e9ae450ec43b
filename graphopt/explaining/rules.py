"""The static prediction: which kernel a target's own fusion rules make of each quantized operator, and why not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import onnx_ir as ir

from graphopt import walk
from graphopt.explaining.advice import advise, better_in_float
from graphopt.explaining.codes import CodeReader, Codes, NotWritten, dtype_of, is_dequantize, is_quantize, only_reader
from graphopt.explaining.obstacles import (
    Obstacle,
    axis_remark,
    check_bias,
    check_factors,
    check_other_dtypes,
    check_product,
    check_scales,
    check_stored_whole,
    check_surplus,
    check_weight,
    is_scalar,
    is_transposed,
    mixed,
)
from graphopt.explaining.products import bias_of, dynamic_kernel, fits_gemm
from graphopt.fusion_rules import Fusion
from graphopt.target import Target

State = Literal["integers", "weights", "absorbed", "float"]

# Where the work of a network is: worth a line even where nothing about them is quantized.
LINEAR_OPS = ("Conv", "ConvTranspose", "Gemm", "MatMul", "LSTM", "GRU", "RNN")
_FLOATS = (None, ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.DOUBLE)
# Operators that keep weights in codes and compute in float.
WEIGHT_KERNELS = ("MatMulNBits", "GatherBlockQuantized", "QMoE", "MatMulBnb4")
_STANDARD_INTEGER_OPS = ("ConvInteger", "MatMulInteger", "QLinearConv", "QLinearMatMul")


@dataclass(frozen=True, eq=False)
class Prediction:
    """What is expected of one operator.

    Attributes:
        node: The operator.
        state: ``integers``: it computes on codes; ``weights``: it reads codes of weights and computes in float;
            ``absorbed``: the Q behind it does its work; ``float``: it computes in float.
        kernel: What runs.
        why: Why it runs in float, or nothing.
        fix: What would help.
        remark: What is wrong with it although it runs in integers, or nothing.
    """

    node: ir.Node
    state: State
    kernel: str
    why: str = ""
    fix: str = ""
    remark: str = ""


def predict(model: ir.Model, target: Target) -> list[Prediction]:
    """Return what becomes of each operator that is quantized, or could be, in graph order.

    Operators in nested graphs are included; those in bodies of functions are not.

    Args:
        model: A model whose shapes have been inferred.
        target: Whose rules hold.
    """
    nodes = [node for graph in walk.graphs_within(model.graph) for node in graph]
    dynamic = any(node.op_type == "DynamicQuantizeLinear" for node in nodes)
    predictor = _Predictor(target, walk.opset(model), dynamic)
    return [found for node in nodes if (found := predictor.of(node)) is not None]


class _Predictor:
    def __init__(self, target: Target, opset: int, dynamic: bool) -> None:
        self.rules, self.target, self.opset, self.dynamic = target.fusions, target, opset, dynamic
        self.codes = CodeReader(self.rules, opset)

    def of(self, node: ir.Node) -> Prediction | None:
        """Return what becomes of a node, or None where integers are no question for it."""
        if is_quantize(node) or is_dequantize(node) or node.op_type == "DynamicQuantizeLinear":
            return None
        if _computes_on_codes(node):
            return self._written(node)
        if node.domain not in walk.ONNX_DOMAINS or not node.outputs or not _is_float(node):
            return None
        joined = self._joined_product(node)
        if joined is not None:
            found = self._unit(joined, node)
            return replace(found, node=node) if found is not None else None
        return self._unit(node, self._bias_add(node))

    def _unit(self, node: ir.Node, adder: ir.Node | None) -> Prediction | None:
        if not self._is_concerned(node, adder):
            if node.op_type in LINEAR_OPS:
                return Prediction(node, "float", node.op_type, *advise(node, self.target, dynamic=self.dynamic))
            return None
        if walk.is_onnx_op(node, "Relu", "Clip"):
            return self._activation(node)
        if self.rules.of(node.op_type) is None and node.op_type not in LINEAR_OPS and not self._is_amid_codes(node):
            return None  # codes only begin or end here
        try:
            return self._fused(node, adder)
        except Obstacle as obstacle:
            pays = better_in_float(node, self.target, dynamic=self.dynamic) if node.op_type in LINEAR_OPS else None
            return Prediction(node, "float", node.op_type, *(pays or (obstacle.why, obstacle.fix)))

    def _is_concerned(self, node: ir.Node, adder: ir.Node | None) -> bool:
        """Return whether a node reads or writes codes."""
        if any(self.codes.read_by(node, index) is not None for index in range(len(node.inputs))):
            return True
        return self._ends_in_codes(adder or node)

    def _is_amid_codes(self, node: ir.Node) -> bool:
        """Return whether a node reads codes and writes some, rather than being where they begin or end."""
        reads = any(self.codes.read_by(node, index) is not None for index in range(len(node.inputs)))
        return reads and self._ends_in_codes(node)

    def _serves_others(self, node: ir.Node) -> bool:
        """Return whether what makes the codes a node reads, and what reads those it writes, have integer kernels."""
        read = [codes for value in node.inputs if (codes := self.codes.read(value)) is not None and not codes.constant]
        sources = [quantize.producer() for one in read if (quantize := one.node.inputs[0]) is not None]
        made = [source.inputs[0] for source in sources if source is not None]
        makers = [value.producer() for value in made if value is not None]
        return all(map(self._is_fusible, makers)) and any(map(self._is_fusible, _readers_of_codes(node)))

    def _is_fusible(self, node: ir.Node | None) -> bool:
        """Return whether a node, or what a Relu or Clip stands behind, is of a kind that has an integer kernel."""
        if node is not None and walk.is_onnx_op(node, "Relu", "Clip"):
            node = node.inputs[0].producer() if node.inputs[0] is not None else None
        return node is not None and self.rules.of(node.op_type) is not None

    def _ends_in_codes(self, node: ir.Node) -> bool:
        return any(isinstance(self.codes.written(value), Codes) for value in node.outputs)

    def _written(self, node: ir.Node) -> Prediction:
        name = node.op_type
        full = name if node.domain in walk.ONNX_DOMAINS else f"{node.domain}::{name}"
        if full not in self.rules.written:
            return Prediction(
                node, "float", name, f"`{self.target.name}` does not take {name}", "write Q and DQ instead"
            )
        if name in WEIGHT_KERNELS:
            return Prediction(node, "weights", name)
        kernel = dynamic_kernel(node) if self.rules.dynamic and name == "MatMulInteger" else name
        return Prediction(node, "integers", kernel, remark=self._signed_remark(node.inputs[0]))

    def _signed_remark(self, value: ir.Value | None) -> str:
        signed = self.rules.rewrites_int8 and value is not None and value.dtype == ir.DataType.INT8
        return "int8 activations take a slow kernel here: uint8 ones are as exact" if signed else ""

    def _activation(self, node: ir.Node) -> Prediction | None:
        if not any(is_quantize(use.node) for use in node.outputs[0].uses()):
            return None
        if not self.rules.drops_activations or self.codes.clips_nothing(node):
            return Prediction(node, "absorbed", "QuantizeLinear")
        why = "the codes behind it go beyond what it lets through, so that it runs in float"
        return Prediction(node, "float", node.op_type, why, "an asymmetric range that ends where it clips")

    def _fused(self, node: ir.Node, adder: ir.Node | None) -> Prediction:
        weights = self._weight_only(node, adder)
        if weights is not None:
            return weights
        rule = self.rules.of("Gemm" if adder is not None else node.op_type)
        if rule is None:
            needed = self._serves_others(node)
            fix = "nothing: what is around it needs the codes" if needed else "leave Q and DQ away around it"
            raise Obstacle(f"no integer kernel for {node.op_type}", fix + ": they only cost time" * (not needed))
        if self.opset < rule.since:
            raise Obstacle(f"takes codes only from opset {rule.since}", f"`--passes opset:to={rule.since},...`")
        inputs = [*node.inputs, *bias_of(adder, node)]
        core = adder or node
        codes = self._inputs(rule, node, inputs, core)
        remark = self._check_inputs(rule, node, inputs, codes)
        to_float = self._check_outputs(rule, core, codes[0])
        kernel = rule.kernel_to_float if to_float and rule.kernel_to_float else rule.kernel
        if kernel == rule.kernel:
            check_scales(rule, node, codes[1] if len(codes) > 1 else None)
        if rule.weights is not None and codes[0] is not None and codes[0].dtype == "int8":
            remark = remark or (self.rules.rewrites_int8 and "int8 activations take a slow kernel here") or ""
        return Prediction(node, "integers", kernel, remark=remark)

    def _inputs(
        self, rule: Fusion, node: ir.Node, inputs: Sequence[ir.Value | None], core: ir.Node
    ) -> list[Codes | None]:
        """Return the codes of each input; None only for a float that the kernel or the runtime deals with."""
        codes = [self.codes.read(value) for value in inputs]
        if codes:
            codes[0] = self.codes.read_by(node, 0)
        present = next((code for code in codes if code is not None), None)
        wanted = range(len(inputs)) if rule.reads is None else rule.reads
        leading = codes[wanted[0]] if len(wanted) and wanted[0] < len(codes) else None
        if leading is not None:
            if not self._ends_in_codes(core):
                check_stored_whole(rule, leading)
            self._check_dtype(rule, leading)
        elif len(codes) > 1 and codes[1] is not None and codes[1].constant and 1 in wanted and rule.weights is not None:
            why = "only its weight is in codes, and dequantized in every run"
            raise Obstacle(why, "codes for its input, too, or the weight in float")
        for index, value in enumerate(inputs):
            if value is None or (codes[index] is not None and index in (*wanted, rule.bias)):
                continue
            if codes[index] is not None:
                check_surplus(rule, index)
            elif index in wanted and not self._quantized_by_runtime(rule, index, inputs, codes, core):
                constant = walk.constant_tensor(value) is not None
                what = "a float constant" if constant else "float"
                if not rule.one_read or present is None:
                    fix = "store it as codes behind DQ" if constant else "put Q and DQ in front of it"
                    raise Obstacle(f"input {index} is {what}", fix)
        return codes

    def _quantized_by_runtime(
        self,
        rule: Fusion,
        index: int,
        inputs: Sequence[ir.Value | None],
        codes: Sequence[Codes | None],
        core: ir.Node,
    ) -> bool:
        """Return whether the runtime quantizes a constant float weight or bias itself, on the way to a Q."""
        if not rule.quantizes_floats or index not in (1, rule.bias) or codes[0] is None or codes[0].scale is None:
            return False
        if not self._leads_to_codes(core) or walk.constant_tensor(inputs[index]) is None:
            return False
        bias = inputs[2] if len(inputs) > 2 else None
        if index == 1:
            return bias is None or _rank_of_constant(bias) == 1
        weight = codes[1]
        if _rank_of_constant(bias) != 1:
            return False
        if weight is None or weight.scale is not None:
            return True
        tensor = walk.constant_tensor(weight.node.inputs[1])
        expected = 0 if core.op_type == "Conv" or is_transposed(core) else 1
        own = weight.node.attributes.get_int("axis", 1)
        bias_size = walk.constant_tensor(bias)
        assert bias_size is not None, "its rank is known"
        return tensor is not None and tensor.size == bias_size.size and own % 4 in (expected, expected % 4)

    def _leads_to_codes(self, node: ir.Node) -> bool:
        """Return whether one reader after the other leads through Relu and Clip to a Q."""
        value = node.outputs[0]
        while (reader := only_reader(value)) is not None:
            if is_quantize(reader):
                return True
            if not walk.is_onnx_op(reader, "Relu", "Clip"):
                break
            value = reader.outputs[0]
        return isinstance(self.codes.written(value), Codes)

    def _check_inputs(
        self, rule: Fusion, node: ir.Node, inputs: Sequence[ir.Value | None], codes: Sequence[Codes | None]
    ) -> str:
        """Refuse dtypes and grids the kernel does not take; return what is wrong with what it takes."""
        reads = [code for index, code in enumerate(codes) if code is not None and index != rule.bias]
        first = codes[0] if codes and codes[0] is not None else reads[0]
        second = codes[1] if len(codes) > 1 else None
        check_other_dtypes(rule, first, reads, second)
        for index in rule.zero_points:
            code = codes[index]
            if code is not None and not code.has_zero:
                raise Obstacle(f"the DQ of input {index} has no zero point", "write its zero point down, even if 0")
        if rule.symmetric and any(code.zero != 0 for code in reads if code.scale is not None):
            raise Obstacle("a zero point is not 0", "symmetric activations")
        if rule.one_scale and first.scale is None and not (rule.op == "Gemm" and is_scalar(first)):
            raise Obstacle("its activations have several scales, or scales that vary", "one constant scale")
        bias = codes[rule.bias] if rule.bias is not None and len(codes) > rule.bias else None
        if bias is not None:
            return check_bias(rule, node, bias, first, second) or axis_remark(rule, node, second)
        has_bias = rule.bias is not None and len(inputs) > rule.bias and inputs[rule.bias] is not None
        if has_bias:
            check_factors(rule, node)
        remark = axis_remark(rule, node, second)
        if second is None and len(inputs) > 1 and rule.weights is not None and not remark:
            return "the runtime quantizes its weight itself, to int8 with one scale"
        return remark

    def _check_dtype(self, rule: Fusion, first: Codes) -> None:
        if first.dtype in rule.codes:
            return
        fix = f"{' or '.join(sorted(rule.codes))} activations"
        if first.dtype == "int32":
            why = "it adds int32 codes, which only a Gemm takes, and a MatMul in front is none where sizes vary"
            raise Obstacle(why, "a float bias, or fixed sizes (`--set-dim`)")
        if first.dtype == "int8" and self.rules.rewrites_int8:
            raise Obstacle("int8 activations have no kernel here unless one DQ alone reads them", fix)
        raise Obstacle(f"{first.dtype} activations have no kernel here", fix)

    def _check_outputs(self, rule: Fusion, core: ir.Node, first: Codes | None) -> bool:
        """Refuse outputs the kernel cannot write; return whether it writes floats."""
        if rule.writes == "float":
            return True
        outputs = [value for value in core.outputs if value.name]
        to_float = False
        for value in outputs:
            written = self._behind_activation(value, rule)
            if isinstance(written, NotWritten):
                partly = any(is_quantize(use.node) for use in value.uses())
                if rule.writes == "codes" or partly:
                    raise Obstacle(written.why, written.fix)
                to_float = True
                continue
            if first is not None and written.dtype != first.dtype:
                raise mixed(f"{first.dtype} goes in and {written.dtype} comes out", (first, written))
            if rule.same_grid and (first is None or not first.same_grid(written)):
                raise Obstacle(
                    "its Q and DQ have different scales or zero points", "one grid for both: it only moves values"
                )
            if rule.symmetric and written.zero != 0:
                raise Obstacle("a zero point is not 0", "symmetric activations")
        return to_float

    def _behind_activation(self, value: ir.Value, rule: Fusion) -> Codes | NotWritten:
        tail = self.codes.tail_of(value)
        if tail is None:
            return self.codes.written(value)
        output = tail.outputs[0]
        reader = only_reader(output)
        if reader is None:
            return self.codes.written(value)
        if not self.rules.drops_activations or self.codes.clips_nothing(tail):
            return self.codes.written(output)
        if not is_quantize(reader):
            if rule.writes == "codes":
                return self.codes.written(output)
            raise Obstacle(f"a {tail.op_type} and no Q follows it", "put Q and DQ behind the activation")
        raise Obstacle(
            f"the {tail.op_type} behind it lets less through than the codes",
            "an asymmetric range that ends where it clips",
        )

    def _weight_only(self, node: ir.Node, adder: ir.Node | None) -> Prediction | None:
        """Return the kernel that reads the codes of a weight, where it computes in float."""
        rule = self.rules.weights
        if rule is None or node.op_type not in rule.ops or len(node.inputs) < 2:
            return None
        weight, data = self.codes.read(node.inputs[1]), self.codes.read(node.inputs[0])
        if weight is None or not weight.constant or (data is not None and data.dtype not in rule.floats):
            return None
        remark = check_weight(weight, rule.codes, rule.least_block, rule.whole_bytes)
        if node.op_type == "Gemm" or adder is not None:
            check_product(node, next(iter([*node.inputs[2:], *bias_of(adder, node)]), None))
        tail = self.codes.tail_of((adder or node).outputs[0])
        if tail is not None and only_reader(tail.outputs[0]) is not None:
            raise Obstacle(f"the {tail.op_type} behind it keeps {rule.kernel} away", f"write {rule.kernel} itself")
        if not self._ends_in_floats((adder or node).outputs[0], rule.floats):
            if data is None:
                raise Obstacle("its result is quantized and its input is not", "quantize both, or neither")
            wide = " or ".join(sorted(rule.floats))
            raise Obstacle(f"its result is not quantized to {wide} alone", f"one Q and DQ in {wide}, or none")
        return Prediction(node, "weights", rule.kernel, remark=remark)

    def _ends_in_floats(self, result: ir.Value, floats: frozenset[str]) -> bool:
        """Return whether nothing quantizes a result, or all that reads it does, to codes that are as good as floats."""
        takers = [use.node for use in result.uses() if is_quantize(use.node)]
        if not takers:
            written = self.codes.written(result)
            return not isinstance(written, Codes) or written.dtype in floats
        alone = len(takers) == len(result.uses()) and not result.is_graph_output()
        return alone and all(dtype_of(taker) in floats for taker in takers)

    def _bias_add(self, node: ir.Node) -> ir.Node | None:
        """Return the Add behind a MatMul that the runtime joins with it, or None."""
        if not self.rules.joins_bias or not walk.is_onnx_op(node, "MatMul"):
            return None
        adder = only_reader(node.outputs[0])
        if (
            adder is None
            or not walk.is_onnx_op(adder, "Add")
            or adder.graph is not node.graph
            or len(adder.inputs) != 2
            or None in adder.inputs
            or adder.inputs[0] is adder.inputs[1]
        ):
            return None
        return adder if fits_gemm(node, next(bias_of(adder, node))) else None

    def _joined_product(self, node: ir.Node) -> ir.Node | None:
        if not walk.is_onnx_op(node, "Add"):
            return None
        makers = [value.producer() for value in node.inputs if value is not None]
        return next((maker for maker in makers if maker is not None and self._bias_add(maker) is node), None)


def _rank_of_constant(value: ir.Value | None) -> int | None:
    tensor = walk.constant_tensor(value)
    return len(walk.dims(tensor)) if tensor is not None else None


def _readers_of_codes(node: ir.Node) -> list[ir.Node]:
    """Return what reads the floats behind the Q and DQ behind a node."""
    reached = list(node.outputs)
    for step in (is_quantize, is_dequantize):
        reached = [out for value in reached for use in value.uses() if step(use.node) for out in use.node.outputs]
    return [use.node for value in reached for use in value.uses()]


def _computes_on_codes(node: ir.Node) -> bool:
    if node.domain in walk.ONNX_DOMAINS:
        return node.op_type in _STANDARD_INTEGER_OPS
    own = node.op_type.startswith(("Q", "DynamicQuantize", "MatMulInteger")) and node.op_type != "QuickGelu"
    return node.domain == "com.microsoft" and (own or node.op_type in WEIGHT_KERNELS)


def _is_float(node: ir.Node) -> bool:
    return next((value.dtype for value in node.outputs if value.dtype is not None), None) in _FLOATS

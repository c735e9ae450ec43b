"""In which codes each value is read and written, as a runtime sees it once it has moved Q and DQ about."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx_ir as ir

from graphopt import walk
from graphopt.fusion_rules import FusionRules

_DOMAINS = (*walk.ONNX_DOMAINS, "com.microsoft")
_CODE_LIMITS = {"uint8": (0, 255), "int8": (-128, 127), "uint16": (0, 65535), "int16": (-32768, 32767)}
# From a code of int8 to that of uint8 for the same number.
_SIGNED_TO_UNSIGNED = 128
# What Clip leaves as it is where it has no limit.
_NO_LIMIT = (float(np.finfo(np.float32).min), float(np.finfo(np.float32).max))


@dataclass(frozen=True, eq=False)
class Codes:
    """Codes of a value, and the grid they are on.

    Attributes:
        node: The Q or DQ that says so.
        dtype: Of the codes as the kernels will see them.
        scale: The one scale of the tensor, or None where it has several or they vary.
        zero: The one zero point, 0 where none is given, or None.
        has_zero: Whether a zero point is written down.
        constant: Whether the codes themselves are constant.
    """

    node: ir.Node
    dtype: str
    scale: float | None
    zero: int | None
    has_zero: bool
    constant: bool = False

    @property
    def stored(self) -> str:
        """Dtype of the codes as the model has them."""
        return dtype_of(self.node)

    @property
    def one_grid(self) -> bool:
        """Whether the whole tensor has one constant scale and zero point."""
        return self.scale is not None and self.zero is not None

    def same_grid(self, other: Codes) -> bool:
        """Return whether two tensors of codes can be told apart by nothing but their numbers."""
        known = self.one_grid and other.one_grid and self.has_zero and other.has_zero
        return known and (self.dtype, self.scale, self.zero) == (other.dtype, other.scale, other.zero)


@dataclass(frozen=True)
class NotWritten:
    """Why what a node makes does not end up in codes, and what would help."""

    why: str
    fix: str


def is_quantize(node: ir.Node | None) -> bool:
    """Return whether a node is QuantizeLinear, of ONNX or of ONNX Runtime."""
    return node is not None and node.op_type == "QuantizeLinear" and _is_whole(node)


def is_dequantize(node: ir.Node | None) -> bool:
    """Return whether a node is DequantizeLinear, of ONNX or of ONNX Runtime."""
    return node is not None and node.op_type == "DequantizeLinear" and _is_whole(node)


def _is_whole(node: ir.Node) -> bool:
    """Return whether a Q or DQ has what its operator asks for; a model that breaks the standard may lack it."""
    return node.domain in _DOMAINS and len(node.inputs) > 1 and None not in node.inputs[:2] and bool(node.outputs)


def only_reader(value: ir.Value) -> ir.Node | None:
    """Return the node that alone reads a value, once, or None; outputs of a graph are read from outside, too."""
    uses = value.uses()
    return next(iter(uses)).node if len(uses) == 1 and not value.is_graph_output() else None


def captured_behind_moves(model: ir.Model, rules: FusionRules) -> bool:
    """Return whether a nested graph reads what a runtime carries a DQ across.

    ONNX Runtime 1.31 takes the capture for an input of the If, Loop or Scan, and ends the process.
    """
    moves = [op for op, _ in rules.propagates]
    nodes = [node for graph in walk.graphs_within(model.graph) for node in graph]
    waiting = [value for node in nodes if is_dequantize(node) for value in node.outputs]
    seen: set[ir.Value] = set()
    while waiting:
        value = waiting.pop()
        for use in value.uses():
            if not walk.is_onnx_op(use.node, *moves) or use.idx != 0:
                continue
            for behind in set(use.node.outputs) - seen:
                if any(inner.node.graph is not use.node.graph for inner in behind.uses()):
                    return True
                seen.add(behind)
                waiting.append(behind)
    return False


class CodeReader:
    """Tells in which codes values are read and written under a runtime's rules.

    Runtimes first carry each Q up across moves that nothing else reads, then each DQ down across moves; what they carry
    becomes a Q and a DQ for each reader. ONNX Runtime 1.31 does so in its QDQPropagationTransformer.

    Args:
        rules: The runtime's.
        opset: Version of the ONNX operators the model imports.
    """

    def __init__(self, rules: FusionRules, opset: int) -> None:
        self._rules = rules
        self._moves = {op for op, since in rules.propagates if opset >= since}
        self._read: dict[ir.Value, Codes | None] = {}

    def read(self, value: ir.Value | None) -> Codes | None:
        """Return the codes behind a float value, or None where it is float."""
        if value is None:
            return None
        if value not in self._read:
            self._read[value] = self._find(value)
        return self._read[value]

    def read_by(self, node: ir.Node, index: int) -> Codes | None:
        """Return the codes a node reads: those of its input, or of a Q that the runtime carries up in front of it."""
        value = node.inputs[index]
        if value is None or index != 0 or not self._is_move(node) or is_dequantize(value.producer()):
            return self.read(value)
        alone = value.producer() is None or only_reader(value) is node
        behind = self._carried_up(node.outputs[0]) if alone and walk.constant_tensor(value) is None else None
        return self._between(behind, 1) if behind is not None else self.read(value)

    def written(self, value: ir.Value) -> Codes | NotWritten:
        """Return the codes that a value goes into, and nowhere else, or why it does not."""
        takers = [use.node for use in value.uses() if is_quantize(use.node) and use.idx == 0]
        others = [use.node for use in value.uses() if not (is_quantize(use.node) and use.idx == 0)]
        source = self._moved(value)
        if value.is_graph_output():
            fix = "put Q and DQ in front of the output, too"
            return self._follow(source, value) if source else NotWritten("makes an output of the model", fix)
        if takers and not others:
            return self._taken(takers)
        if takers:
            why = f"its result is also read in float, by {_ops(others)}"
            return NotWritten(why, "let all read it behind one Q and DQ")
        carried = self._carried_up(value)
        if carried is not None:
            return carried
        if source is not None and others:
            return self._follow(source, value)
        why = f"its result is not quantized: {_ops(others) or 'nothing'} reads it in float"
        return NotWritten(why, "put Q and DQ behind it")

    def _carried_up(self, value: ir.Value) -> Codes | None:
        """Return the codes of the Q that takes a value, or that the runtime carries up to it across moves."""
        reader = only_reader(value)
        if reader is None:
            takers = [use.node for use in value.uses()]
            taken = self._taken(takers) if takers and all(map(is_quantize, takers)) else None
            return taken if isinstance(taken, Codes) and taken.one_grid and not value.is_graph_output() else None
        if is_quantize(reader):
            codes = self._taken([reader])
            return codes if isinstance(codes, Codes) and codes.one_grid else None
        if not self._is_move(reader) or reader.inputs[0] is not value:
            return None
        behind = self._carried_up(reader.outputs[0])
        return self._between(behind, 1) if behind is not None else None

    def tail_of(self, value: ir.Value) -> ir.Node | None:
        """Return the Relu or Clip that alone reads a value, or None."""
        node = only_reader(value)
        own_graph = node is not None and node.graph is _graph_of(value)
        return node if node is not None and own_graph and walk.is_onnx_op(node, "Relu", "Clip") else None

    def clips_nothing(self, tail: ir.Node) -> bool:
        """Return whether the Q behind a Relu or Clip clips all that it would."""
        takers = [use.node for use in tail.outputs[0].uses()]
        if len(takers) != 1 or not is_quantize(takers[0]) or tail.outputs[0].is_graph_output():
            return False
        codes = _codes(takers[0])
        if codes.scale is None or codes.zero is None or codes.dtype not in _CODE_LIMITS or codes.scale <= 0:
            return False
        low, high = _CODE_LIMITS[codes.dtype]
        if tail.op_type == "Relu":
            return codes.zero == low
        limits = _clip_limits(tail)
        if limits is None:
            return False
        least, most = (np.rint(limit / codes.scale) + codes.zero for limit in limits)
        return bool(least <= low and most >= high)

    def _find(self, value: ir.Value) -> Codes | None:
        node = value.producer()
        if is_dequantize(node):
            assert node is not None
            return self._dequantized(node)
        source = self._moved(value)
        if source is None or not any(not is_quantize(use.node) for use in value.uses()):
            return None
        return self._follow(source, value)

    def _dequantized(self, node: ir.Node) -> Codes:
        source = node.inputs[0]
        codes = _codes(node)
        quantize = source.producer() if source is not None else None
        # A constant that is quantized and dequantized is stored as codes when the model is loaded.
        stored = walk.constant_tensor(quantize.inputs[0] if is_quantize(quantize) and quantize else source)
        if stored is not None:
            return replace(codes, constant=True)
        if source is None or quantize is None or not is_quantize(quantize) or source.is_graph_output():
            return codes
        own = _codes(quantize)
        if not own.has_zero or own.zero != codes.zero:
            return codes
        return self._between(codes, _readers(source))

    def _between(self, codes: Codes, readers: int) -> Codes:
        """Return codes as they are between a Q and so many DQ: in uint8, if the runtime makes them so."""
        if not (self._rules.rewrites_int8 and codes.stored == "int8" and readers == 1):
            return replace(codes, **_own_grid(codes.node))
        if not codes.has_zero or codes.zero is None:
            return replace(codes, **_own_grid(codes.node))
        own = _codes(codes.node)
        return replace(codes, dtype="uint8", zero=None if own.zero is None else own.zero + _SIGNED_TO_UNSIGNED)

    def _moved(self, value: ir.Value) -> Codes | None:
        """Return the codes that a runtime carries over from in front of the move that makes a value."""
        node = value.producer()
        if node is None or not self._is_move(node):
            return None
        if value.is_graph_output() and value.uses():
            return None
        source = self.read_by(node, 0)
        return source if source is not None and source.one_grid else None

    def _follow(self, source: Codes, value: ir.Value) -> Codes:
        """Return the codes of a Q and DQ that the runtime puts behind a move: one DQ for each reader, or the output."""
        readers = sum(1 for use in value.uses() if not is_quantize(use.node)) or 1
        return replace(self._between(source, readers), constant=False)

    def _taken(self, takers: list[ir.Node]) -> Codes | NotWritten:
        first = takers[0]
        if any(list(other.inputs[1:]) != list(first.inputs[1:]) for other in takers[1:]):
            return NotWritten(f"its result is quantized {len(takers)} times", "let one Q serve all readers")
        codes = _codes(first)
        target = first.outputs[0]
        if target.is_graph_output():
            return codes
        readers = sum(_readers(taker.outputs[0]) for taker in takers)
        dequantized = [use.node for use in target.uses() if is_dequantize(use.node)]
        agrees = len(dequantized) == 1 and _codes(dequantized[0]).has_zero
        return self._between(codes, readers) if agrees else codes

    def _is_move(self, node: ir.Node) -> bool:
        return walk.is_onnx_op(node, *self._moves)


def _graph_of(value: ir.Value) -> ir.Graph | ir.Function | None:
    producer = value.producer()
    return producer.graph if producer is not None else None


def _ops(nodes: Iterable[ir.Node]) -> str:
    return ", ".join(sorted({node.op_type for node in nodes}))


def _readers(codes: ir.Value) -> int:
    """Count the DQ that read codes once each has a single reader of its own."""
    return sum(max(1, len(use.node.outputs[0].uses())) for use in codes.uses())


def _codes(node: ir.Node) -> Codes:
    scale = walk.constant_tensor(node.inputs[1])
    given = node.inputs[2] if len(node.inputs) > 2 else None
    zero = walk.constant_tensor(given)
    blocked = node.attributes.get_int("block_size", 0) > 0
    return Codes(
        node=node,
        dtype=dtype_of(node),
        scale=float(scale.numpy().reshape(-1)[0]) if scale is not None and scale.size == 1 and not blocked else None,
        zero=0 if given is None else int(zero.numpy().reshape(-1)[0]) if zero is not None and zero.size == 1 else None,
        has_zero=given is not None,
    )


def _own_grid(node: ir.Node) -> dict[str, Any]:
    own = _codes(node)
    return {"dtype": own.dtype, "zero": own.zero}


def dtype_of(node: ir.Node) -> str:
    """Return the dtype of the codes that a Q makes or a DQ reads."""
    given = node.inputs[2] if len(node.inputs) > 2 else None
    known = given.dtype if given is not None else None
    if known is None and given is not None and given.const_value is not None:
        known = given.const_value.dtype
    if known is None and is_dequantize(node) and node.inputs[0] is not None:
        source = node.inputs[0]
        maker = source.producer()
        if maker is not None and is_quantize(maker):
            return dtype_of(maker)
        tensor = walk.constant_tensor(source)
        known = source.dtype or (tensor.dtype if tensor is not None else None)
    if known is None and is_quantize(node):
        known = ir.DataType(node.attributes.get_int("output_dtype", 0) or ir.DataType.UINT8.value)
    return known.name.lower() if known is not None else "unknown"


def _clip_limits(node: ir.Node) -> tuple[float, float] | None:
    """Return what a Clip clips to, or None where it is not constant."""
    limits = [node.attributes.get_float("min", _NO_LIMIT[0]), node.attributes.get_float("max", _NO_LIMIT[1])]
    for index, value in enumerate(node.inputs[1:3]):
        if value is None:
            continue
        tensor = walk.constant_tensor(value)
        if tensor is None or tensor.size != 1:
            return None
        limits[index] = float(tensor.numpy().reshape(-1)[0])
    return limits[0], limits[1]

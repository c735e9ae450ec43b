"""Weight-only quantization: weights stored as integers, arithmetic as before."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

import onnx_ir as ir

from graphopt import walk
from graphopt.authoring import Context
from graphopt.report import show_bytes

from ..analyses.linear_layers import LinearLayer, as_linear_layer, is_lookup
from ..analyses.selection import Selection
from .integer_weights import PER_CHANNEL_OPSET, StoredWeight, WeightStore, weight_tensor

_RULE = "quant-weights"
# What the nodes, names and shapes that bring a weight back to float take in a file, roughly.
_OVERHEAD_BYTES = 256
_BYTES_PER_SCALE = 4
# What is stored in fewer bits here. Codes and scales of both are multiplied in float32, so that no scale is too small.
_FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16)


def quantize_weights(
    model: ir.Model,
    ctx: Context,
    selection: Selection,
    weights: WeightStore,
    *,
    is_rest: bool = False,
    instead_of: tuple[str, Mapping[ir.Value, str]] | None = None,
    in_float: frozenset[ir.Node] = frozenset(),
) -> None:
    """Store the weights of linear layers and the tables of embeddings as int8.

    A matrix is read through a DequantizeLinear in the form ONNX Runtime computes on directly (MatMulNBits). Any
    other weight becomes Mul(Cast(codes), scales), which every runtime folds to the float weight when it loads
    the model; a DequantizeLinear would be run anew for each input, as ONNX Runtime 1.31 runs one whose codes several
    read (two products by one matrix of 256×256: 40 times slower). A table is gathered in integers.

    Args:
        model: The model, changed in place.
        ctx: Target and rewriter.
        selection: Nodes whose weights may be stored as integers.
        weights: Where weights are stored.
        is_rest: Whether other weights have been stored already, so that finding none is nothing to speak of.
        instead_of: The format that was asked for, and why weights do not take it; None where that is int8.
        in_float: Nodes that must not compute on the integers: the runtime would round what they read.
    """
    lowering = _Lowering(ctx, weights, walk.opset(model) >= PER_CHANNEL_OPSET, in_float)
    chosen: dict[ir.Value, LinearLayer] = {}
    left: dict[ir.Value, tuple[str, str]] = {}
    for node in walk.every_node(model):
        layer = _weight_of(node)
        if layer is None or not selection.allows(node):
            continue
        reason = _obstacle(layer, ctx, selection, weights.per_channel)
        if reason is None:
            chosen.setdefault(layer.weight, layer)
        else:
            left.setdefault(layer.weight, (node.op_type, reason))
    before = after = 0
    for weight, layer in ctx.track(chosen.items(), "rounding"):
        tensor = weight_tensor(layer)
        before, after = before + tensor.nbytes, after + tensor.size
        lowering.lower(weight, layer)
    reasons = Counter(reason for weight, reason in left.items() if weight not in chosen)
    if chosen:
        _summarise(chosen, before, after, lowering, instead_of)
    if reasons:
        parts = ", ".join(f"{count} {operator} ({why})" for (operator, why), count in reasons.most_common())
        ctx.note(f"weights left in float: {parts}", left=reasons.total())
    if not chosen and not reasons and not is_rest:
        ctx.note("no weight to store: no linear layer or table that may be changed has a constant one")


def _weight_of(node: ir.Node) -> LinearLayer | None:
    """Return a node's constant float weight as a layer; a table counts as one whose rows are outputs."""
    if not is_lookup(node):
        return as_linear_layer(node)
    table, indices = node.inputs
    tensor = walk.constant_tensor(table)
    if table is None or tensor is None or indices is None:
        return None
    if not tensor.dtype.is_floating_point() or len(tensor.shape) != 2 or _holds_scales(node, tensor):
        return None
    return LinearLayer(node, indices, table, 0, 0, None)


def _holds_scales(node: ir.Node, table: ir.TensorProtocol) -> bool:
    """Return whether what is looked up are scales of a table that is stored as codes already."""
    readers = [use.node for use in node.outputs[0].uses()]
    return walk.dims(table)[1] == 1 or any(walk.is_onnx_op(reader, "DequantizeLinear") for reader in readers)


def _obstacle(layer: LinearLayer, ctx: Context, selection: Selection, per_channel: bool) -> str | None:
    """Return why a weight is not stored in integers, or None where it is."""
    tensor = weight_tensor(layer)
    if not is_lookup(layer.node) and not walk.is_onnx_op(layer.node, *ctx.target.weight_only_ops):
        return f"`{ctx.target.name}` reads no stored integers there"
    if layer.weight.is_graph_output():
        return "an output of the model"
    if tensor.dtype not in _FLOATS:
        return f"{tensor.dtype.name.lower()}, of which no codes are made"
    excluded = [use.node for use in layer.weight.uses() if not selection.allows(use.node)]
    if excluded:
        return f"also read by `{walk.label(excluded[0])}`, which is excluded"
    return None if _pays(layer, per_channel) else "no smaller as int8 with its scales"


def _pays(layer: LinearLayer, per_channel: bool) -> bool:
    """Return whether integers and scales take less room than the floats."""
    tensor = weight_tensor(layer)
    channels = walk.dims(tensor)[layer.output_axis] if per_channel else 1
    return tensor.size + channels * _BYTES_PER_SCALE + _OVERHEAD_BYTES < tensor.nbytes


@dataclass
class _Lowering:
    """Stores weights as integers one by one, for all that read them.

    Attributes:
        ctx: Where edits are made.
        weights: Weights stored so far.
        has_axis: Whether a DequantizeLinear may have a scale for each channel.
        in_float: Nodes that must not compute on the integers.
        done: How many readers of each operator.
        direct: How many of them are in the form that computes on the integers.
    """

    ctx: Context
    weights: WeightStore
    has_axis: bool
    in_float: frozenset[ir.Node]
    done: Counter[str] = field(default_factory=Counter)
    direct: int = 0

    def lower(self, weight: ir.Value, layer: LinearLayer) -> None:
        """Store one weight and serve all its readers from the integers, as one edit."""
        reading = {use.node for use in weight.uses()}
        # In graph order: what the first reader in a graph is given, later ones share.
        readers = [node for node in walk.every_node(self.ctx.model) if node in reading]
        with self.ctx.rewriter.edit(_RULE, layer.node):
            stored = self.weights.store(layer)
            floats: dict[object, ir.Value] = {}
            alone = len(weight.uses()) == 1
            for node in readers:
                self.done[node.op_type] += 1
                if is_lookup(node) and layer.output_axis == 0 and node.inputs[0] is weight:
                    self._gather_integers(node, layer, stored)
                elif self.has_axis and alone and node not in self.in_float and _multiplies_directly(node, layer):
                    self._dequantize(node, layer.output_axis, stored)
                else:
                    self._read_floats(node, weight, layer, stored, floats)
            self.weights.release(weight)

    def _gather_integers(self, node: ir.Node, layer: LinearLayer, stored: StoredWeight) -> None:
        """Look rows up in integers, then bring only those to float."""
        indices = node.inputs[1]
        assert indices is not None, "a lookup has indices"
        rows = self._make(node, "Cast", [self._make(node, "Gather", [stored.codes, indices])], to=ir.DataType.FLOAT)
        scales = self.weights.scales(stored, node, (-1, 1))
        if stored.per_channel:
            scales = self._make(node, "Gather", [scales, indices])
        floats = self._as_before(node, self._make(node, "Mul", [rows, scales]), layer)
        self.ctx.rewriter.replace(node.outputs[0], floats)
        self.ctx.rewriter.erase(node)

    def _dequantize(self, node: ir.Node, axis: int, stored: StoredWeight) -> None:
        self.direct += 1
        inputs = [stored.codes, self.weights.scales(stored, node)]
        attributes = {"axis": axis} if stored.per_channel else {}
        self.ctx.rewriter.set_input(node, 1, self._make(node, "DequantizeLinear", inputs, **attributes))

    def _read_floats(
        self,
        node: ir.Node,
        weight: ir.Value,
        layer: LinearLayer,
        stored: StoredWeight,
        floats: dict[object, ir.Value],
    ) -> None:
        if node.graph not in floats:
            rank = len(weight_tensor(layer).shape)
            shape = tuple(-1 if axis == layer.output_axis else 1 for axis in range(rank))
            casted = self._make(node, "Cast", [stored.codes], to=ir.DataType.FLOAT)
            scaled = self._make(node, "Mul", [casted, self.weights.scales(stored, node, shape)])
            floats[node.graph] = self._as_before(node, scaled, layer)
        for index, value in enumerate(node.inputs):
            if value is weight:
                self.ctx.rewriter.set_input(node, index, floats[node.graph])

    def _as_before(self, node: ir.Node, value: ir.Value, layer: LinearLayer) -> ir.Value:
        """Return a float32 value in the dtype of the weight it stands for."""
        dtype = weight_tensor(layer).dtype
        return value if dtype is ir.DataType.FLOAT else self._make(node, "Cast", [value], to=dtype)

    def _make(self, node: ir.Node, op_type: str, inputs: list[ir.Value], **attributes: object) -> ir.Value:
        made = self.ctx.rewriter.make(op_type, inputs, attributes, sources=[node], name="w")
        return self.ctx.rewriter.insert(made, before=node).outputs[0]


def _multiplies_directly(node: ir.Node, layer: LinearLayer) -> bool:
    """Return whether ONNX Runtime multiplies by the stored integers of this reader without unpacking them."""
    if not walk.is_onnx_op(node, "MatMul", "Gemm") or node.inputs[1] is not layer.weight:
        return False
    if weight_tensor(layer).dtype is not ir.DataType.FLOAT:
        return False
    plain = all(node.attributes.get_float(name, 1.0) == 1.0 for name in ("alpha", "beta"))
    untransposed = all(node.attributes.get_int(name, 0) == 0 for name in ("transA", "transB"))
    return plain and untransposed and layer.output_axis == 1 and len(weight_tensor(layer).shape) == 2


def _summarise(
    chosen: dict[ir.Value, LinearLayer],
    before: int,
    after: int,
    lowering: _Lowering,
    instead_of: tuple[str, Mapping[ir.Value, str]] | None,
) -> None:
    readers = ", ".join(f"{count} {operator}" for operator, count in lowering.done.most_common())
    direct = lowering.direct
    if not direct:
        compute = "the runtime computes in float as before"
    elif direct == lowering.done.total():
        compute = "the runtime multiplies by the integers where it can, else in float"
    else:
        rest = lowering.done.total() - direct
        compute = f"{direct} multiply by the integers where the runtime can, {rest} in float as before"
    why = ""
    if instead_of is not None:
        asked, reasons = instead_of
        found = Counter(reasons.get(weight, "no matrix that is multiplied by") for weight in chosen)
        why = f" (not {asked}: {', '.join(f'{count} {reason}' for reason, count in found.most_common())})"
    lowering.ctx.note(
        f"weights stored as int8{why}: {len(chosen)}, for {readers}, {show_bytes(before)} → {show_bytes(after)}; "
        f"{compute}",
        weights=len(chosen),
        float_bytes=before,
        integer_bytes=after,
        direct=direct,
        stored={"int8": len(chosen)},
    )

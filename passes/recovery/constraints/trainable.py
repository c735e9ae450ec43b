"""Which constants of a model train: those of the kinds and the layers that were asked for."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import onnx_ir as ir

from graphopt import walk
from graphopt.constant_names import constant_names
from graphopt.errors import PassError

from ...analyses.selection import select
from ..held import ADAPTERS, Held
from .constant_kinds import WEIGHT, kind_of, long_axes
from .constant_readers import Reader, readers_of
from .crossings import crossings_of

# Operators that compute on integers, or decode them inside: they have no gradient to train by.
_INTEGER_OPS = frozenset(
    {
        "ConvInteger",
        "DynamicQuantizeLSTM",
        "DynamicQuantizeLinear",
        "DynamicQuantizeMatMul",
        "GatherBlockQuantized",
        "MatMulBnb4",
        "MatMulInteger",
        "MatMulIntegerToFloat",
        "MatMulNBits",
        "QAttention",
        "QEmbedLayerNormalization",
        "QGemm",
        "QLinearAdd",
        "QLinearAveragePool",
        "QLinearConcat",
        "QLinearConv",
        "QLinearGlobalAveragePool",
        "QLinearLeakyRelu",
        "QLinearMatMul",
        "QLinearMul",
        "QLinearSigmoid",
        "QLinearSoftmax",
        "QMoE",
    }
)
NO_WEIGHT = "matrices that are no weights of operators known to have some: masks, caches of positions and the like"
"""Why a matrix is left."""
GIVEN = "callers of functions give them as attributes"
"""Why a constant of a function is left that is not the same in every call."""
UNREAD = "nothing that is trained reads them"
"""Why a constant is left that the lowered module has no use for."""
_NAMED = 3  # nodes an error names; the rest is counted


@dataclass(frozen=True, eq=False)
class Trainable:
    """A constant that trains.

    Attributes:
        value: The constant: floats, or integer codes.
        name: What it is called in the whole model, by `graphopt.constant_names`.
        kind: What it is, of `KINDS`.
        readers: What reads it, views of it looked through.
    """

    value: ir.Value
    name: str
    kind: str
    readers: tuple[Reader, ...]

    @property
    def tensor(self) -> ir.TensorProtocol:
        """What it holds."""
        tensor = walk.constant_tensor(self.value)
        assert tensor is not None, "it is a constant"
        return tensor


def refuse(model: ir.Model, held: Held) -> None:
    """Refuse what cannot train, before any work.

    Raises:
        PassError: The model has operators without a gradient, or nothing in it trains.
        UsageError: A glob matches no node.
    """
    refused = [node for node in walk.every_node(model) if node.op_type in _INTEGER_OPS]
    if refused:
        counts = Counter(node.op_type for node in refused)
        named = ", ".join(f"`{walk.label(node)}`" for node in refused[:_NAMED])
        more = f" and {len(refused) - _NAMED} more" if len(refused) > _NAMED else ""
        raise PassError(
            f"pass `recover` cannot train through {', '.join(counts)}: {named}{more} compute on integers",
            hint="recover the float model, or one of `quant:mode=static` (QuantizeLinear and DequantizeLinear), then "
            "put it in this form",
        )
    if not trainables(model, held):
        raise PassError(
            f"pass `recover` finds nothing to train: no {', '.join(held.train)} in the nodes chosen",
            hint="other `train=`, `include=` or `exclude=`; `graphopt inspect` shows what the model is made of",
        )


def trainables(model: ir.Model, held: Held) -> list[Trainable]:
    """Return the constants that train, each once, in graph order.

    Constants that are nobody's weight never do: epsilons and other single numbers, masks, rotary caches and what they
    are computed from, what an input is normalized by, running statistics of BatchNormalization, and fixed tables such
    as NF4.

    Raises:
        UsageError: A glob matches no node.
    """
    selection = select(model, held.include, held.exclude, where="pass `recover`")
    wanted = {WEIGHT if word == ADAPTERS else word for word in held.train}
    crossings = crossings_of(model)
    found = []
    for value, name in constants(model).items():
        readers = tuple(readers_of(value, crossings))
        kind = kind_of(value, readers, crossings)
        nodes = {node for reader in readers for node in reader.nodes}
        nodes |= {holder for node in nodes for holder in crossings.holding(node.graph)}
        nodes |= set(crossings.calling(value.graph))
        if kind not in wanted or (nodes and not _chosen(selection.allows, nodes, held)):
            continue
        found.append(Trainable(value, name, kind, readers))
    return found


def idle(model: ir.Model) -> Counter[str]:
    """Return why constants that may be weights cannot train: reason to how many."""
    return Counter([NO_WEIGHT] * len(idle_matrices(model)) + [GIVEN] * len(_given(model)))


def idle_matrices(model: ir.Model) -> list[ir.Value]:
    """Return constants in float of several axes that are of no kind.

    Those are rotary caches and masks, as a rule; but an operator may have a weight that is not told as one here.
    """
    crossings, found = crossings_of(model), []
    for value in constants(model):
        readers = tuple(readers_of(value, crossings)) if _is_matrix(walk.constant_tensor(value)) else ()
        if readers and kind_of(value, readers, crossings) is None:
            found.append(value)
    return found


def _given(model: ir.Model) -> list[ir.Node]:
    """Return the Constants of functions that are what each caller gives, and no single number."""
    kinds = (ir.AttributeType.TENSOR, ir.AttributeType.FLOATS)
    return [
        node
        for key in walk.called_functions(model)
        for graph in walk.graphs_within(model.functions[key])
        for node in graph
        if walk.is_onnx_op(node, "Constant")
        and any(attribute.is_ref() and attribute.type in kinds for attribute in node.attributes.values())
    ]


def _is_matrix(tensor: ir.TensorProtocol | None) -> bool:
    if tensor is None or not tensor.dtype.is_floating_point():
        return False
    return long_axes(tensor) > 1


def constants(model: ir.Model) -> dict[ir.Value, str]:
    """Return every constant of a model, in graph order, by the name that tells it from all others."""
    names = constant_names(model)
    graphs = [walk.graphs_within(model.graph)]
    graphs += [walk.graphs_within(model.functions[key]) for key in sorted(walk.called_functions(model))]
    read = dict.fromkeys(
        value for within in graphs for graph in within for node in graph for value in node.inputs if value in names
    )
    return {value: names[value] for value in (*read, *names) if walk.constant_tensor(value) is not None}


def _chosen(allows: object, nodes: set[ir.Node], held: Held) -> bool:
    assert callable(allows)
    if not held.include:
        # What an excluded layer reads stays, whoever else reads it.
        return all(allows(node) for node in nodes)
    return any(allows(node) for node in nodes)

"""Which constants of a model train: those of the kinds and the layers that were asked for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import onnx_ir as ir

from graphopt import walk
from graphopt.errors import PassError

from ...analyses.selection import select
from ..held import ADAPTERS, Held
from .constant_kinds import WEIGHT, kind_of, long_axes
from .constant_readers import Reader, readers_of

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
NAMELESS = "they are not stored under a name of their own"
"""Why a weight is left that is told from others by more than its name."""
_NAMED = 3  # nodes an error names; the rest is counted


@dataclass(frozen=True, eq=False)
class Trainable:
    """A constant that trains.

    Attributes:
        value: The constant: floats, or integer codes.
        kind: What it is, of `KINDS`.
        readers: What reads it, views of it looked through.
    """

    value: ir.Value
    kind: str
    readers: tuple[Reader, ...]

    @property
    def name(self) -> str:
        """What the constant is called."""
        return self.value.name or ""

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
    found = []
    for value in constants(model):
        readers = tuple(readers_of(value))
        kind = kind_of(value, readers)
        nodes = {node for reader in readers for node in reader.nodes}
        if kind not in wanted or (nodes and not _chosen(selection.allows, nodes, held)):
            continue
        found.append(Trainable(value, kind, readers))
    return found


def idle_matrices(model: ir.Model) -> dict[ir.Value, str | None]:
    """Return constants in float of several axes that cannot train, and what they are.

    Those that are of no kind are rotary caches and masks, as a rule; but an operator may have a weight that is not told
    as one here. Others are in functions, or have a name that another one has, too.
    """
    named = set(constants(model))
    read = dict.fromkeys(value for node in walk.every_node(model) for value in node.inputs if value is not None)
    found = {
        value: kind_of(value, tuple(readers_of(value))) for value in read if _is_matrix(walk.constant_tensor(value))
    }
    return {value: kind for value, kind in found.items() if kind is None or value not in named}


def _is_matrix(tensor: ir.TensorProtocol | None) -> bool:
    if tensor is None or not tensor.dtype.is_floating_point():
        return False
    return long_axes(tensor) > 1


def constants(model: ir.Model) -> Iterator[ir.Value]:
    """Yield every constant that something reads by a name of its own; those inside of functions have none."""
    found: dict[ir.Value, None] = {}
    for graph in walk.graphs_within(model.graph):
        for node in graph:
            found.update(dict.fromkeys(one for one in node.inputs if one is not None and _is_constant(one)))
    names = Counter(value.name for value in found)
    # Branches may give two constants one name: what is stored by name could be either.
    yield from (value for value in found if value.name and names[value.name] == 1)


def _is_constant(value: ir.Value) -> bool:
    return walk.constant_tensor(value) is not None


def _chosen(allows: object, nodes: set[ir.Node], held: Held) -> bool:
    assert callable(allows)
    if not held.include:
        # What an excluded layer reads stays, whoever else reads it.
        return all(allows(node) for node in nodes)
    return any(allows(node) for node in nodes)

"""How the weights of layers are distributed before and after a run, matched by where their nodes come from."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from graphopt import walk
from graphopt.backend import Array, Backend
from graphopt.errors import BackendError
from graphopt.provenance import origins
from graphopt.shapes import infer_shapes
from graphopt.summary import holds_weights
from graphopt.weight_values import weight_values

# The layers of most weights are shown: a page of more histograms is not read.
MOST_LAYERS = 12
# Larger weights are not decoded for a picture: as float32 they take 128 MiB.
_MOST_ELEMENTS = 1 << 25
# So many elements, evenly spread, tell the shape of any distribution.
_SAMPLED = 1 << 20
_BINS = 48
# A weight is made of fewer values than this.
_MOST_VALUES = 64
# Outliers would squeeze all others into a few bins: this share of the weights lies within them.
_SHOWN_SHARE = 0.99
# What stores or hands on a weight, and is no layer itself.
_NO_LAYERS = (
    *("QuantizeLinear", "DequantizeLinear", "Cast", "Reshape", "Transpose", "Identity", "Gather", "Mul", "Slice"),
    *("Unsqueeze", "Squeeze", "Concat", "Split", "Where", "Equal", "Add", "Sub", "Div", "Pad", "Expand", "Constant"),
)
# Reads blocks of codes, of which the shape says little.
_READS_BLOCKS = "MatMulNBits"


@dataclass(frozen=True)
class WeightHistogram:
    """The weights of one layer before and after, as what they stand for; exact zeros are counted apart.

    Attributes:
        layer: The layer, a node of the original, or one of the result that comes from no layer.
        operator: Its operator in the result.
        origins: The nodes of the original it comes from.
        stored: What its weight is stored as.
        elements: How many weights it has after.
        edges: Edges of the bins, one more than bins.
        before: Share of the weights in each bin, before; empty where no layer of the original has a like weight.
        after: The same after.
        zeros_before: Share of exact zeros; None as ``before`` is empty.
        zeros_after: The same after.
        sampled: How many weights of each side were looked at.
    """

    layer: str
    operator: str
    origins: tuple[str, ...]
    stored: str
    elements: int
    edges: tuple[float, ...]
    before: tuple[float, ...]
    after: tuple[float, ...]
    zeros_before: float | None
    zeros_after: float
    sampled: int

    def as_dict(self) -> dict[str, Any]:
        """Return it as JSON values."""
        return asdict(self)


@dataclass(frozen=True)
class WeightHistograms:
    """The largest layers, and what is not among them.

    Attributes:
        layers: In graph order.
        left: How many layers more there are.
        undecoded: Layers whose codes could not be read as numbers, each with the reason.
    """

    layers: tuple[WeightHistogram, ...]
    left: int
    undecoded: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class _Weight:
    node: ir.Node
    value: ir.Value
    stored: ir.TensorProtocol
    elements: int


def weight_histograms(before: ir.Model, after: ir.Model, backend: Backend) -> WeightHistograms:
    """Return histograms of the weights of the largest layers, on the same bins before and after.

    Args:
        before: The original, its nodes stamped with origins; not changed.
        after: What became of it; not changed.
        backend: Decodes codes, by running what is between them and the layer.
    """
    after = after.clone()
    infer_shapes(after)  # tells decoded weights from other values made of constants
    found = sorted(_weights(after), key=lambda one: -one.elements)
    chosen = {id(one.node) for one in found[:MOST_LAYERS]}
    originals = {origin: one for one in _weights(before) for origin in origins(one.node)}
    layers, undecoded = [], []
    for one in _weights(after):
        if id(one.node) not in chosen:
            continue
        try:
            layers.append(_histogram(one, originals, before, after, backend))
        except (BackendError, ValueError) as error:
            undecoded.append((walk.label(one.node), getattr(error, "message", None) or str(error)))
    return WeightHistograms(tuple(layers), max(len(found) - MOST_LAYERS, 0), tuple(undecoded))


def _weights(model: ir.Model) -> Iterator[_Weight]:
    """Yield the layers of the main graph, each with the value that is its weight."""
    for node in model.graph:
        if node.op_type in _NO_LAYERS:
            continue
        for value in node.inputs:
            stored = _stored(value)
            if value is not None and stored is not None:
                yield _Weight(node, value, stored, _elements(node, value, stored))
                break


def _stored(value: ir.Value | None) -> ir.TensorProtocol | None:
    """Return the largest tensor that a weight is made of; None of what is no weight, or made of more than constants."""
    constants = _constants_behind(value) if value is not None else None
    if value is None or not constants:
        return None
    largest = max(constants, key=lambda tensor: tensor.nbytes)
    shape = value.shape.numpy() if value.shape is not None and value.shape.is_static() else walk.dims(largest)
    if sum(dim > 1 for dim in shape) < 2 or not holds_weights(largest.dtype):
        return None
    return largest


def _constants_behind(value: ir.Value) -> list[ir.TensorProtocol] | None:
    """Return the constants that a value is made of, and nothing else; None where there is something else."""
    found: list[ir.TensorProtocol] = []
    seen: set[ir.Value] = set()
    waiting = [value]
    while waiting:
        one = waiting.pop()
        if one in seen:
            continue
        seen.add(one)
        tensor, maker = walk.constant_tensor(one), one.producer()
        if tensor is not None:
            found.append(tensor)
        elif maker is None or walk.is_random(maker) or any(walk.subgraphs(maker)) or len(seen) > _MOST_VALUES:
            return None
        else:
            waiting += [each for each in maker.inputs if each is not None]
    return found


def _elements(node: ir.Node, value: ir.Value, stored: ir.TensorProtocol) -> int:
    if node.op_type == _READS_BLOCKS:
        return node.attributes.get_int("K", 0) * node.attributes.get_int("N", 0)
    return math.prod(value.shape.numpy()) if value.shape is not None and value.shape.is_static() else stored.size


def _histogram(
    one: _Weight, originals: dict[str, _Weight], before: ir.Model, after: ir.Model, backend: Backend
) -> WeightHistogram:
    sources = [originals[origin] for origin in sorted(origins(one.node)) if origin in originals]
    old = next((source for source in sources if source.node.op_type == one.node.op_type), None)
    old = old or (sources[0] if sources else None)
    new_values = _sample(_values(one, after, backend))
    old_values = _sample(_values(old, before, backend)) if old is not None else np.zeros(0, np.float32)
    edges = _edges(np.concatenate([old_values, new_values]))
    return WeightHistogram(
        layer=walk.label(old.node if old is not None else one.node),
        operator=one.node.op_type,
        origins=tuple(sorted(origins(old.node if old is not None else one.node))),
        stored=_format(one),
        elements=one.elements,
        edges=tuple(edges.tolist()),
        before=_shares(old_values, edges),
        after=_shares(new_values, edges),
        zeros_before=float(np.mean(old_values == 0)) if old_values.size else None,
        zeros_after=float(np.mean(new_values == 0)) if new_values.size else 0.0,
        sampled=int(new_values.size),
    )


def _values(one: _Weight, model: ir.Model, backend: Backend) -> Array:
    if one.elements > _MOST_ELEMENTS:
        raise ValueError(f"more than {_MOST_ELEMENTS:,} weights")
    return weight_values(one.node, one.value, model, backend)


def _format(one: _Weight) -> str:
    """Return what a weight is stored as; several codes of few bits lie in one byte."""
    if one.node.op_type == _READS_BLOCKS:
        return f"{one.node.attributes.get_int('bits', 4)}-bit codes"
    return np.dtype(one.stored.dtype.numpy()).name


def _sample(values: Array) -> Array:
    flat = values.reshape(-1)
    flat = flat[:: max(1, -(-flat.size // _SAMPLED))]
    return flat[np.isfinite(flat)]


def _edges(values: Array) -> Array:
    bound = float(np.quantile(np.abs(values), _SHOWN_SHARE)) if values.size else 0.0
    return np.linspace(-bound, bound, _BINS + 1) if bound else np.linspace(-1.0, 1.0, _BINS + 1)


def _shares(values: Array, edges: Array) -> tuple[float, ...]:
    if not values.size:
        return ()
    counts, _ = np.histogram(values[values != 0], bins=edges)
    return tuple((counts / values.size).tolist())

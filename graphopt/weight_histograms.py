"""How the weights of layers are distributed before and after a run, matched by where their nodes come from."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from graphopt import walk
from graphopt.backend import Array, Backend
from graphopt.errors import BackendError
from graphopt.explanation_advice import made_of_constants
from graphopt.fragment import fragment, nodes_between
from graphopt.provenance import origins

# The layers of most weights are shown: a page of more histograms is not read.
MOST_LAYERS = 12
# Larger weights are not decoded for a picture: as float32 they take 128 MiB.
_MOST_ELEMENTS = 1 << 25
# So many elements, evenly spread, tell the shape of any distribution.
_SAMPLED = 1 << 20
_BINS = 48
# Outliers would squeeze all others into a few bins: this share of the weights lies within them.
_SHOWN_SHARE = 0.99
# What stores or hands on a weight, and is no layer itself.
_NO_LAYERS = (
    *("QuantizeLinear", "DequantizeLinear", "Cast", "Reshape", "Transpose", "Identity", "Gather", "Mul", "Slice"),
    *("Unsqueeze", "Squeeze", "Concat", "Split", "Where", "Equal", "Add", "Sub", "Div", "Pad", "Expand", "Constant"),
)
# Operators that read codes themselves, here decoded by running them on the identity.
_READS_BLOCKS = "MatMulNBits"
_LARGEST_IDENTITY = 1 << 24


@dataclass(frozen=True)
class WeightHistogram:
    """The weights of one layer before and after, as what they stand for; exact zeros are counted apart.

    Attributes:
        layer: The layer, a node of the model after.
        operator: Its operator.
        origins: The nodes of the original it comes from.
        stored: The dtype its weight is stored in.
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
                yield _Weight(node, value, stored, _elements(node, stored))
                break


def _stored(value: ir.Value | None) -> ir.TensorProtocol | None:
    """Return the tensor of two axes and more that a value is made of, and nothing but constants besides."""
    if value is None or not made_of_constants(value):
        return None
    while value is not None and walk.constant_tensor(value) is None:
        producer = value.producer()
        value = producer.inputs[0] if producer is not None and producer.inputs else None
    tensor = walk.constant_tensor(value)
    if tensor is None or tensor.dtype in (ir.DataType.INT64, ir.DataType.BOOL, ir.DataType.STRING):
        return None
    return tensor if sum(dim > 1 for dim in walk.dims(tensor)) > 1 else None


def _elements(node: ir.Node, stored: ir.TensorProtocol) -> int:
    if node.op_type == _READS_BLOCKS:
        return node.attributes.get_int("K", 0) * node.attributes.get_int("N", 0)
    return stored.size


def _histogram(
    one: _Weight, originals: dict[str, _Weight], before: ir.Model, after: ir.Model, backend: Backend
) -> WeightHistogram:
    sources = [originals[origin] for origin in sorted(origins(one.node)) if origin in originals]
    old = next((source for source in sources if source.node.op_type == one.node.op_type), None)
    old = old or (sources[0] if sources else None)
    new_values = _sample(_decoded(one, after, backend))
    old_values = _sample(_decoded(old, before, backend)) if old is not None else np.zeros(0, np.float32)
    edges = _edges(np.concatenate([old_values, new_values]))
    return WeightHistogram(
        layer=walk.label(one.node),
        operator=one.node.op_type,
        origins=tuple(sorted(origins(one.node))),
        stored=str(one.stored.dtype).lower(),
        elements=one.elements,
        edges=tuple(edges.tolist()),
        before=_shares(old_values, edges),
        after=_shares(new_values, edges),
        zeros_before=float(np.mean(old_values == 0)) if old_values.size else None,
        zeros_after=float(np.mean(new_values == 0)) if new_values.size else 0.0,
        sampled=int(new_values.size),
    )


def _decoded(one: _Weight, model: ir.Model, backend: Backend) -> Array:
    """Return a weight as the numbers it stands for.

    Raises:
        BackendError: The runtime does not run what decodes it.
        ValueError: It is too large, or of codes that only their operator can read.
    """
    if one.elements > _MOST_ELEMENTS:
        raise ValueError(f"more than {_MOST_ELEMENTS:,} weights")
    if one.node.op_type == _READS_BLOCKS:
        return _by_identity(one.node, model, backend)
    tensor = walk.constant_tensor(one.value)
    if tensor is not None:
        if not tensor.dtype.is_floating_point():
            raise ValueError(f"{one.node.op_type} reads codes in {str(tensor.dtype).lower()} itself")
        return np.asarray(tensor.numpy(), dtype=np.float32)
    nodes = nodes_between([one.value], set(model.graph))
    decoder = fragment(nodes, [one.value], [], model.opset_imports, model.functions)
    with backend.open(decoder, optimize=False) as session:
        return np.asarray(session.run({})["out0"], dtype=np.float32)


def _by_identity(node: ir.Node, model: ir.Model, backend: Backend) -> Array:
    """Return the weight of a product that reads blocks of codes: what it makes of the identity."""
    size, read = node.attributes.get_int("K", 0), node.inputs[0]
    if read is None or not size or size * size > _LARGEST_IDENTITY:
        raise ValueError(f"{node.op_type} of {size} inputs")
    dtype = read.dtype or ir.DataType.FLOAT
    product = fragment([node], [node.outputs[0]], [read], model.opset_imports, model.functions)
    product.graph.inputs[0].type = ir.TensorType(dtype)
    product.graph.inputs[0].shape = ir.Shape([size, size])
    with backend.open(product, optimize=False) as session:
        return np.asarray(session.run({"in0": np.eye(size, dtype=dtype.numpy())})["out0"], dtype=np.float32)


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

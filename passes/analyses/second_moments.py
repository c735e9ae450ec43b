"""Second moments: H = E[x xᵀ] of what each linear layer multiplies, by which every lossy change of it is judged."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from graphopt.authoring import Context
from graphopt.backend import Array
from graphopt.errors import DataError
from graphopt.statistics import Accumulator

from .layer_rows import layer_rows, takes_rows
from .linear_layers import LinearLayer

# Rows of one sample that are looked at, evenly spaced: neighbouring positions of an image tell much the same, and 64
# samples give 32,768 rows, some times more than the widest layers have inputs.
ROWS_PER_SAMPLE = 512
# Elements of rows unfolded at once, 64 MB.
_UNFOLDED_AT_ONCE = 16 << 20
# Bytes of sums held at once; the model is run once for each so many.
SUMS_LIMIT = 1 << 30
_SUM_BYTES = 8


@dataclass(frozen=True)
class Gram:
    """The second moment of the rows that a linear layer reads of a value; layers that read the same rows share one.

    Attributes:
        reading: What decides which rows these are, as text.
        layer: A layer that reads them.
        rows: The most rows of each sample, evenly spaced.
    """

    reading: str
    layer: LinearLayer = field(compare=False, repr=False)
    rows: int = ROWS_PER_SAMPLE

    @classmethod
    def of(cls, layer: LinearLayer, rows: int = ROWS_PER_SAMPLE) -> Gram:
        """Return what a layer reads; of a layer of which `takes_rows` holds."""
        return cls(reading(layer), layer, rows)

    @property
    def key(self) -> str:
        """Name and options."""
        return f"gram({self.reading},rows={self.rows})"

    def start(self) -> Accumulator:
        """Return what collects it."""
        return _Sums(self)

    def result(self, arrays: Mapping[str, Array]) -> Array:
        """Return E[x xᵀ] as float32 [groups, inputs, inputs]."""
        moment = arrays["moment"]
        if moment.shape != (groups := group_count(self.layer), inputs := inputs_of(self.layer), inputs):
            raise ValueError(f"{moment.shape} is no second moment of {groups} times {inputs} inputs")
        return moment


class _Sums:
    """Sums of x xᵀ: products in float32, added up in float64."""

    def __init__(self, gram: Gram) -> None:
        self._gram = gram
        inputs = inputs_of(gram.layer)
        self._sum = np.zeros((group_count(gram.layer), inputs, inputs))
        self._count = 0

    def update(self, values: Array, samples: int) -> None:
        gram = self._gram
        at_once = len(values) if values.ndim else 1
        if gram.layer.node.op_type.startswith("Conv"):
            at_once = max(1, _UNFOLDED_AT_ONCE // (gram.rows * self._sum.shape[0] * self._sum.shape[1]))
        for start in range(0, len(values) if values.ndim else 0, max(at_once, 1)):
            rows = layer_rows(gram.layer, values[start : start + at_once], limit=gram.rows)
            for total, group in zip(self._sum, rows, strict=True):
                with np.errstate(over="ignore", invalid="ignore"):  # seen below
                    total += group.T @ group  # numpy computes but half of a product with the own transpose
            self._count += rows.shape[1]
        if not np.isfinite(np.trace(self._sum, axis1=1, axis2=2)).all():
            raise DataError("becomes NaN or infinite, or its square does", hint="check the model on these samples")

    def arrays(self) -> dict[str, Array]:
        return {"moment": (self._sum / max(self._count, 1)).astype(np.float32), "count": np.array(self._count)}


def gram(ctx: Context, layers: Iterable[LinearLayer], *, rows: int = ROWS_PER_SAMPLE) -> Mapping[LinearLayer, Array]:
    """Return H = E[x xᵀ] of the inputs of layers over the calibration data, as the model is now.

    Layers that read the same value in the same way share one array. Layers that cannot be observed, inside subgraphs
    or functions, or of which `takes_rows` does not hold, are left out.

    Args:
        ctx: Data and model.
        layers: The layers. All results are held at once; `in_portions` divides layers of a model of billions.
        rows: The most rows of each sample, evenly spaced.

    Returns:
        float32 [groups, inputs, inputs] by layer, inputs ordered as `LinearLayer.matrix` gives them; read-only.
    """
    found: dict[LinearLayer, Array] = {}
    for portion in in_portions([layer for layer in layers if _is_observable(layer, ctx)]):
        asked: dict[LinearLayer, Gram] = {layer: Gram.of(layer, rows) for layer in portion}
        requests: dict[ir.Value, list[Gram]] = {}
        for layer, statistic in asked.items():
            requests.setdefault(layer.input, []).append(statistic)
        observed = ctx.statistics(requests)
        for layer, statistic in asked.items():
            found[layer] = observed[layer.input, statistic]
            found[layer].flags.writeable = False
    return found


def in_portions(layers: Iterable[LinearLayer], limit: int = SUMS_LIMIT) -> list[list[LinearLayer]]:
    """Return layers, in order, in portions whose second moments stay within a number of bytes, in float64."""
    portions: list[list[LinearLayer]] = []
    held = 0
    counted: set[tuple[ir.Value, str]] = set()
    for layer in layers:
        key = layer.input, reading(layer)
        size = 0 if key in counted else group_count(layer) * inputs_of(layer) ** 2 * _SUM_BYTES
        if not portions or (size and held + size > limit):
            portions.append([])
            held = 0
            counted.clear()
        portions[-1].append(layer)
        held += size
        counted.add(key)
    return portions


def inputs_of(layer: LinearLayer) -> int:
    """Return how many inputs each output of a layer has: the columns of its matrix."""
    dims = layer.dims
    return int(np.prod(dims)) // dims[layer.output_axis]


def group_count(layer: LinearLayer) -> int:
    """Return into how many groups, each with inputs of its own, a layer is divided."""
    return layer.node.attributes.get_int("group", 1) if layer.node.op_type.startswith("Conv") else 1


def _is_observable(layer: LinearLayer, ctx: Context) -> bool:
    return takes_rows(layer) and layer.node.graph is ctx.model.graph


def reading(layer: LinearLayer) -> str:
    """Return what decides which rows of its input a layer reads: the operator, the window, and on which side W is."""
    attributes = layer.node.attributes
    parts: Sequence[object] = (layer.node.op_type, layer.weight_index, inputs_of(layer))
    if layer.node.op_type.startswith("Conv"):
        window = [(name, attributes[name].value) for name in sorted(attributes) if name != "kernel_shape"]
        parts = (*parts, layer.dims[2:], window)
    elif layer.node.op_type == "Gemm":
        across = attributes.get_int("transA" if layer.weight_index == 1 else "transB", 0)
        parts = ("Gemm", layer.weight_index, inputs_of(layer), across)
    return " ".join(map(str, parts))

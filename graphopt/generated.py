"""Made-up inputs, for models that come without data."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from graphopt import walk
from graphopt.backend import Array
from graphopt.data import numpy_dtype
from graphopt.errors import DataError

DEFAULT_SETS = 2
# Sizes stood in for dynamic dimensions: the first, those of images, and all others.
DEFAULT_BATCH, PIXELS, LENGTH = 2, 64, 8
_IMAGE_RANK = 4

# Operators that hand integers on as they are, or reshaped.
_INDEX_CARRIERS = ("Cast", "Identity", "Reshape", "Unsqueeze", "Squeeze", "Flatten", "Slice", "Transpose")


def generated_feeds(
    model: ir.Model,
    seed: int,
    *,
    sets: int = DEFAULT_SETS,
    batch: int = DEFAULT_BATCH,
    scale: int = 1,
    named_sizes: Mapping[str, int] | None = None,
) -> list[dict[str, Array]]:
    """Return made-up feeds; dimensions of the same name get the same size.

    Floats are drawn from the standard normal distribution. Integers stay below the size of the table they index
    where that can be seen, and are 0 or 1 elsewhere.

    Args:
        model: The model.
        seed: Seed of the values.
        sets: How many feeds.
        batch: Size of a dynamic first dimension.
        scale: Factor on all other dynamic dimensions.
        named_sizes: Sizes of dimensions by name, where they are known.

    Raises:
        DataError: An input is no tensor, or its rank is unknown.
    """
    rng = np.random.default_rng(seed)
    inputs = [value for value in model.graph.inputs if not value.is_initializer()]
    sizes = dict(named_sizes or {})
    shapes = {value.name or "": _shape(value, sizes, batch, scale) for value in inputs}
    return [{value.name or "": _values(value, shapes[value.name or ""], rng) for value in inputs} for _ in range(sets)]


def _shape(value: ir.Value, sizes: dict[str, int], batch: int, scale: int) -> list[int]:
    if numpy_dtype(value) is None or value.shape is None:
        raise DataError(
            f"cannot make up input `{value.name}`: its type or rank is unknown", hint="give real samples with `--data`"
        )
    shape = []
    for axis, dim in enumerate(value.shape):
        stand_in = batch if axis == 0 else scale * (PIXELS if len(value.shape) == _IMAGE_RANK else LENGTH)
        if isinstance(dim, int):
            shape.append(dim)
        elif dim.value is None:
            shape.append(stand_in)
        else:
            shape.append(sizes.setdefault(dim.value, stand_in))
    return shape


def _values(value: ir.Value, shape: list[int], rng: np.random.Generator) -> Array:
    dtype = numpy_dtype(value)
    assert dtype is not None, "checked with the shape"
    if dtype.kind == "b":
        return np.asarray(rng.random(shape) < 0.5)  # of a scalar, a comparison makes a bool
    if dtype.kind in "iu":
        return rng.integers(0, index_bound(value), shape).astype(dtype)
    if dtype.kind in "OSU":
        return np.full(shape, "text", dtype=object)
    return rng.standard_normal(shape).astype(dtype)


def index_bound(value: ir.Value) -> int:
    """Return how many rows the smallest table has that an integer input indexes; 2 where none is seen."""
    bounds: list[int] = []
    seen, frontier = {value}, [value]
    while frontier:
        for use in frontier.pop().uses():
            if walk.is_onnx_op(use.node, "Gather") and use.idx == 1:
                bounds += _table_rows(use.node)
            elif walk.is_onnx_op(use.node, *_INDEX_CARRIERS) and use.idx == 0:
                fresh = [output for output in use.node.outputs if output not in seen]
                seen.update(fresh)
                frontier.extend(fresh)
    return min(bounds, default=2)


def _table_rows(gather: ir.Node) -> list[int]:
    table, axis = gather.inputs[0], gather.attributes.get_int("axis", 0)
    if table is None or table.shape is None:
        return []
    rows = table.shape[axis]
    return [rows] if isinstance(rows, int) else []

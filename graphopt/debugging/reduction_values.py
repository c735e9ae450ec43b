"""What the values of a model hold in a run, so that each of them can become an input of a smaller model."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from graphopt import walk
from graphopt.backend import Array, Backend
from graphopt.debugging.reduction_cuts import Typed
from graphopt.errors import BackendError, DataError
from graphopt.generated import generated_feeds

# What is kept of one run at most; a value that is larger by itself, or comes after, is made up where it is cut.
MOST_BYTES = 1 << 30
# Values asked for in one run: all at once could take more memory than the model itself.
VALUES_AT_ONCE = 256


def record_values(
    model: ir.Model, feed: Mapping[str, Array], types: Mapping[str, Typed], backend: Backend, threads: int
) -> dict[str, Array]:
    """Return what values of the main graph held in a run, by name; the inputs alone where the model does not run."""
    found = dict(feed)
    names = [value.name or "" for node in model.graph for value in node.outputs if _is_wanted(value, types)]
    kept = 0
    for start in range(0, len(names), VALUES_AT_ONCE):
        try:
            held = _held(model, names[start : start + VALUES_AT_ONCE], feed, types, backend, threads)
        except BackendError:
            continue
        for name, array in held.items():
            if not isinstance(array, np.ndarray) or kept + array.nbytes > MOST_BYTES:
                continue
            found[name], kept = array, kept + array.nbytes
    return found


def _is_wanted(value: ir.Value, types: Mapping[str, Typed]) -> bool:
    kind, _ = types.get(value.name or "", (None, None))
    return isinstance(kind, ir.TensorType) and walk.constant_tensor(value) is None


def _held(
    model: ir.Model,
    names: list[str],
    feed: Mapping[str, Array],
    types: Mapping[str, Typed],
    backend: Backend,
    threads: int,
) -> dict[str, Array]:
    clone, wanted = model.clone(), set(names)
    values = [value for node in clone.graph for value in node.outputs if value.name in wanted]
    clone.graph.outputs.clear()
    clone.graph.outputs.extend(values)
    for value in values:
        if value.type is None:
            value.type, value.shape = types[value.name or ""]
    with backend.open(clone, threads=threads, optimize=False) as session:
        return session.run(feed)


def feed_for(model: ir.Model, arrays: Mapping[str, Array], seed: int) -> dict[str, Array] | None:
    """Return what a model runs on: what is known of its inputs, the rest made up; None where that cannot be."""
    inputs = [value for value in model.graph.inputs if not value.is_initializer()]
    missing = [value for value in inputs if value.name not in arrays]
    feed = {value.name or "": arrays[value.name or ""] for value in inputs if value.name in arrays}
    if not missing:
        return feed
    sizes: dict[str, int] = {}
    for value in inputs:
        if value.name in feed and value.shape is not None:
            named = zip(value.shape, feed[value.name].shape, strict=False)
            sizes |= {dim.value: size for dim, size in named if isinstance(dim, ir.SymbolicDim) and dim.value}
    try:
        made_up = generated_feeds(model, seed, sets=1, named_sizes=sizes)[0]
    except DataError:
        return None
    return {**made_up, **feed}

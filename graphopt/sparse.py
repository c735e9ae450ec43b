"""Tensors that are mostly zeros, stored as ONNX's sparse initializers: written so, and read back dense."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
from onnx import numpy_helper

from graphopt.derived import DerivedTensor
from graphopt.errors import ModelError

FIRST_IR_WITH_SPARSE = 6
"""The first IR version that knows sparse initializers."""

INDEX_BYTES = 8
"""What the place of a number takes: ONNX has them as int64."""


class SparselyStored(DerivedTensor):
    """A tensor that `save` writes as a sparse initializer; in memory, and to everything else, it is dense.

    Args:
        source: The tensor; of a dtype that numpy has.
    """

    def __init__(self, source: ir.TensorProtocol) -> None:
        super().__init__(source, _same, source.dtype, [int(size) for size in source.shape.numpy()])
        self.name = source.name


def stored_bytes(array: npt.NDArray[np.generic]) -> int:
    """Return what the numbers of an array that are not zero take with their places, in bytes."""
    return len(_places(array)) * (array.itemsize + INDEX_BYTES)


def put_sparse(proto: onnx.ModelProto, tensors: Mapping[str, SparselyStored]) -> onnx.ModelProto:
    """Put sparse initializers in the places of those of the main graph that have these names, and return the model."""
    if not tensors:
        return proto
    dense = [one for one in proto.graph.initializer if one.name not in tensors]
    del proto.graph.initializer[:]
    proto.graph.initializer.extend(dense)
    for name, tensor in tensors.items():
        array = tensor.numpy().reshape(-1)
        places = _places(array)
        made = proto.graph.sparse_initializer.add(dims=[int(size) for size in tensor.shape.numpy()])
        made.values.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(array[places]), name))
        made.indices.CopyFrom(numpy_helper.from_array(places.astype(np.int64)))
    return proto


def make_dense(proto: onnx.ModelProto, path: str) -> None:
    """Turn the sparse initializers of a model as it was read into dense ones, nested graphs included.

    Raises:
        ModelError: One contradicts itself.
    """
    for graph in _graphs(proto.graph):
        for sparse in graph.sparse_initializer:
            try:
                dense = _dense(sparse)
            except (ValueError, TypeError, IndexError, KeyError) as error:
                raise ModelError(
                    f"`{path}`: sparse initializer `{sparse.values.name}` contradicts itself: {error}",
                    hint="store it densely",
                ) from error
            graph.initializer.append(numpy_helper.from_array(dense, sparse.values.name))
        del graph.sparse_initializer[:]


def _dense(sparse: onnx.SparseTensorProto) -> npt.NDArray[np.generic]:
    values, indices = (numpy_helper.to_array(one) for one in (sparse.values, sparse.indices))
    dims = tuple(sparse.dims)
    if not sparse.values.name:
        raise ValueError("it has no name")
    if indices.ndim == 2:
        indices = np.ravel_multi_index(tuple(indices.T), dims)
    if indices.shape != values.shape or values.ndim != 1:
        raise ValueError(f"{values.shape} numbers have {indices.shape} places")
    found = np.zeros(dims, values.dtype)
    if len(indices) and not 0 <= int(indices.min()) <= int(indices.max()) < found.size:
        raise ValueError(f"a place lies outside {dims}")
    found.reshape(-1)[indices] = values
    return found


def _places(array: npt.NDArray[np.generic]) -> npt.NDArray[np.int64]:
    """Return where the bits of an array are not all zero: −0.0 is a number like any other."""
    flat = np.ascontiguousarray(array).reshape(-1)
    found: npt.NDArray[np.int64] = np.flatnonzero(flat.view(f"u{flat.itemsize}"))
    return found


def _graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            for inner in [attribute.g] if attribute.HasField("g") else attribute.graphs:
                yield from _graphs(inner)


def _same(array: npt.NDArray[np.generic]) -> npt.NDArray[np.generic]:
    return array

"""Models and arrays as OpenVINO takes them: weights where they lie, dtypes numpy lacks, names of inputs and outputs."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir

from graphopt.backend import Array
from graphopt.errors import BackendError
from graphopt.model_io import load, serialize

# External data at this place is read from memory: its offset is an address. ONNX Runtime hands models to OpenVINO so,
# and OpenVINO's reader of ONNX knows it (`tensor_external_data.cpp`).
_IN_MEMORY = "*/_ORT_MEM_ADDR_/*"
_DTYPES: Mapping[str, np.dtype[Any]] = {
    "bf16": np.dtype(ml_dtypes.bfloat16),
    "f8e4m3": np.dtype(ml_dtypes.float8_e4m3fn),
    "f8e5m2": np.dtype(ml_dtypes.float8_e5m2),
    "f8e8m0": np.dtype(ml_dtypes.float8_e8m0fnu),
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_LEAST_BITS = 8


@dataclass(frozen=True)
class Ports:
    """What goes into a model and comes out of it, as the model says.

    Attributes:
        inputs: Dtypes by name, None where the model does not say.
        defaults: Names of those inputs that an initializer fills.
        outputs: Names, in order.
    """

    inputs: Mapping[str, np.dtype[Any] | None]
    defaults: frozenset[str]
    outputs: tuple[str, ...]

    @classmethod
    def of(cls, model: ir.Model | Path) -> Ports:
        """Return the ports of a model.

        Raises:
            BackendError: One of them is no tensor of whole bytes.
            ModelError: The file cannot be read.
        """
        graph = (load(model) if isinstance(model, Path) else model).graph
        for value in (*graph.inputs, *graph.outputs):
            _refuse_what_is_no_array(value)
        inputs = {value.name or "": value.dtype.numpy() if value.dtype else None for value in graph.inputs}
        return cls(
            inputs,
            frozenset(name for name in inputs if name in graph.initializers),
            tuple(value.name or "" for value in graph.outputs),
        )


def _refuse_what_is_no_array(value: ir.Value) -> None:
    hint = "another `--backend` runs it"
    if value.type is not None and not isinstance(value.type, ir.TensorType):
        raise BackendError(f"openvino refuses the model: `{value.name}` is no tensor", hint=hint)
    if value.dtype is not None and (value.dtype == ir.DataType.STRING or value.dtype.bitwidth < _LEAST_BITS):
        raise BackendError(f"openvino refuses the model: `{value.name}` is of {value.dtype}", hint=hint)


def model_in_memory(model: ir.Model) -> tuple[bytes, list[Array]]:
    """Return a model as bytes that name the addresses of its large weights, and these weights.

    The weights are read where they lie, also where they are mapped from a file; whoever reads the bytes has to keep
    them.

    Raises:
        ModelError: What stays in the bytes is more than protobuf can hold.
    """
    data, weights = serialize(model)
    if not weights:
        return data, []
    arrays = {name: np.ascontiguousarray(tensor.numpy()) for name, tensor in weights.items()}
    proto = onnx.load_model_from_string(data)
    for tensor in proto.graph.initializer:
        if tensor.name in arrays:
            array = arrays[tensor.name]
            del tensor.external_data[:]
            for key, value in (("location", _IN_MEMORY), ("offset", array.ctypes.data), ("length", array.nbytes)):
                tensor.external_data.add(key=key, value=str(value))
    return proto.SerializeToString(), list(arrays.values())


def to_tensor(array: Array) -> Any:
    """Return an array as a tensor of OpenVINO's, which shares its memory where that can be written to."""
    openvino = importlib.import_module("openvino")
    array = np.require(array, requirements=["C", "W"])  # what may not be written to is not shared, though only read
    name = _NAMES.get(array.dtype)
    if name is not None:
        bits = array.view(np.uint16 if array.dtype.itemsize == 2 else np.uint8)
        return openvino.Tensor(bits, openvino.Shape(array.shape), getattr(openvino.Type, name))
    if not array.size:
        return openvino.Tensor(openvino.Type(array.dtype), openvino.Shape(array.shape))
    return openvino.Tensor(array, shared_memory=True)


def to_array(tensor: Any) -> Array:
    """Return a copy of what a tensor of OpenVINO's holds."""
    name = tensor.element_type.get_type_name()
    if name == "boolean":
        return np.array(tensor.data, bool)
    found = np.array(tensor.data)
    return found.view(_DTYPES[name]) if name in _DTYPES else found

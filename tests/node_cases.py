"""ONNX's own conformance cases for single operators, as data, and a plain ONNX Runtime to run them in.

`onnx.backend.test.case.node` makes its cases while it is imported: about four seconds, with NumPy's global random
state. `node_cases` does it once, from a fixed state, and puts the caller's state back. The collection behind it can
only be trusted if nobody asked it for a single operator first, since a module is imported once: `node_cases` refuses
then.
"""

from __future__ import annotations

import ctypes
import functools
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import onnx
import onnxruntime as ort
from onnx.backend.test.case import node as onnx_cases

# A tensor, a sequence of tensors, or an optional that is empty.
Datum: TypeAlias = np.ndarray | list[np.ndarray] | None

# onnx 1.19, the oldest we allow, has more than this; fewer means that the collection was spoilt.
FEWEST_CASES = 1500
# The seed of the cases whose inputs onnx draws; any fixed number does.
COLLECTION_SEED = 0
# NumPy's codes for the tensor types that ONNX Runtime exchanges as arrays; the others pass as raw bytes.
_EXCHANGED = frozenset("?bBhHiIlLqQefdO")


@dataclass(frozen=True, eq=False)
class NodeCase:
    """One operator's model, what to feed it and what ONNX says it gives."""

    name: str
    model: onnx.ModelProto
    inputs: dict[str, Datum]
    outputs: list[Datum]
    rtol: float
    atol: float


@functools.cache
def node_cases() -> tuple[NodeCase, ...]:
    """Return every node case of the installed onnx, in its order."""
    state = np.random.get_state()
    np.random.seed(COLLECTION_SEED)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # onnx computes overflows and divisions by zero on purpose
            collected = onnx_cases.collect_testcases(None)
    finally:
        np.random.set_state(state)
    if len(collected) < FEWEST_CASES:
        raise RuntimeError(f"onnx collected only `{len(collected)}` node cases: it was asked for one operator before")
    return tuple(_node_case(case) for case in collected)


def with_constant_inputs(case: NodeCase) -> onnx.ModelProto | None:
    """Return the case's model with its inputs turned into initializers, or None if one of them is not a tensor."""
    if any(info.type.WhichOneof("value") != "tensor_type" for info in case.model.graph.input):
        return None
    model = onnx.ModelProto()
    model.CopyFrom(case.model)
    tensors = [
        _tensor(case.inputs[info.name], info.type.tensor_type.elem_type, info.name) for info in model.graph.input
    ]
    del model.graph.input[:]
    model.graph.initializer.extend(tensors)
    model.ir_version = max(model.ir_version, 4)  # before IR version 4, an initializer has to be an input as well
    return model


def run(model: onnx.ModelProto, inputs: Mapping[str, Datum]) -> list[Datum] | None:
    """Return the model's outputs in ONNX Runtime without its optimizations, or None if it cannot run the model."""
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    try:
        session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        types = {info.name: info.type for info in model.graph.input}
        if all(_exchanged(type_) for type_ in [*types.values(), *(info.type for info in model.graph.output)]):
            return [_datum(value) for value in session.run(None, dict(inputs))]
        values = {name: _ort_value(inputs[name], type_) for name, type_ in types.items()}
        return [_from_ort_value(value) for value in session.run_with_ort_values(None, values)]
    except Exception as error:
        if not _is_refusal(error):
            raise
        return None


@functools.cache
def newest_opset_that_runs() -> int:
    """Return the newest opset that ONNX Runtime opens a model of."""
    info = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1])
    result = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [1])
    graph = onnx.helper.make_graph([onnx.helper.make_node("Relu", ["x"], ["y"])], "relu", [info], [result])
    for opset in range(onnx.defs.onnx_opset_version(), 0, -1):
        model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", opset)], ir_version=8)
        if run(model, {"x": np.ones(1, np.float32)}) is not None:
            return opset
    raise RuntimeError("ONNX Runtime opens no model at all")


def agrees(outputs: Sequence[Datum] | None, case: NodeCase) -> bool:
    """Tell whether the outputs are those that the case expects, within its tolerance; a NaN equals a NaN."""
    if outputs is None or len(outputs) != len(case.outputs):
        return False
    return all(_agree(got, want, case) for got, want in zip(outputs, case.outputs, strict=True))


def runs_in_onnxruntime(case: NodeCase) -> bool:
    """Tell whether ONNX Runtime runs the case as it is and gives the expected outputs."""
    return agrees(run(case.model, case.inputs), case)


def _node_case(case: onnx_cases.TestCase) -> NodeCase:
    [(inputs, outputs)] = case.data_sets
    names = [info.name for info in case.model.graph.input]
    return NodeCase(
        name=case.name,
        model=case.model,
        inputs={name: _datum(value) for name, value in zip(names, inputs, strict=True)},
        outputs=[_datum(value) for value in outputs],
        rtol=case.rtol,
        atol=case.atol,
    )


def _datum(value: object) -> Datum:
    if value is None:
        return None
    if isinstance(value, onnx.TensorProto):
        return onnx.numpy_helper.to_array(value)
    if isinstance(value, list):
        return [np.asarray(item) for item in value]
    return np.asarray(value)


def _tensor(array: np.ndarray, elem_type: int, name: str) -> onnx.TensorProto:
    tensor = onnx.numpy_helper.from_array(np.ascontiguousarray(array).reshape(array.shape), name)
    if tensor.data_type != elem_type:
        raise TypeError(f"`{name}` is declared `{elem_type}` but holds `{tensor.data_type}`")
    return tensor


def _exchanged(type_: onnx.TypeProto) -> bool:
    """Tell whether the value passes as NumPy arrays; sequences and optionals do, whatever they hold."""
    if type_.WhichOneof("value") != "tensor_type":
        return True
    return onnx.helper.tensor_dtype_to_np_dtype(type_.tensor_type.elem_type).char in _EXCHANGED


def _ort_value(datum: Datum, type_: onnx.TypeProto) -> ort.OrtValue:
    if _exchanged(type_):
        return ort.OrtValue.ortvalue_from_numpy(datum)
    elem_type = type_.tensor_type.elem_type
    value = ort.OrtValue.ortvalue_from_shape_and_type(list(datum.shape), elem_type)
    raw = _tensor(datum, elem_type, "").raw_data
    ctypes.memmove(value.data_ptr(), raw, len(raw))
    return value


def _from_ort_value(value: ort.OrtValue) -> Datum:
    elem_type = value.element_type()
    if onnx.helper.tensor_dtype_to_np_dtype(elem_type).char in _EXCHANGED:
        return np.asarray(value.numpy())
    raw = ctypes.string_at(value.data_ptr(), value.tensor_size_in_bytes())
    return onnx.numpy_helper.to_array(onnx.TensorProto(data_type=elem_type, dims=value.shape(), raw_data=raw))


def _is_refusal(error: Exception) -> bool:
    """Tell whether the error is one of ONNX Runtime's own; any other is a fault of this file or of the caller's."""
    return type(error).__module__.startswith("onnxruntime")


def _agree(got: Datum, want: Datum, case: NodeCase) -> bool:
    if want is None or got is None:
        return want is got
    if isinstance(want, list) or isinstance(got, list):
        if not (isinstance(want, list) and isinstance(got, list)) or len(want) != len(got):
            return False
        return all(_agree(mine, theirs, case) for mine, theirs in zip(got, want, strict=True))
    if got.shape != want.shape or (got.dtype != want.dtype and want.dtype.kind not in "OUS"):
        return False
    if want.dtype.kind in "OUSbiu":
        return bool((got == want).all())
    wide = np.complex128 if want.dtype.kind == "c" else np.float64
    return bool(np.allclose(got.astype(wide), want.astype(wide), rtol=case.rtol, atol=case.atol, equal_nan=True))

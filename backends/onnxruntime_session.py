"""An open inference session of ONNX Runtime."""

from __future__ import annotations

import contextlib
import ctypes
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Self

import ml_dtypes
import numpy as np
import onnx_ir as ir

from graphopt.backend import Array, Feeds, Placement
from graphopt.errors import BackendError, one_line

from .onnxruntime_library import runtime

# Types that ONNX Runtime hands out as the bytes they are made of.
_AS_BYTES = {"tensor(float8e4m3fn)": np.dtype(ml_dtypes.float8_e4m3fn)}
# Of which it makes no arrays at all.
_NO_ARRAYS = {
    "tensor(bfloat16)": np.dtype(ml_dtypes.bfloat16),
    "tensor(float8e4m3fnuz)": np.dtype(ml_dtypes.float8_e4m3fnuz),
    "tensor(float8e5m2)": np.dtype(ml_dtypes.float8_e5m2),
    "tensor(float8e5m2fnuz)": np.dtype(ml_dtypes.float8_e5m2fnuz),
}
_STRINGS = "tensor(string)"
_REGISTERED = 2  # numpy's `isbuiltin` of a dtype that a package brings


class OnnxRuntimeSession:
    """An open inference session.

    Args:
        session: ONNX Runtime's.
        device: Where it computes, ``cpu`` or ``cuda``, and the number of it.
        placed: Tells where its nodes went, while it is open.
        held: What must outlive it, closed with it.
    """

    def __init__(
        self,
        session: Any,
        *,
        device: tuple[str, int] = ("cpu", 0),
        placed: Callable[[], Placement | None] = lambda: None,
        held: contextlib.ExitStack | None = None,
    ) -> None:
        self._session = session
        self._device = device
        self._placed = placed
        self._held = held if held is not None else contextlib.ExitStack()
        # Inputs with a default (initializers) are listed apart by ONNX Runtime and need no feed.
        self.input_names: Sequence[str] = [value.name for value in session.get_inputs()]
        self.output_names: Sequence[str] = [value.name for value in session.get_outputs()]
        self._types = [value.type for value in session.get_outputs()]
        self._has_strings = any(value.type == _STRINGS for value in session.get_inputs())
        self._views = {value.name: _AS_BYTES[value.type] for value in session.get_outputs() if value.type in _AS_BYTES}

    def run(self, feeds: Feeds) -> dict[str, Array]:
        """Run the model once; see `graphopt.backend.Session.run`."""
        with in_one_line("onnxruntime fails on the model"):
            values = self._run(feeds)
        outputs = dict(zip(self.output_names, values, strict=True))
        return outputs | {name: outputs[name].view(dtype) for name, dtype in self._views.items()}

    def _run(self, feeds: Feeds) -> list[Any]:
        # Of types that numpy does not know by itself, ONNX Runtime takes values, and no arrays.
        given = {name: self._value(array) if _is_extension(array) else _native(array) for name, array in feeds.items()}
        if _NO_ARRAYS.keys().isdisjoint(self._types):
            values: list[Any] = self._session.run(None, given)
            return values
        own = {name: self._value(array) if isinstance(array, np.ndarray) else array for name, array in given.items()}
        found = self._session.run_with_ort_values(None, own)
        return [_copied(one) if one.data_type() in _NO_ARRAYS else one.numpy() for one in found]

    def bind(self, feeds: Feeds) -> Callable[[], None]:
        """Put a feed where the model computes; see `graphopt.backend.Bindable.bind`."""
        self._check_complete(feeds)
        if self._has_strings:
            own = {name: np.array(array) for name, array in feeds.items()}
            return lambda: self._run_and_forget(own)  # it binds no strings
        session, binding = self._session, self._session.io_binding()
        values: list[Any] = []
        with in_one_line("onnxruntime refuses the feeds"):
            for name, array in feeds.items():
                values.append(self._value(array))
                binding.bind_ortvalue_input(name, values[-1])
            for name in self.output_names:
                binding.bind_output(name, *self._device)
            binding.synchronize_inputs()

        def run(_held: object = values) -> None:
            with in_one_line("onnxruntime fails on the model"):
                session.run_with_iobinding(binding)
                binding.synchronize_outputs()

        return run

    def _check_complete(self, feeds: Feeds) -> None:
        missing = [name for name in self.input_names if name not in feeds]
        if missing:
            raise BackendError(f"the feeds lack the input `{missing[0]}`", hint="feed every input of the model")

    def _run_and_forget(self, feeds: Feeds) -> None:
        with in_one_line("onnxruntime fails on the model"):
            self._run(feeds)

    def _value(self, array: Array) -> Any:
        make = runtime().OrtValue
        # A copy of its own: on the CPU a value otherwise reads the caller's memory.
        own = np.array(_native(array), order="C")
        if _is_extension(own):
            return make.ortvalue_from_numpy_with_onnx_type(own, int(ir.DataType.from_numpy(own.dtype)))
        return make.ortvalue_from_numpy(own, *self._device)

    def placement(self) -> Placement | None:
        """Return where the nodes went; see `graphopt.backend.Placing.placement`."""
        return self._placed()

    def end_profiling(self) -> Path:
        """Finish the operator profile asked for at opening and return its file."""
        return Path(self._session.end_profiling())

    def close(self) -> None:
        """Free the session."""
        self._session, self._placed = None, lambda: None
        self._held.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@contextlib.contextmanager
def in_one_line(words: str) -> Iterator[None]:
    """Turn an error of ONNX Runtime into a BackendError that begins with given words."""
    try:
        yield
    except Exception as error:
        if not _is_runtime_error(error):
            raise
        raise BackendError(f"{words}: {one_line(error)}") from error


def _is_extension(array: Array) -> bool:
    """Return whether an array is of floats or integers that numpy has no type of its own for."""
    return array.dtype.isbuiltin == _REGISTERED


def _native(array: Array) -> Array:
    """Return an array in this machine's byte order: ONNX Runtime takes the bytes of any other as they lie."""
    return array if array.dtype.isnative else array.astype(array.dtype.newbyteorder("="))


def _copied(value: Any) -> Array:
    """Return a copy of what a value in this process's memory holds."""
    shape, dtype = tuple(value.shape()), _NO_ARRAYS[value.data_type()]
    raw = ctypes.string_at(value.data_ptr(), dtype.itemsize * math.prod(shape))
    return np.frombuffer(raw, dtype).reshape(shape)


def _is_runtime_error(error: Exception) -> bool:
    return type(error).__module__.startswith("onnxruntime") or isinstance(error, (RuntimeError, ValueError))

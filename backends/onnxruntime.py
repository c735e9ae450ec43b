"""ONNX Runtime, with the execution provider as an option."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import ml_dtypes
import numpy as np
import onnx_ir as ir

from graphopt.backend import Array, Feeds
from graphopt.errors import BackendError
from graphopt.model_io import serialize
from graphopt.options import opt

_PROVIDERS = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
}
# Types that ONNX Runtime hands out as the bytes they are made of.
_AS_BYTES = {"tensor(float8e4m3fn)": np.dtype(ml_dtypes.float8_e4m3fn)}
_FATAL_ONLY = 4  # ONNX Runtime's log severity: warnings about the model are not the user's business


@dataclass(frozen=True)
class OnnxRuntime:
    """ONNX Runtime; ``provider`` says on what."""

    provider: Literal["cpu", "cuda", "tensorrt"] = opt("cpu", help="execution provider")

    name: ClassVar[str] = "onnxruntime"
    help: ClassVar[str] = "ONNX Runtime (CPU, CUDA and TensorRT providers)"

    def missing(self) -> str | None:
        """Return why this provider cannot run here and what to install, or None if it can."""
        extra = "cpu" if self.provider == "cpu" else "gpu"
        runtime = _runtime()
        if runtime is None:
            return f"ONNX Runtime is not installed; install `graphopt[{extra}]`"
        wanted = _PROVIDERS[self.provider]
        if wanted not in runtime.get_available_providers():
            return (
                f"this ONNX Runtime has no {wanted}; on a machine with an NVIDIA GPU, uninstall `onnxruntime` "
                f"and install `graphopt[{extra}]`"
            )
        return None

    def describe(self) -> str:
        """Return the name tables show."""
        return f"onnxruntime {self.provider}"

    def open(
        self, model: ir.Model | Path, *, threads: int = 0, optimize: bool = True, profile: Path | None = None
    ) -> OnnxRuntimeSession:
        """Open a model; see `graphopt.backend.Backend.open`."""
        why = self.missing()
        if why is not None:
            raise BackendError(f"backend `{self.describe()}` cannot run here: {why.split(';')[0]}", hint=_hint(why))
        options = _session_options(threads, optimize, profile)
        providers = [_PROVIDERS[self.provider]]
        try:
            if isinstance(model, Path):
                return OnnxRuntimeSession(_runtime().InferenceSession(str(model), options, providers=providers))
            proto, weights = serialize(model)
            # The session reads the weights where they are mapped; they must outlive its creation.
            arrays = {name: np.ascontiguousarray(tensor.numpy()) for name, tensor in weights.items()}
            _attach(options, arrays, weights)
            return OnnxRuntimeSession(_runtime().InferenceSession(proto, options, providers=providers), arrays)
        except Exception as error:
            if _is_runtime_error(error):
                raise BackendError(f"{self.describe()} refuses the model: {_one_line(error)}") from error
            raise


class OnnxRuntimeSession:
    """An open inference session."""

    def __init__(self, session: Any, weights: dict[str, Array] | None = None) -> None:
        self._session = session
        self._weights = weights
        # Inputs with a default (initializers) are listed apart by ONNX Runtime and need no feed.
        self.input_names: Sequence[str] = [value.name for value in session.get_inputs()]
        self.output_names: Sequence[str] = [value.name for value in session.get_outputs()]
        self._views = {value.name: _AS_BYTES[value.type] for value in session.get_outputs() if value.type in _AS_BYTES}

    def run(self, feeds: Feeds) -> dict[str, Array]:
        """Run the model once; see `graphopt.backend.Session.run`."""
        try:
            values = self._session.run(None, dict(feeds))
        except Exception as error:
            if _is_runtime_error(error):
                raise BackendError(f"onnxruntime fails on the model: {_one_line(error)}") from error
            raise
        outputs = dict(zip(self.output_names, values, strict=True))
        return outputs | {name: outputs[name].view(dtype) for name, dtype in self._views.items()}

    def end_profiling(self) -> Path:
        """Finish the operator profile asked for at opening and return its file."""
        return Path(self._session.end_profiling())

    def close(self) -> None:
        """Free the session."""
        self._session = self._weights = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@functools.cache
def _runtime() -> Any:
    """Return the module, or None where it is not installed."""
    try:
        return importlib.import_module("onnxruntime")
    except ImportError:
        return None


def _session_options(threads: int, optimize: bool, profile: Path | None) -> Any:
    runtime = _runtime()
    options = runtime.SessionOptions()
    options.log_severity_level = _FATAL_ONLY
    options.intra_op_num_threads = threads
    level = runtime.GraphOptimizationLevel
    options.graph_optimization_level = level.ORT_ENABLE_ALL if optimize else level.ORT_DISABLE_ALL
    if profile is not None:
        options.enable_profiling = True
        options.profile_file_prefix = str(profile)
    return options


def _attach(options: Any, arrays: dict[str, Array], weights: dict[str, ir.TensorProtocol]) -> None:
    if not arrays:
        return
    make = _runtime().OrtValue.ortvalue_from_numpy_with_onnx_type
    values = [make(array, int(weights[name].dtype)) for name, array in arrays.items()]
    options.add_external_initializers(list(arrays), values)


def _is_runtime_error(error: Exception) -> bool:
    return type(error).__module__.startswith("onnxruntime") or isinstance(error, (RuntimeError, ValueError))


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:400]


def _hint(why: str) -> str | None:
    return why.partition("; ")[2] or None

"""ONNX Runtime, with the execution provider as an option."""

from __future__ import annotations

import functools
import importlib
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import ml_dtypes
import numpy as np
import onnx_ir as ir

from graphopt.backend import Array, Feeds, Kernel
from graphopt.errors import BackendError, UsageError, one_line
from graphopt.model_io import serialize
from graphopt.options import opt

from .onnxruntime_kernels import read_kernels

_PROVIDERS = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
}
# Types that ONNX Runtime hands out as the bytes they are made of.
_AS_BYTES = {"tensor(float8e4m3fn)": np.dtype(ml_dtypes.float8_e4m3fn)}
# The optimized graph is written to be looked at: its weights go to a file that nobody reads.
_WEIGHTS_APART = {
    "session.optimized_model_external_initializers_file_name": "weights",
    "session.optimized_model_external_initializers_min_size_in_bytes": "1024",
}
# Keeps ONNX Runtime from making operators on codes of operators between DQ and Q.
_DISABLE_FUSIONS = "session.disable_quant_qdq"
_OPERATORS_ON_CODES = ("MatMulIntegerToFloat", "QLinearMatMul")
_FATAL_ONLY = 4  # ONNX Runtime's log severity: warnings about the model are not the user's business


@dataclass(frozen=True)
class OnnxRuntime:
    """ONNX Runtime; ``provider`` says on what."""

    provider: Literal["cpu", "cuda", "tensorrt"] = opt("cpu", help="execution provider")
    config: tuple[str, ...] = opt((), help="session configuration entries, KEY=VALUE")

    name: ClassVar[str] = "onnxruntime"
    help: ClassVar[str] = "ONNX Runtime (CPU, CUDA and TensorRT providers)"

    def __post_init__(self) -> None:
        """Refuse a configuration entry that is none."""
        for entry in self.config:
            if not all(entry.partition("=")):
                raise UsageError(f"backend `onnxruntime`: `{entry}` is no configuration entry", hint="KEY=VALUE")

    def missing(self) -> BackendError | None:
        """Return the error that says why this provider cannot run here and what to install, or None if it can."""
        extra = "cpu" if self.provider == "cpu" else "gpu"
        runtime = _runtime()
        if runtime is None:
            return BackendError("ONNX Runtime is not installed", hint=f"install `graphopt[{extra}]`")
        wanted = _PROVIDERS[self.provider]
        if wanted in runtime.get_available_providers():
            return None
        hint = (
            "`--backend onnxruntime` runs it on this CPU for checks; "
            f"on a machine with an NVIDIA GPU, uninstall `onnxruntime` and install `graphopt[{extra}]`"
        )
        return BackendError(
            f"backend `{self.describe()}` cannot run here: this ONNX Runtime has no {wanted}", hint=hint
        )

    def describe(self) -> str:
        """Return the name tables show."""
        return f"onnxruntime {self.provider}"

    def open(
        self, model: ir.Model | Path, *, threads: int = 0, optimize: bool = True, profile: Path | None = None
    ) -> OnnxRuntimeSession:
        """Open a model; see `graphopt.backend.Backend.open`."""
        return self._open(model, _session_options(threads, optimize, profile) if _runtime() is not None else None)

    def kernels(self, model: ir.Model, feeds: Feeds, *, threads: int = 0, runs: int = 5) -> list[Kernel]:
        """Return what ONNX Runtime makes of a model; see `graphopt.backend.Inspectable.kernels`."""
        with tempfile.TemporaryDirectory(prefix="graphopt_kernels_") as folder:
            optimized = Path(folder, "optimized.onnx")
            options = None
            if _runtime() is not None:
                options = _session_options(threads, True, Path(folder, "profile"))
                options.optimized_model_filepath = str(optimized)
                for key, value in _WEIGHTS_APART.items():
                    options.add_session_config_entry(key, value)
            with self._open(model, options) as session:
                for _ in range(runs + 1):
                    session.run(feeds)
                profile = session.end_profiling()
            return read_kernels(optimized, profile, runs)

    def _open(self, model: ir.Model | Path, options: Any) -> OnnxRuntimeSession:
        why = self.missing()
        if why is not None:
            raise why
        for entry in self.config:
            key, _, value = entry.partition("=")
            options.add_session_config_entry(key, value)
        try:
            if isinstance(model, Path):
                return self._session(str(model), options, {})
            proto, weights = serialize(model)
            # ONNX Runtime drops what nothing reads before it takes weights, and then refuses to be given these.
            weights = {name: tensor for name, tensor in weights.items() if _is_read(model.graph.initializers[name])}
            # The session reads the weights where they are mapped; they must outlive its creation.
            arrays = {name: np.asarray(tensor.numpy(), order="C") for name, tensor in weights.items()}
            _attach(options, arrays, weights)
            return self._session(proto, options, arrays)
        except Exception as error:
            if _is_runtime_error(error):
                raise BackendError(f"{self.describe()} refuses the model: {one_line(error)}") from error
            raise

    def _session(self, model: str | bytes, options: Any, weights: dict[str, Array]) -> OnnxRuntimeSession:
        wanted = _PROVIDERS[self.provider]
        try:
            session = _runtime().InferenceSession(model, options, providers=[wanted])
        except Exception as error:
            if not _fused_floats(error) or any(entry.startswith(_DISABLE_FUSIONS) for entry in self.config):
                raise
            options.add_session_config_entry(_DISABLE_FUSIONS, "1")
            session = _runtime().InferenceSession(model, options, providers=[wanted])
        # A provider whose libraries fail to load is replaced by the CPU with no more than a line in the log.
        if wanted not in session.get_providers():
            raise BackendError(
                f"backend `{self.describe()}` did not start: ONNX Runtime fell back to the CPU",
                hint="check the driver, CUDA and cuDNN that this ONNX Runtime was built for",
            )
        return OnnxRuntimeSession(session, weights)


class OnnxRuntimeSession:
    """An open inference session."""

    def __init__(self, session: Any, weights: dict[str, Array]) -> None:
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
                raise BackendError(f"onnxruntime fails on the model: {one_line(error)}") from error
            raise
        outputs = dict(zip(self.output_names, values, strict=True))
        return outputs | {name: outputs[name].view(dtype) for name, dtype in self._views.items()}

    def end_profiling(self) -> Path:
        """Finish the operator profile asked for at opening and return its file."""
        return Path(self._session.end_profiling())

    def close(self) -> None:
        """Free the session."""
        self._session = None
        self._weights = {}

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
    # Otherwise the threads of one session go on spinning after its run, and slow down what runs next to it.
    options.add_session_config_entry("session.force_spinning_stop", "1")
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


def _fused_floats(error: Exception) -> bool:
    """Return whether ONNX Runtime 1.31 fails on what it made itself: an operator on integers, given 8-bit floats."""
    text = str(error)
    return "float8" in text and any(name in text for name in _OPERATORS_ON_CODES)


def _is_read(value: ir.Value) -> bool:
    return bool(value.uses()) or value.is_graph_output()


def _is_runtime_error(error: Exception) -> bool:
    return type(error).__module__.startswith("onnxruntime") or isinstance(error, (RuntimeError, ValueError))

"""ONNX Runtime, with the execution provider as an option."""

from __future__ import annotations

import contextlib
import functools
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir

from graphopt.backend import Array, Feeds, Kernel, Placement, Trouble
from graphopt.errors import BackendError
from graphopt.model_io import load, serialize

from . import onnxruntime_health
from .onnxruntime_kernels import read_kernels, read_profile
from .onnxruntime_library import PROVIDERS, load_gpu_libraries, missing, runtime, tensorrt_version
from .onnxruntime_options import (
    CudaOptions,
    GpuOptions,
    SessionOptions,
    TensorRtOptions,
    check_options,
    check_weak_typing,
    config_entries,
    passed_on,
)
from .onnxruntime_placement import NO_FALLBACK, RECORD, assignment, check_placement
from .onnxruntime_profiles import parse_spans
from .onnxruntime_session import OnnxRuntimeSession, in_one_line
from .onnxruntime_tensorrt import TensorRtModel

# The optimized graph is written to be looked at: its weights go to a file that nobody reads.
_WEIGHTS_APART = {
    "session.optimized_model_external_initializers_file_name": "weights",
    "session.optimized_model_external_initializers_min_size_in_bytes": "1024",
}
# Keeps ONNX Runtime from making operators on codes of operators between DQ and Q.
_DISABLE_FUSIONS = "session.disable_quant_qdq"
_OPERATORS_ON_CODES = ("MatMulIntegerToFloat", "QLinearMatMul")
_DISABLE_OPTIMIZERS = "optimization.disable_specified_optimizers"
# It quantizes biases to int32 before the model is divided, and TensorRT dequantizes no int32.
_BIAS_QUANTIZATION = "WeightBiasQuantization"
_FATAL_ONLY = 4  # ONNX Runtime's log severity: warnings about the model are not the user's business


@dataclass(frozen=True)
class OnnxRuntime(TensorRtOptions, CudaOptions, GpuOptions, SessionOptions):
    """ONNX Runtime; ``provider`` says on what."""

    name: ClassVar[str] = "onnxruntime"
    help: ClassVar[str] = "ONNX Runtime (CPU, CUDA and TensorRT providers)"

    def __post_init__(self) -> None:
        """Refuse options that do not go together, and entries that are none."""
        config_entries(self.config)
        check_options(self)
        parse_spans(self.dims)

    @property
    def plain(self) -> bool:
        """Whether it can run a model as it stands: TensorRT builds an engine of its own, which takes minutes."""
        return self.provider != "tensorrt"

    def missing(self) -> BackendError | None:
        """Return the error that says why this provider cannot run here and what to install, or None if it can."""
        return missing(self.provider, self.device_id, self.describe())

    def describe(self) -> str:
        """Return the name tables show."""
        return f"onnxruntime {self.provider}" + (f":{self.device_id}" if self.device_id else "")

    def version(self) -> str | None:
        """Return the packages that are installed, with their versions, or None."""
        return onnxruntime_health.installed_version()

    def variants(self) -> Sequence[OnnxRuntime]:
        """Return it for every provider graphopt knows."""
        return [OnnxRuntime(provider=provider) for provider in PROVIDERS]

    def troubles(self) -> Sequence[Trouble]:
        """Return what is wrong with the installation; see `graphopt.backend.Diagnosable.troubles`."""
        return onnxruntime_health.troubles()

    def open(
        self, model: ir.Model | Path, *, threads: int = 0, optimize: bool = True, profile: Path | None = None
    ) -> OnnxRuntimeSession:
        """Open a model; see `graphopt.backend.Backend.open`."""
        self._check_runs_here()
        options = _session_options(threads, optimize, profile)
        if optimize or self.provider == "cpu":
            return self._open(model, options)
        # What is compared bit by bit must not hang on which kernel happened to be the fastest.
        options.use_deterministic_compute = True
        steady = self.provider == "cuda" and self.cudnn_conv_algo_search is None
        chosen = replace(self, cudnn_conv_algo_search="DEFAULT") if steady else self
        return chosen._open(model, options)

    def kernels(self, model: ir.Model, feeds: Feeds, *, threads: int = 0, runs: int = 5) -> list[Kernel]:
        """Return what ONNX Runtime makes of a model; see `graphopt.backend.Inspectable.kernels`."""
        self._check_runs_here()
        with tempfile.TemporaryDirectory(prefix="graphopt_kernels_") as folder:
            optimized = Path(folder, "optimized.onnx")
            options = _session_options(threads, True, Path(folder, "profile"))
            # A graph with engines in it cannot be written: there the profile alone tells what ran.
            if self.provider != "tensorrt":
                options.optimized_model_filepath = str(optimized)
                _add_entries(options, _WEIGHTS_APART)
            with self._open(model, options) as session:
                for _ in range(runs + 1):
                    session.run(feeds)
                profile = session.end_profiling()
            return read_kernels(optimized, profile, runs) if optimized.exists() else read_profile(profile, runs)

    def _check_runs_here(self) -> None:
        why = self.missing()
        if why is not None:
            raise why
        if self.cpu_ops and not self.allow_cpu and not _tells_placement():
            raise BackendError(
                f"backend `{self.describe()}`: this ONNX Runtime does not tell where nodes run, as `cpu_ops` asks",
                hint="ONNX Runtime 1.24 or newer, or `allow_cpu=true`",
            )
        check_weak_typing(self, tensorrt_version() if self.provider == "tensorrt" else None)

    def _open(self, model: ir.Model | Path, options: Any) -> OnnxRuntimeSession:
        _add_entries(options, self._entries())
        if self.provider != "cpu":
            load_gpu_libraries()
        with contextlib.ExitStack() as held, in_one_line(f"{self.describe()} refuses the model"):
            session = self._started(model, options, held)
            # The model as given knows its own names; a file is only looked into if that must be known.
            placed = functools.partial(
                assignment,
                session,
                PROVIDERS[self.provider],
                lambda: load(model) if isinstance(model, Path) else model,
            )
            self._check_stays(session, placed)
            device = ("cpu" if self.provider == "cpu" else "cuda", self.device_id)
            return OnnxRuntimeSession(session, device=device, placed=placed, held=held.pop_all())

    def _started(self, model: ir.Model | Path, options: Any, held: contextlib.ExitStack) -> Any:
        """Return ONNX Runtime's session; what must live as long as it is held."""
        if self.provider == "tensorrt":
            return self._started_on_tensorrt(TensorRtModel(model, self, held), options)
        if isinstance(model, Path):
            return self._session(str(model), options, {})
        proto, weights = serialize(model)
        # ONNX Runtime drops what nothing reads before it takes weights, and then refuses to be given these.
        weights = {name: tensor for name, tensor in weights.items() if _is_read(model.graph.initializers[name])}
        # The session reads the weights where they are mapped; they must outlive its creation.
        arrays = {name: np.asarray(tensor.numpy(), order="C") for name, tensor in weights.items()}
        held.callback(arrays.clear)
        _attach(options, arrays, weights)
        return self._session(proto, options, {})

    def _started_on_tensorrt(self, readied: TensorRtModel, options: Any) -> Any:
        try:
            return self._session(str(readied.file), options, readied.options)
        except Exception as error:
            if not readied.learn(error):
                raise
        return self._session(str(readied.file), options, readied.options)

    def _entries(self) -> dict[str, str]:
        """Return the session's configuration: the user's entries, and what the provider needs."""
        entries = dict(config_entries(self.config))
        if self.provider == "tensorrt":
            disabled = entries.get(_DISABLE_OPTIMIZERS, "").split(";")
            entries[_DISABLE_OPTIMIZERS] = ";".join(filter(None, dict.fromkeys([*disabled, _BIAS_QUANTIZATION])))
        # Where ONNX Runtime cannot tell where nodes went, it is asked to refuse any on the CPU.
        if self.provider != "cpu" and not self.allow_cpu and not _tells_placement():
            entries.setdefault(NO_FALLBACK, "1")
        return {RECORD: "1", **entries}

    def _providers(self, own: dict[str, str]) -> list[tuple[str, dict[str, str]]]:
        wanted = PROVIDERS[self.provider]
        chosen = [(wanted, passed_on(self) | own)]
        if self.provider == "tensorrt":
            # What TensorRT leaves is still the GPU's.
            chosen.append((PROVIDERS["cuda"], passed_on(OnnxRuntime(provider="cuda", device_id=self.device_id))))
        return chosen

    def _session(self, model: str | bytes, options: Any, own: dict[str, str]) -> Any:
        wanted = PROVIDERS[self.provider]
        # With a fallback, an error of the provider is printed, and the model run by another one: even in mid-run.
        start = functools.partial(runtime().InferenceSession, providers=self._providers(own), enable_fallback=0)
        try:
            session = start(model, options)
        except Exception as error:
            if not _fused_floats(error) or any(entry.startswith(_DISABLE_FUSIONS) for entry in self.config):
                raise
            options.add_session_config_entry(_DISABLE_FUSIONS, "1")
            session = start(model, options)
        # A provider whose libraries fail to load is replaced by the next with no more than a line in the log.
        if wanted not in session.get_providers():
            libraries = "TensorRT, CUDA and cuDNN" if self.provider == "tensorrt" else "CUDA and cuDNN"
            raise BackendError(
                f"backend `{self.describe()}` did not start: ONNX Runtime fell back to {session.get_providers()[0]}",
                hint=f"install the {libraries} that this ONNX Runtime was built for; what it printed names the file",
            )
        return session

    def _check_stays(self, session: Any, placed: functools.partial[Placement | None]) -> None:
        if self.provider != "cpu" and not self.allow_cpu:
            check_placement(placed(), self.cpu_ops, self.describe())


def _session_options(threads: int, optimize: bool, profile: Path | None) -> Any:
    options = runtime().SessionOptions()
    options.log_severity_level = _FATAL_ONLY
    options.intra_op_num_threads = threads
    # Otherwise the threads of one session go on spinning after its run, and slow down what runs next to it.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    level = runtime().GraphOptimizationLevel
    options.graph_optimization_level = level.ORT_ENABLE_ALL if optimize else level.ORT_DISABLE_ALL
    if profile is not None:
        options.enable_profiling = True
        options.profile_file_prefix = str(profile)
    return options


def _add_entries(options: Any, entries: dict[str, str]) -> None:
    for key, value in entries.items():
        options.add_session_config_entry(key, value)


def _attach(options: Any, arrays: dict[str, Array], weights: dict[str, ir.TensorProtocol]) -> None:
    if not arrays:
        return
    make = runtime().OrtValue.ortvalue_from_numpy_with_onnx_type
    values = [make(array, int(weights[name].dtype)) for name, array in arrays.items()]
    options.add_external_initializers(list(arrays), values)


def _tells_placement() -> bool:
    return hasattr(runtime().InferenceSession, "get_provider_graph_assignment_info")


def _fused_floats(error: Exception) -> bool:
    """Return whether ONNX Runtime 1.31 fails on what it made itself: an operator on integers, given 8-bit floats."""
    text = str(error)
    return "float8" in text and any(name in text for name in _OPERATORS_ON_CODES)


def _is_read(value: ir.Value) -> bool:
    return bool(value.uses()) or value.is_graph_output()

"""Where TensorRT keeps engines and timings: a folder for each model, software and GPU, so that none is ever stale."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path

import onnx_ir as ir

from graphopt.content_keys import tensor_digest
from graphopt.errors import UsageError
from graphopt.model_io import serialize

from .onnxruntime_library import gpus, runtime, tensorrt_version

# Part of every key: raised when engines made until then must not be found any more.
_FORMAT = "graphopt engines 1"
_KEY_BYTES = 16
# Where engines are looked for and written says nothing of what they hold, nor does what is logged.
_NOT_PART_OF_AN_ENGINE = frozenset(
    {"trt_engine_cache_enable", "trt_timing_cache_enable", "trt_detailed_build_log", "trt_dump_subgraphs"}
)


def cache_options(model: ir.Model, root: str | None, options: Mapping[str, str]) -> dict[str, str]:
    """Return the options that say where engines and timings of a model are kept; the folders are made.

    Engines lie under a key of the model's content, the options, the versions of ONNX Runtime and TensorRT, the driver
    and the GPU. Timings are of kernels, not of models: their key has only what is about the machine.

    Args:
        model: The model as ONNX Runtime is given it.
        root: The folder of all that; None for the user's cache.
        options: The provider's other options.

    Raises:
        UsageError: A folder cannot be made.
    """
    engines = options.get("trt_engine_cache_enable") == "1" and "trt_dump_ep_context_model" not in options
    timings = options.get("trt_timing_cache_enable") == "1"
    if not engines and not timings:
        return {}
    folder = Path(root) if root is not None else _user_cache()
    machine = _hash(_FORMAT, *_machine(int(options.get("device_id", "0"))))
    found: dict[str, str] = {}
    if timings:
        found["trt_timing_cache_path"] = str(_made(folder / machine / "timings"))
    if engines:
        settings = sorted(f"{key}={value}" for key, value in options.items() if key not in _NOT_PART_OF_AN_ENGINE)
        found["trt_engine_cache_path"] = str(_made(folder / machine / _hash(*settings, *_content(model))))
        found["trt_engine_cache_prefix"] = "graphopt"
    return found


def _machine(device: int) -> list[str]:
    """Return what an engine depends on beside its model."""
    found = gpus() or ()
    gpu = found[device].describe() if device < len(found) else "unknown GPU"
    return [f"onnxruntime {runtime().__version__}", f"tensorrt {tensorrt_version()}", gpu]


def _content(model: ir.Model) -> list[str]:
    graph, weights = serialize(model)
    return [
        hashlib.blake2b(graph, digest_size=_KEY_BYTES).hexdigest(),
        *(f"{name} {tensor_digest(tensor)}" for name, tensor in sorted(weights.items())),
    ]


def _user_cache() -> Path:
    if os.name == "nt":
        base = os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local"
    else:
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base, "graphopt", "tensorrt")


def _made(folder: Path) -> Path:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(
            f"the engine cache cannot be in `{folder}`: {error.strerror}",
            hint="another `trt_engine_cache_path`, or `trt_engine_cache_enable=false:trt_timing_cache_enable=false`",
        ) from error
    return folder


def _hash(*parts: str) -> str:
    return hashlib.blake2b("\n".join(parts).encode(), digest_size=_KEY_BYTES).hexdigest()

"""A model as TensorRT is given it: every shape inferred, the shapes it is to run on, and where its engines are kept."""

from __future__ import annotations

import tempfile
from contextlib import ExitStack
from pathlib import Path

import onnx_ir as ir

from graphopt import walk
from graphopt.errors import UsageError
from graphopt.model_io import PROTOBUF_LIMIT, load, save, saved_bytes
from graphopt.shapes import infer_shapes

from .onnxruntime_engines import cache_options
from .onnxruntime_options import TensorRtOptions, passed_on
from .onnxruntime_profiles import inner_profiles, profile_options

_QUANTIZED = frozenset({"QuantizeLinear", "DequantizeLinear"})
# What ONNX Runtime says where the model was divided and a part begins at a value whose sizes nobody gave.
_NO_PROFILE = "no associated shape profiles provided:"


class TensorRtModel:
    """A model made ready for TensorRT.

    Args:
        model: The model, which is not changed, or its file.
        backend: The backend with the user's options.
        held: Closed with the session: the file the model is handed over as must live as long.

    Attributes:
        file: That file.
        options: Options of the provider that hang on the model.

    Raises:
        UsageError: Options that do not fit the model: sizes left out, a calibration table with a quantized model.
    """

    def __init__(self, model: ir.Model | Path, backend: TensorRtOptions, held: ExitStack) -> None:
        self._backend = backend
        self._model = load(model) if isinstance(model, Path) else model.clone()
        # TensorRT takes over only what has shapes, and what divides the model asks for all of them.
        infer_shapes(self._model)
        self._check_calibration()
        self._check_embedding()
        self._profiles = profile_options(self._model, backend.dims)
        self.options = self._with_caches()
        self.file = model if isinstance(model, Path) and _has_engines(self._model) else self._written(model, held)

    def _written(self, model: ir.Model | Path, held: ExitStack) -> Path:
        """Return a file of the model: so its documentation has it, and engines of dynamic shapes are built late."""
        folder = Path(held.enter_context(tempfile.TemporaryDirectory(prefix="graphopt_tensorrt_")))
        # The name is part of that of an engine, and weights are looked for in a file of the same name.
        kept = isinstance(model, Path) and self._backend.trt_weight_stripped_engine_enable
        file = folder / (model.name if isinstance(model, Path) and kept else "model.onnx")
        save(self._model, file)
        return file

    def learn(self, error: Exception) -> bool:
        """Take in whose sizes ONNX Runtime asks for besides the inputs'; return whether there is something new to try.

        Raises:
            UsageError: They hang on what is in the data.
        """
        _, asked, names = str(error).partition(_NO_PROFILE)
        if not asked or not self._profiles:
            return False
        wanted = [name.strip() for name in names.strip().splitlines()[0].split(",")]
        profiles = inner_profiles(self._model, self._backend.dims, wanted)
        if profiles == self._profiles:
            return False
        self._profiles = profiles
        self.options = self._with_caches()
        return True

    def _with_caches(self) -> dict[str, str]:
        given = passed_on(self._backend) | self._profiles
        return self._profiles | cache_options(self._model, self._backend.trt_engine_cache_path, given)

    def _check_calibration(self) -> None:
        if self._backend.trt_int8_calibration_table_name is None:
            return
        if any(node.op_type in _QUANTIZED for node in walk.every_node(self._model)):
            raise UsageError(
                "a calibration table is no use to a model that is quantized already: TensorRT refuses to have both",
                hint="leave `trt_int8_calibration_table_name` out, or give the float model",
            )

    def _check_embedding(self) -> None:
        # An engine holds all weights of its model.
        if self._backend.trt_ep_context_embed_mode and saved_bytes(self._model) > PROTOBUF_LIMIT:
            raise UsageError(
                "engines of this model do not fit into one file with it: protobuf holds 2 GB",
                hint="leave `trt_ep_context_embed_mode` out: they are then written beside it",
            )


def _has_engines(model: ir.Model) -> bool:
    """Return whether a model was written by ONNX Runtime with its engines, which it looks for beside the file."""
    return any(node.op_type == "EPContext" for node in model.graph)

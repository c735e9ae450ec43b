"""ONNX's own evaluator: slow, but independent of every runtime. A second judge."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

import onnx
import onnx_ir as ir
from onnx.reference import ReferenceEvaluator
from onnx.reference.ops.op_dequantize_linear import DequantizeLinear_19

from graphopt.backend import Array, Feeds
from graphopt.errors import BackendError, one_line

# The evaluator has none for models older than this, which most quantized ones are.
_FIRST_DEQUANTIZE_LINEAR = 19


class DequantizeLinear(DequantizeLinear_19):  # the name says which operator it evaluates
    """DequantizeLinear of versions 10 and 13, which computes as that of 19 does."""

    op_domain = ""

    def _run(self, x: Array, scale: Array, zero_point: Array | None = None, **attributes: Any) -> tuple[Array, ...]:
        """Compute it; attributes of later versions come at their defaults."""
        result: tuple[Array, ...] = super()._run(x, scale, zero_point, axis=attributes["axis"])
        return result


@dataclass(frozen=True)
class Reference:
    """The evaluator of the onnx package."""

    name: ClassVar[str] = "reference"
    help: ClassVar[str] = "onnx's reference evaluator: slow, a second judge"
    # It is written to be read: how long it takes says nothing of any other runtime.
    timed: ClassVar[bool] = False

    def missing(self) -> BackendError | None:
        """Return None: the onnx package is always there."""
        return None

    def describe(self) -> str:
        """Return the name tables show."""
        return "onnx reference"

    def open(
        self, model: ir.Model | Path, *, threads: int = 0, optimize: bool = True, profile: Path | None = None
    ) -> ReferenceSession:
        """Open a model; threads and optimization mean nothing here."""
        if profile is not None:
            raise BackendError("backend `reference` has no profiler", hint="use `--backend onnxruntime`")
        try:
            proto = onnx.load(model) if isinstance(model, Path) else ir.to_proto(model)
            opset = next((one.version for one in proto.opset_import if not one.domain), 0)
            older = [DequantizeLinear] if opset < _FIRST_DEQUANTIZE_LINEAR else []
            return ReferenceSession(ReferenceEvaluator(proto, new_ops=older))
        except Exception as error:
            raise BackendError(f"the reference evaluator refuses the model: {one_line(error)}") from error


class ReferenceSession:
    """An open reference evaluator."""

    def __init__(self, evaluator: ReferenceEvaluator) -> None:
        self._evaluator = evaluator
        defaults = {tensor.name for tensor in evaluator.proto_.graph.initializer}
        self.input_names: Sequence[str] = [name for name in evaluator.input_names if name not in defaults]
        self.output_names: Sequence[str] = list(evaluator.output_names)

    def run(self, feeds: Feeds) -> dict[str, Array]:
        """Run the model once; see `graphopt.backend.Session.run`."""
        try:
            values = self._evaluator.run(None, dict(feeds))
        except Exception as error:
            raise BackendError(f"the reference evaluator fails on the model: {one_line(error)}") from error
        return dict(zip(self.output_names, values, strict=True))

    def close(self) -> None:
        """Nothing to free."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

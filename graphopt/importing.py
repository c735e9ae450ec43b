"""`import_module`: a module of PyTorch as an ONNX file, held against the module itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from onnx_ir.tensor_adapters import TorchTensor

from graphopt import walk
from graphopt.backend import Array
from graphopt.choices import find_backend, find_target
from graphopt.comparison import Comparison
from graphopt.driver import optimize
from graphopt.errors import BackendError, UsageError, VerificationError
from graphopt.model_io import save
from graphopt.output_files import check_output
from graphopt.progress import Display
from graphopt.torch_factory import Given, all_inputs, make_module, parse_arguments, parse_axes
from graphopt.torch_import import DEFAULT_OPSET, check_exportable, from_torch, import_torch

CLEAN_UP = "simplify"


@dataclass(frozen=True)
class Imported:
    """What an import gave.

    Attributes:
        model: The model as it was written.
        files: The files written.
        exported_nodes: Nodes as the exporter spelled it.
        nodes: Nodes as written.
        comparison: The model's outputs against the module's, on the example inputs.
    """

    model: ir.Model
    files: tuple[Path, ...]
    exported_nodes: int
    nodes: int
    comparison: Comparison

    def as_dict(self) -> dict[str, Any]:
        """Return it as JSON values."""
        return {
            "files": [str(file) for file in self.files],
            "opset": walk.opset(self.model),
            "inputs": {value.name: _shape(value) for value in self.model.graph.inputs},
            "exported_nodes": self.exported_nodes,
            "nodes": self.nodes,
            "outputs": {name: error.as_dict() for name, error in self.comparison.outputs.items()},
        }


def import_module(
    source: str,
    output: Path,
    *,
    arguments: Sequence[str] = (),
    dynamic: Sequence[str] = (),
    opset: int = DEFAULT_OPSET,
    input_names: Sequence[str] | None = None,
    output_names: Sequence[str] | None = None,
    raw: bool = False,
    tolerance: float | None = None,
    backend: str | None = None,
    progress: bool = False,
) -> Imported:
    """Export a module, simplify it, compare it with the module on its example inputs, and write it.

    Args:
        source: ``package.module:function`` or ``file.py:function``, which returns a module and its example inputs, or
            a ``.pt2`` file.
        output: The file to write.
        arguments: Arguments of the function, ``NAME=VALUE``.
        dynamic: Free axes of inputs, ``NAME=AXES``.
        opset: The version of ONNX's operators.
        input_names: Names of the inputs; the module's own where None.
        output_names: Names of the outputs.
        raw: Leave the model as the exporter spells it.
        tolerance: Largest absolute error allowed; rounding of the dtype where None.
        backend: Backend text: what runs the model for the comparison.
        progress: Show progress on stderr.

    Raises:
        UsageError: The source or an option is wrong.
        ModelError: torch cannot export the module.
        VerificationError: The model computes something else; nothing is written.
    """
    check_output(output, None, None)
    parsed, axes = parse_arguments(arguments), parse_axes(dynamic)
    runtime = find_backend(backend, find_target(None))
    display = Display(progress)
    with display.stage("making the module"):
        given = make_module(source, parsed)
        check_exportable(given.module, given.args, given.kwargs, opset)
        wanted = given.run()
    with display.stage("exporting"):
        model = from_torch(
            given.module,
            given.args,
            given.kwargs,
            dynamic_shapes=all_inputs(given, axes),
            opset=opset,
            input_names=input_names,
            output_names=output_names,
        )
    exported_nodes = sum(1 for _ in walk.every_node(model))
    try:
        if not raw:
            model = optimize(model, CLEAN_UP, backend=backend, timed=False, progress=progress).model
        with display.stage("comparing with the module"):
            comparison = _compare(model, given, wanted, runtime)
    except BackendError as error:
        raise BackendError(error.message, hint="`--backend torch` computes nearly all that torch exports") from error
    if not comparison.within(tolerance):
        worst = comparison.worst
        assert worst is not None, "nothing compared is nothing wrong"
        said = worst.mismatch or f"an error of {worst.max_abs:.3g} where values reach {worst.peak:.3g}"
        raise VerificationError(
            f"the model differs from the module in `{worst.name}`: {said}",
            hint="`--raw` tells whether torch's exporter is to blame; `--tolerance` allows more",
        )
    files = tuple(save(model, output))
    return Imported(model, files, exported_nodes, sum(1 for _ in walk.every_node(model)), comparison)


def _compare(model: ir.Model, given: Given, wanted: Sequence[Any], runtime: Any) -> Comparison:
    """Return the model's outputs against the module's."""
    inputs, outputs = model.graph.inputs, model.graph.outputs
    tensors = given.inputs()
    if len(tensors) != len(inputs) or len(wanted) != len(outputs):
        raise UsageError(
            f"the module takes {len(tensors)} tensors and gives {len(wanted)}, the model takes {len(inputs)} and gives"
            f" {len(outputs)}: they cannot be compared",
            hint="let `forward` take and return tensors only",
        )
    feeds = {value.name or "": _array(tensor) for value, tensor in zip(inputs, tensors, strict=True)}
    comparison = Comparison(samples=1, source="example inputs")
    with runtime.open(model) as session:
        found = session.run(feeds)
    comparison.update({value.name or "": _array(one) for value, one in zip(outputs, wanted, strict=True)}, found)
    return comparison


def _array(tensor: Any) -> Array:
    """Return a tensor of torch as an array, bfloat16 and the like included."""
    torch = import_torch()
    assert isinstance(tensor, torch.Tensor)
    return np.ascontiguousarray(TorchTensor(tensor.detach().cpu().contiguous()).numpy()).reshape(tuple(tensor.shape))


def _shape(value: ir.Value) -> list[int | str | None]:
    return [dim if isinstance(dim, int) else dim.value for dim in value.shape or ()]

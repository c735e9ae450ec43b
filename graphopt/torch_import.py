"""Models of PyTorch as models of ONNX: through torch's exporter, whose graphs are in our IR already."""

from __future__ import annotations

import contextlib
import inspect
import io
import logging
import re
import traceback
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx_ir as ir

from graphopt.errors import GraphoptError, ModelError, UsageError, in_words, one_line
from graphopt.normal_form import normalize
from graphopt.torch_names import name_axes, name_by_modules, name_outputs, output_keys, store_as_read

if TYPE_CHECKING:
    import torch

DEFAULT_OPSET = 20
"""What the exporter writes unasked: before 23, attention and RMS norms are spelled out."""

OLDEST_OPSET = 18
"""What the exporter's translations are written for."""

INSTALL_HINT = "pip install 'graphopt[torch]'"

_NO_FUNCTION = re.compile(r"No ONNX function found for <OpOverload\(op='([^']+)', overload='([^']+)'\)>")
# Parts of errors of torch, and what the user can do about them.
_ADVICE = (
    (
        ("GuardOnDataDependent", "DataDependent", "Could not guard", "Could not extract specialized"),
        "the module decides in Python by what tensors hold",
        "write the choice as `torch.where` or `torch.cond`, and sizes as shapes of tensors",
    ),
    (
        ("'int' object has no attribute 'name'", "'float' object has no attribute 'name'"),
        "`forward` returns a number",
        "return tensors only",
    ),
    (
        ("graph break", "Unsupported"),
        "the module does what torch.export cannot follow",
        "take it out of `forward`, or make it a `torch.library.custom_op`",
    ),
    (
        ("Constraints violated", "dynamic_shapes", "dynamic shapes", "dim hint"),
        "`dynamic_shapes` does not fit the module",
        "keys are the names of `forward`'s parameters, axes count from 0; a size the code relies on cannot be free",
    ),
)


def from_torch(
    module: torch.nn.Module | torch.export.ExportedProgram,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    dynamic_shapes: Any = None,
    opset: int = DEFAULT_OPSET,
    input_names: Sequence[str] | None = None,
    output_names: Sequence[str] | None = None,
) -> ir.Model:
    """Return a PyTorch module as an ONNX model that shares its weights.

    Nodes are named by the modules they come from and initializers as parameters and buffers are; what two modules share
    stays one initializer. A weight that is only read transposed, as that of a Linear, is stored as it is read. The
    graph is as the exporter spells it: the preset `simplify` takes out what is superfluous.

    Args:
        module: A module in evaluation mode, a GraphModule included, or what torch.export made of one.
        args: Example inputs of a module, as it is called; a tensor alone stands for one input.
        kwargs: Example inputs by name.
        dynamic_shapes: Axes that are free, as torch.export takes them: ``{"ids": {0: "batch", 1: "tokens"}}``. All
            others are fixed as in the examples. Of an ExportedProgram: only names for axes that are free in it.
        opset: The version of ONNX's operators, from 18.
        input_names: Names of the inputs, in order; those of `forward`'s parameters where None.
        output_names: Names of the outputs, in order; where None, the keys of a dict that `forward` returns, else the
            exporter's.

    Raises:
        UsageError: torch is not installed, or an argument is none that can be exported.
        ModelError: torch cannot capture the module, an operator has no counterpart in ONNX, or an axis that was to be
            free is not.
    """
    torch = import_torch()
    if isinstance(args, torch.Tensor):
        args = (args,)
    check_exportable(module, args, kwargs, opset)
    with quiet():
        try:
            program = torch.onnx.export(
                module,
                _positional(args, kwargs),
                kwargs=dict(kwargs or {}),
                dynamic_shapes=dynamic_shapes,
                opset_version=opset,
                input_names=input_names,
                dynamo=True,
                optimize=False,
                verbose=False,
            )
        except Exception as error:
            raise _explained(error, module) from error
    assert program is not None, "without a file, export returns a program"
    model: ir.Model = program.model
    if not model.graph.outputs:
        raise ModelError("the module returns no tensor", hint="`forward` returns what the model is to give")
    _check_opset(model, opset)
    if isinstance(module, torch.nn.Module):
        name_axes(model, _unnamed_axes(model, module, args, kwargs, dynamic_shapes))
    _check_free(model, dynamic_shapes)
    _check_names("input", model.graph.inputs, input_names)
    _check_names("output", model.graph.outputs, output_names)
    _check_taken(model, output_names or ())
    known = _outputs_before(module, len(model.graph.outputs))
    name_outputs(model, output_names or known or output_keys(program.exported_program, len(model.graph.outputs)))
    normalize(model)
    store_as_read(model)
    name_by_modules(model)
    if isinstance(module, torch.nn.Module):
        model.graph.name = type(module).__name__
    return model


def _positional(args: Sequence[Any], kwargs: Mapping[str, Any] | None) -> tuple[Any, ...]:
    """Return example inputs as the exporter takes them: without named ones it takes a dict at the end for these."""
    return (*args, {}) if args and isinstance(args[-1], dict) and not kwargs else tuple(args)


def import_torch() -> Any:
    """Return torch.

    Raises:
        UsageError: It is not installed.
    """
    try:
        import torch
        import torch.onnx
    except ImportError as error:
        raise UsageError(f"models of PyTorch need PyTorch: {one_line(error)}", hint=INSTALL_HINT) from error
    return torch


def check_exportable(module: Any, args: Any, kwargs: Mapping[str, Any] | None, opset: int) -> None:
    """Raise an error for what cannot be exported, before anything is tried.

    Raises:
        UsageError: It is no module of PyTorch in evaluation mode, or the version of ONNX is none to export to.
    """
    torch = import_torch()
    if isinstance(opset, bool) or not isinstance(opset, int) or opset < OLDEST_OPSET:
        raise UsageError(
            f"opset {opset!r} cannot be exported to",
            hint=f"a number from {OLDEST_OPSET}; the pass `opset` converts to others",
        )
    if isinstance(module, torch.export.ExportedProgram):
        if args or kwargs:
            raise UsageError("an ExportedProgram has its example inputs already", hint="leave `args` and `kwargs` out")
        return
    if isinstance(module, torch.jit.ScriptModule):
        raise UsageError("a TorchScript module cannot be exported", hint="give the nn.Module it was made of")
    if not isinstance(module, torch.nn.Module):
        hint = "an nn.Module, a GraphModule or an ExportedProgram"
        raise UsageError(f"a `{type(module).__name__}` is no model of PyTorch", hint=hint)
    if not isinstance(args, Sequence) or isinstance(args, str):
        raise UsageError(f"example inputs cannot be a `{type(args).__name__}`", hint="a tuple, as the module is called")
    training = [name or type(module).__name__ for name, part in module.named_modules() if part.training]
    if training:
        raise UsageError(f"the module is in training mode, at `{training[0]}`", hint="call `.eval()` on it first")


def _check_opset(model: ir.Model, opset: int) -> None:
    """Raise an error where the exporter could not convert to the version wanted and said so only in a log."""
    found = model.opset_imports.get("", 0)
    if found != opset:
        raise ModelError(
            f"torch exports this module as opset {found}, not {opset}",
            hint=f"export as {found}; the pass `opset:to={opset}` may convert it",
        )


def _check_names(kind: str, values: Sequence[ir.Value], names: Sequence[str] | None) -> None:
    """Raise an error where names were given that the exporter had no use for."""
    if names is not None and len(names) != len(values):
        found = ", ".join(f"`{value.name}`" for value in values)
        raise UsageError(
            f"{len(names)} names for {len(values)} {kind}s: {found}", hint="one name for each tensor, in order"
        )


def _check_taken(model: ir.Model, output_names: Sequence[str]) -> None:
    """Raise an error where an output was to have the name of an input or a weight that it is not."""
    stored = {value.name: value for value in (*model.graph.inputs, *model.graph.initializers.values())}
    for value, name in zip(model.graph.outputs, output_names, strict=False):
        if name in stored and stored[name] is not value:
            raise UsageError(f"output name `{name}` is that of an input or a weight", hint="give it another one")


def _unnamed_axes(model: ir.Model, module: Any, args: Any, kwargs: Any, dynamic_shapes: Any) -> dict[str, str]:
    """Return the names that free axes were to have, by those they have: next to an input that is no tensor, the
    exporter gives them names of its own.
    """
    torch = import_torch()
    if not isinstance(dynamic_shapes, Mapping):
        return {}
    given = inspect.signature(module.forward).bind(*args, **(kwargs or {})).arguments
    tensors = [name for name, value in given.items() if isinstance(value, torch.Tensor)]
    if len(tensors) != len(model.graph.inputs) or len(tensors) == len(given):
        return {}
    found: dict[str, str] = {}
    for name, value in zip(tensors, model.graph.inputs, strict=True):
        axes = dynamic_shapes.get(name)
        wanted = axes.items() if isinstance(axes, Mapping) else enumerate(axes or ())
        for axis, dim in wanted:
            free = value.shape[axis] if value.shape is not None else None
            for called in _names_in(dim):
                if isinstance(free, ir.SymbolicDim) and free.value is not None:
                    found.setdefault(free.value, called)
    return found


def _check_free(model: ir.Model, dynamic_shapes: Any) -> None:
    """Raise an error where an axis that was to be free is not: torch fixes it where the code needs that."""
    free = {dim.value for value in model.graph.inputs for dim in value.shape or () if isinstance(dim, ir.SymbolicDim)}
    bound = [name for name in dict.fromkeys(_names_in(dynamic_shapes)) if name not in free]
    if bound:
        raise ModelError(
            f"the module does not leave dimension `{bound[0]}` free: it has one size, or is always equal to another",
            hint="take sizes from `x.shape` instead of writing numbers; axes that are equal need one name, others"
            " examples of different sizes",
        )


def _outputs_before(module: Any, count: int) -> Sequence[str] | None:
    """Return what the outputs of a module were called in the model that `to_torch` made it of; None of any other."""
    lowered = getattr(module, "meta", {}).get("graphopt")
    names = () if lowered is None else (*lowered.outputs, *lowered.observed)
    return names if len(names) == len(set(names)) == count else None


def _names_in(dynamic_shapes: Any) -> Iterator[str]:
    """Yield the names of dimensions: text, and the names of torch.export's Dims; its hints have none."""
    if isinstance(dynamic_shapes, str):
        yield dynamic_shapes
    elif isinstance(dynamic_shapes, Mapping):
        for inner in dynamic_shapes.values():
            yield from _names_in(inner)
    elif isinstance(dynamic_shapes, tuple | list):
        for inner in dynamic_shapes:
            yield from _names_in(inner)
    elif hasattr(dynamic_shapes, "__name__"):
        yield dynamic_shapes.__name__


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep torch from printing graphs, warnings and tracebacks: an error says what there is to say."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            with contextlib.redirect_stderr(io.StringIO()):
                yield
    finally:
        logging.disable(before)


def _explained(error: BaseException, module: Any) -> GraphoptError:
    """Return what an error of torch means for somebody who wants a module exported."""
    if "graphopt" in getattr(module, "meta", {}):
        return ModelError(
            "torch cannot export what `to_torch` made: it computes sizes, and reads them as numbers",
            hint="`graphopt.update_weights` puts its weights into the model that it was made of",
        )
    causes = list(_chain(error))
    for cause in causes:
        missing = _NO_FUNCTION.search(str(cause))
        if missing:
            operator = missing[1].replace(".", "::")
            return ModelError(
                f"torch's operator `{operator}` has no counterpart in ONNX{_place(causes)}",
                hint="write it with other operators of torch",
            )
    cause = causes[-1]
    text = in_words(cause)
    for signs, what, hint in _ADVICE:
        if any(sign in text for sign in signs):
            return ModelError(f"torch cannot export the module: {what}{_place(causes)}: {text}", hint=hint)
    return ModelError(
        f"torch cannot export the module{_place(causes)}: {text}",
        hint="call it on the example inputs; `torch.export.export` shows all there is to see",
    )


def _chain(error: BaseException) -> Iterator[BaseException]:
    """Yield an error and what it was raised from, the first cause last."""
    seen: BaseException | None = error
    while seen is not None:
        yield seen
        seen = seen.__cause__


def _place(causes: Sequence[BaseException]) -> str:
    """Return which line of the user's the first cause came through, as text to append; nothing where none is known."""
    import onnxscript
    import torch

    foreign = [Path(file).parent for file in (torch.__file__, onnxscript.__file__, __file__) if file]
    for cause in reversed(causes):
        for frame in reversed(traceback.extract_tb(cause.__traceback__)):
            file = Path(frame.filename)
            if file.is_file() and not any(file.is_relative_to(folder) for folder in foreign):
                return f" ({file.name}, line {frame.lineno})"
    return ""

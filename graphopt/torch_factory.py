"""Where modules of PyTorch come from, as the command line names them: a function that makes one, or a file."""

from __future__ import annotations

import ast
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from graphopt.data_sources import load_named_function
from graphopt.errors import UsageError, did_you_mean, in_words
from graphopt.torch_import import import_torch, quiet

EXPORTED_SUFFIX = ".pt2"
FIXED = "-"
"""Stands for an axis that is not free where axes are named."""

_FACTORY_HINT = "`package.module:function` or `file.py:function`; it returns the module and its example inputs"


@dataclass(frozen=True)
class Given:
    """A module and what it is called with.

    Attributes:
        module: A module, or an ExportedProgram, which knows its own example inputs.
        args: Example inputs in order; empty for an ExportedProgram.
        kwargs: Example inputs by name.
    """

    module: Any
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)

    def run(self) -> list[Any]:
        """Return the tensors the module gives for its example inputs, in order.

        Raises:
            UsageError: It fails on them.
        """
        torch = import_torch()
        args, kwargs, call = self.args, self.kwargs, self.module
        if isinstance(self.module, torch.export.ExportedProgram):
            (args, kwargs), call = self.module.example_inputs, self.module.module()
        try:
            with torch.no_grad():
                outputs = call(*args, **kwargs)
        except Exception as error:
            hint = "example inputs must be what the module takes"
            raise UsageError(f"the module fails on its example inputs: {in_words(error)}", hint=hint) from error
        return _tensors(outputs, torch)

    def inputs(self) -> list[Any]:
        """Return the tensors among the example inputs, in the order of `forward`'s parameters."""
        torch = import_torch()
        if isinstance(self.module, torch.export.ExportedProgram):
            return _tensors(self.module.example_inputs, torch)
        import inspect

        bound = inspect.signature(self.module.forward).bind(*self.args, **self.kwargs)
        return _tensors((bound.args, bound.kwargs), torch)


def _tensors(values: Any, torch: Any) -> list[Any]:
    from torch.utils import _pytree

    return [leaf for leaf in _pytree.tree_leaves(values) if isinstance(leaf, torch.Tensor)]


def make_module(source: str, arguments: Mapping[str, Any]) -> Given:
    """Return what a source gives: a function is called with the arguments, a `.pt2` file is read.

    Raises:
        UsageError: There is none, it fails, or it gives no module and example inputs.
    """
    torch = import_torch()
    if source.endswith(EXPORTED_SUFFIX):
        return Given(_read_exported(source, arguments, torch))
    factory = _find(source)
    try:
        made = factory(**arguments)
    except Exception as error:
        raise UsageError(
            f"`{source}` fails: {in_words(error)}", hint="call it by itself; `--arg` gives it arguments"
        ) from error
    return _given(made, source, torch)


def _read_exported(path: str, arguments: Mapping[str, Any], torch: Any) -> Any:
    if arguments:
        raise UsageError(f"`{path}` is a file and takes no arguments", hint="leave `--arg` out")
    if not Path(path).is_file():
        raise UsageError(f"`{path}` does not exist", hint="what `torch.export.save` wrote")
    try:
        with quiet():
            return torch.export.load(path)
    except Exception as error:
        hint = "a file that `torch.export.save` of this version of torch wrote"
        raise UsageError(f"cannot read `{path}`: {in_words(error)}", hint=hint) from error


def _find(source: str) -> Callable[..., Any]:
    home, colon, name = source.rpartition(":")
    if not colon or not home or not name:
        raise UsageError(f"`{source}` names no function", hint=_FACTORY_HINT)
    return load_named_function(source, hint=_FACTORY_HINT)


def _given(made: Any, source: str, torch: Any) -> Given:
    """Return what a factory returned as a module and its example inputs."""
    if isinstance(made, torch.export.ExportedProgram):
        return Given(made)
    is_pair = isinstance(made, tuple) and len(made) in (2, 3) and isinstance(made[0], torch.nn.Module)
    if not is_pair:
        what = "a module without example inputs" if isinstance(made, torch.nn.Module) else f"a `{type(made).__name__}`"
        hint = "`return module, args` or `return module, args, kwargs`; args is a tuple of tensors"
        raise UsageError(f"`{source}` returns {what}", hint=hint)
    args = made[1] if isinstance(made[1], tuple | list) else (made[1],)
    kwargs = made[2] if len(made) == 3 else {}
    if not isinstance(kwargs, Mapping):
        raise UsageError(f"`{source}` returns a `{type(kwargs).__name__}` as named inputs", hint="a dict, or nothing")
    return Given(made[0], tuple(args), dict(kwargs))


def parse_arguments(texts: Sequence[str]) -> dict[str, Any]:
    """Return arguments of a factory by name: ``width=64`` is a number, what is no Python literal is text.

    Raises:
        UsageError: One has no name.
    """
    found: dict[str, Any] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or not name.isidentifier():
            raise UsageError(f"`--arg {text}` gives no argument a value", hint="`--arg width=64`")
        try:
            found[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            found[name] = value
    return found


def parse_axes(texts: Sequence[str]) -> dict[str, dict[int, str]]:
    """Return free axes by input, as `from_torch` takes them: ``ids=batch,tokens`` names both, ``-`` leaves one fixed.

    Raises:
        UsageError: An input or an axis has no name, or all axes are fixed.
    """
    found: dict[str, dict[int, str]] = {}
    for text in texts:
        name, equals, dims = text.partition("=")
        axes = {index: dim for index, dim in enumerate(dims.split(",")) if dim != FIXED}
        if not equals or not name or not axes or not all(dim.isidentifier() for dim in axes.values()):
            raise UsageError(f"`--dynamic {text}` names no axes", hint="`--dynamic image=batch,-,height,width`")
        if name in found:
            raise UsageError(f"`--dynamic` names `{name}` twice", hint="name all its axes at once")
        found[name] = axes
    return found


def all_inputs(given: Given, axes: Mapping[str, dict[int, str]]) -> dict[str, dict[int, str] | None] | None:
    """Return free axes with every parameter that is given, as torch.export wants them, or None where all is fixed.

    Raises:
        UsageError: An input is named that `forward` does not take, or an axis that it does not have.
    """
    if not axes:
        return None
    import inspect

    torch = import_torch()
    if isinstance(given.module, torch.export.ExportedProgram):
        raise UsageError("the axes of an exported program are free or fixed already", hint="leave `--dynamic` out")
    bound = inspect.signature(given.module.forward).bind(*given.args, **given.kwargs).arguments
    for name, free in axes.items():
        if name not in bound:
            raise UsageError(f"`--dynamic` names input `{name}`, which is not given", hint=did_you_mean(name, bound))
        rank = getattr(bound[name], "ndim", None)
        if rank is None:
            hint = "`from_torch(dynamic_shapes=…)` takes the axes of tensors in lists and dicts"
            raise UsageError(f"`--dynamic` names axes of `{name}`, which is no tensor", hint=hint)
        if max(free) >= rank:
            hint = "`image=batch,-,height,width`: one place for each axis"
            raise UsageError(f"`--dynamic` names {max(free) + 1} axes of `{name}`, which has {rank}", hint=hint)
    return {name: axes.get(name) for name in bound}

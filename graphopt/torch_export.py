"""Models as modules of PyTorch, for training loops of one's own, and what these trained put into the model again."""

from __future__ import annotations

import operator
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from graphopt import walk
from graphopt.backend import Array
from graphopt.bias_scales import bias_scales
from graphopt.choices import ModelLike, lowering_backend, open_model
from graphopt.constant_names import constant_names
from graphopt.errors import UsageError
from graphopt.rewriter import Rewriter
from graphopt.stored_weights import as_array, stored_tensor

if TYPE_CHECKING:
    import torch
    from torch import fx

_OTHER_MODULE = "give the module that `graphopt.to_torch` made of this model, or its state dict"
_ADDED = (
    "what was added to a weight goes into it first, as by `torch.nn.utils.prune.remove`; "
    "`torch.nn.utils.parametrize` does that by itself"
)
# Where `torch.nn.utils.parametrize` keeps what it computes a weight of.
_PARAMETRIZED = re.compile(r"(?P<holder>(?:.*\.)?)parametrizations\.(?P<name>[^.]+)\.")
# What wraps a module, of torch.compile, of data parallelism and of averages of weights, holds it as one of these.
_WRAPPED = ("_orig_mod", "module")


def to_torch(model: ModelLike, *, observe: Sequence[str] = (), differentiable: bool = True) -> fx.GraphModule:
    """Return a model as a module of PyTorch that computes the same, for a training loop of one's own.

    Its weights are parameters, named as the initializers, none of which trains until ``requires_grad_`` says so. They
    are the module's own: training changes neither the model nor another module of it. Those of a file are read when
    they are used, and copied in memory when they are written. `update_weights` is the way back.

    Args:
        model: A path, or a model, which is not changed.
        observe: Names of values of the main graph that the module returns behind the outputs.
        differentiable: Whether gradients go through QuantizeLinear (straight through its rounding), which then gives
            its codes as floats: the same numbers in the end.

    Returns:
        The module: it takes the model's inputs by position and returns a tuple. ``module.meta["graphopt"]`` says which
        parameter is which initializer.

    Raises:
        BackendError: PyTorch is not installed, or there is an operator that it cannot compute; or a value to observe
            is none of the model's.
        GraphoptError: The model cannot be loaded.
    """
    lowered: fx.GraphModule = lowering_backend().lower(
        open_model(model),
        observe=(observe,) if isinstance(observe, str) else observe,
        differentiable=differentiable,
        shared=False,
    )
    return lowered


def update_weights(model: ModelLike, module: torch.nn.Module | Mapping[str, torch.Tensor]) -> ir.Model:
    """Return a model with the weights that a module of `to_torch` has by now, each stored in the dtype it was in.

    Whatever changed is written: weights, scales, codes. What is the same number in the module's dtype stays as it was
    stored, so a module in bfloat16 leaves alone what it did not train. A weight with a parametrization of torch is
    stored as that computes it. Nothing is held: zeros that training filled stay filled (`graphopt.recover` keeps them).

    Args:
        model: The model that the module was made of, or its path; it is not changed.
        module: The module, also inside of what torch.compile or DistributedDataParallel made of it, or its state dict.

    Raises:
        UsageError: The module is of another model: it lacks a weight, has one too many, or one of another shape or
            kind; a weight became infinite, or does not fit its dtype; or the scale of an int32 bias is no longer
            the product that runtimes take it for.
        GraphoptError: The model cannot be loaded, or PyTorch is not installed.
    """
    import torch

    backend, opened = lowering_backend(), open_model(model)
    held = _Held(module)
    fresh = backend.lower(opened, observe=held.observed)
    lowered = fresh.meta["graphopt"]
    names = {path: name for name, path in (*lowered.parameters.items(), *lowered.buffers.items())}
    values = {name: value for value, name in constant_names(opened).items()}
    before = fresh.state_dict()
    held.refuse_others(before)
    rewriter, products = Rewriter(opened), _bias_products(opened)
    with torch.no_grad():
        for path, original in before.items():
            name = names.get(path, path)
            now = held.tensor(path, name)
            _refuse_other(name, original, now)
            if not _equal(original.to(now.dtype), now):
                value = values.get(name)
                if value is None:
                    raise UsageError(
                        f"`{name}` changed, and is no constant of the model",
                        hint="leave attributes of nodes, and what a function is given for them, as they are",
                    )
                rewriter.set_weight(value, stored_tensor(value, _array(name, value, now)))
    _refuse_other_products(products, opened)
    return opened


class _Held:
    """What a module, or a state dict, holds by now.

    Raises:
        UsageError: It is neither.
    """

    def __init__(self, given: Any) -> None:
        import torch

        if not isinstance(given, torch.nn.Module | Mapping):
            raise UsageError(f"a `{type(given).__name__}` has no weights", hint=_OTHER_MODULE)
        self._given = given if isinstance(given, Mapping) else _unwrapped(given)

    @property
    def observed(self) -> Sequence[str]:
        """What the module returns behind the outputs, as far as it is known: a constant among it is stored."""
        lowered = getattr(self._given, "meta", {}).get("graphopt")
        return () if lowered is None else lowered.observed

    def tensor(self, path: str, name: str) -> torch.Tensor:
        """Return what is at a path, as the module computes it."""
        import torch

        found = self._at(path)
        if isinstance(found, np.ndarray):
            raise UsageError(f"`{path}` is an array of NumPy, no tensor of torch", hint="`torch.from_numpy` makes one")
        if not isinstance(found, torch.Tensor):
            raise UsageError(f"the module has no `{path}`, where weight `{name}` was", hint=_OTHER_MODULE)
        return found.detach()

    def _at(self, path: str) -> Any:
        """Return what is at a path, or None."""
        try:
            return self._given[path] if isinstance(self._given, Mapping) else operator.attrgetter(path)(self._given)
        except (AttributeError, KeyError):
            return None

    def refuse_others(self, known: Mapping[str, torch.Tensor]) -> None:
        """Raise an error for parameters and buffers that a model has no place for."""
        state = self._given if isinstance(self._given, Mapping) else self._given.state_dict()
        others = [path for path in state if path not in known and not self._computes(path, known)]
        if others:
            more = f" and {len(others) - 1} more" if len(others) > 1 else ""
            raise UsageError(
                f"the model has no place for `{others[0]}`{more} of the module",
                hint=self._hint_for_others(state, known),
            )

    def _hint_for_others(self, state: Mapping[str, Any], known: Mapping[str, torch.Tensor]) -> str:
        """Return what to do about paths that no model has: what was added to its module, or another module."""
        if all(self._at(path) is not None for path in known):
            return _ADDED
        inner = f".{next(iter(known))}"
        holder = next((path.removesuffix(inner) for path in state if path.endswith(inner)), None)
        return _OTHER_MODULE if holder is None else f"its part `{holder}` has the weights: give that, or its state dict"

    def _computes(self, path: str, known: Mapping[str, torch.Tensor]) -> bool:
        """Return whether something stored is what a weight is computed of."""
        found = None if isinstance(self._given, Mapping) else _PARAMETRIZED.match(path)
        return found is not None and f"{found['holder']}{found['name']}" in known


def _unwrapped(module: torch.nn.Module) -> torch.nn.Module:
    """Return the lowered module inside of what others made of it."""
    from torch import fx, nn

    while not isinstance(module, fx.GraphModule):
        inner = next((one for name in _WRAPPED if isinstance(one := getattr(module, name, None), nn.Module)), None)
        if inner is None:
            return module
        module = inner
    return module


def _refuse_other(name: str, before: torch.Tensor, now: torch.Tensor) -> None:
    """Raise an error where a weight is no longer one that its initializer can hold."""
    if now.shape != before.shape:
        raise UsageError(
            f"weight `{name}` is {list(before.shape)} in the model and {list(now.shape)} in the module",
            hint="sizes are the graph's, too: `prune-channels` and its like remove parts of layers",
        )
    if now.is_meta:
        raise UsageError(f"weight `{name}` is on the device `meta`, without numbers", hint="load it first")
    if now.is_floating_point() != before.is_floating_point() or now.is_complex() != before.is_complex():
        raise UsageError(
            f"weight `{name}` is {_show(before)} in the model and {_show(now)} in the module",
            hint="floats stay floats, and codes integers; the pass `quant` makes codes of floats",
        )


def _bias_products(model: ir.Model) -> set[ir.Value]:
    """Return the scales of int32 biases that are the products of their layers' scales."""
    return {scale for scale, bias in bias_scales(model).items() if bias.factors is not None}


def _refuse_other_products(before: set[ir.Value], model: ir.Model) -> None:
    """Raise an error where the scale of an int32 bias is a product no longer: runtimes take it for one unseen."""
    others = sorted(value.name or "" for value in before - _bias_products(model))
    if others:
        raise UsageError(
            f"`{others[0]}`, the scale of a bias in int32, is no longer its input's scale times its weight's",
            hint="runtimes compute with that product: give the scale that value, train other scales, or use `recover`",
        )


def _show(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _equal(before: torch.Tensor, now: torch.Tensor) -> bool:
    """Return whether two tensors of one dtype hold the same numbers."""
    now = now.to(before.device)
    if before.is_floating_point() and before.element_size() == 1:  # torch does not compare these
        before, now = before.float(), now.float()
    return bool((before == now).all())


def _array(name: str, value: ir.Value, now: torch.Tensor) -> Array:
    """Return what a constant is to hold, in its own dtype.

    Raises:
        UsageError: Its dtype does not hold that, or training went astray.
    """
    tensor = walk.constant_tensor(value)
    assert tensor is not None, "it is a constant"
    dtype = tensor.dtype
    try:
        with np.errstate(over="ignore"):
            array = as_array(now, dtype)
    except OverflowError as error:
        raise UsageError(f"`{name}` has {error}", hint="codes stay within what their dtype holds") from error
    if not dtype.is_integer() and (~np.isfinite(array) & np.isfinite(tensor.numpy())).any():
        raise UsageError(
            f"weight `{name}` is infinite or no number as {str(dtype).lower()}",
            hint="a lower learning rate; or the pass `cast` to a dtype of more range",
        )
    return array

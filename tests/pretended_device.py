"""A device that is none: tensors on it hold values, and meet tensors of the host no more than those of a GPU would.

It goes by the name of torch's device `meta`, and is there within `pretended_device()`. What a GPU refuses is refused:
tensors of both places in one operator, arrays of what is not on the host, and operators GPUs have no kernels for.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only

NAME = "meta"
HOST = torch.device("cpu")
# Operators that bring values from one place to another.
_BRINGING = ("aten::_to_copy", "aten::copy_")
# What GPUs compute of floats alone, as torch's own tests of operators have it (OpInfo.dtypesIfCUDA).
_OF_FLOATS = frozenset(
    f"aten::{name}"
    for name in (
        "_adaptive_avg_pool2d",
        "addbmm",
        "addmm",
        "addmv",
        "avg_pool2d",
        "avg_pool3d",
        "baddbmm",
        "bmm",
        "convolution",
        "dot",
        "max_pool2d_with_indices",
        "max_pool3d_with_indices",
        "mm",
        "mv",
        "upsample_bicubic2d",
        "upsample_bilinear2d",
        "vdot",
    )
)
_UNSIGNED = frozenset({torch.uint16, torch.uint32, torch.uint64})
_FLOATS_OF_A_BYTE = frozenset(
    {
        torch.float8_e4m3fn,
        torch.float8_e4m3fnuz,
        torch.float8_e5m2,
        torch.float8_e5m2fnuz,
        torch.float8_e8m0fnu,
    }
)
# What GPUs do with integers that torch hardly computes with, and with floats of a byte: make them and look at them.
_OF_EVERY_TYPE = frozenset(
    f"aten::{name}"
    for name in (
        "_local_scalar_dense",
        "_to_copy",
        "_unsafe_view",
        "alias",
        "as_strided",
        "clone",
        "copy_",
        "detach",
        "empty",
        "empty_like",
        "empty_strided",
        "expand",
        "fill_",
        "full",
        "lift_fresh",
        "ones",
        "permute",
        "scalar_tensor",
        "select",
        "slice",
        "squeeze",
        "t",
        "transpose",
        "unsqueeze",
        "view",
        "zeros",
    )
)


class GPULack(RuntimeError):
    """Something that a GPU cannot do."""


class Pretended(torch.Tensor):
    """A tensor that says it is on the device."""

    held: torch.Tensor

    @staticmethod
    def __new__(cls, held: torch.Tensor) -> Pretended:
        """Wrap a tensor of the host."""
        held = held.resolve_conj().resolve_neg()
        own: Pretended = torch.Tensor._make_wrapper_subclass(
            cls, held.shape, strides=held.stride(), dtype=held.dtype, device=NAME, requires_grad=False
        )
        own.held = held
        return own

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Compute; only the mode does."""
        raise GPULack(f"{func} outside of `pretended_device`")

    def tolist(self) -> Any:
        """Return what it holds, which a GPU is waited for."""
        return self.held.tolist()

    def item(self) -> Any:
        """Return the one number it holds."""
        return self.held.item()

    def __bool__(self) -> bool:
        """Return whether that is not zero."""
        return bool(self.held)

    def __int__(self) -> int:
        """Return it as an integer."""
        return int(self.held)

    def __float__(self) -> float:
        """Return it as a float."""
        return float(self.held)


class _Making(TorchFunctionMode):
    """Makes tensors of numbers, which torch's device `meta` would not keep."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        keywords = dict(kwargs or {})
        device = keywords.get("device")
        if func is torch.tensor and device is not None and torch.device(device).type == NAME:
            return Pretended(func(*args, **{**keywords, "device": HOST}))
        return func(*args, **keywords)


class _Device(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        name = func._schema.name
        keywords = dict(kwargs or {})
        given = [one for one in tree_flatten((args, keywords))[0] if isinstance(one, torch.Tensor)]
        there = [one for one in given if isinstance(one, Pretended)]
        if there and name not in _BRINGING:
            _refuse(name, given, there)
        asked = keywords.get("device")
        if asked is not None:
            keywords["device"] = HOST
        held_of = {id(one.held): one for one in there}
        plain = tree_map_only(Pretended, lambda one: one.held, (args, keywords))
        found = func(*plain[0], **plain[1])
        if name == "aten::copy_":
            return args[0]
        if name == "aten::_local_scalar_dense" or (asked is None and not there):
            return found
        if asked is not None and torch.device(asked).type != NAME:
            return found

        def there_again(one: torch.Tensor) -> Pretended:
            known = held_of.get(id(one))  # what was written to stays the tensor it is
            return Pretended(one) if known is None else known

        return tree_map_only(torch.Tensor, there_again, found)


def _refuse(name: str, given: list[torch.Tensor], there: list[Pretended]) -> None:
    here = [one for one in given if not isinstance(one, Pretended) and one.dim()]
    if here:
        raise GPULack(f"{name}: a tensor of the host, {tuple(here[0].shape)}, among those of the device")
    if name in _OF_FLOATS and not all(one.is_floating_point() or one.is_complex() for one in there):
        raise GPULack(f"{name}: of {there[0].dtype}")
    odd = next((one.dtype for one in there if one.dtype in _UNSIGNED | _FLOATS_OF_A_BYTE), None)
    if odd is not None and name not in _OF_EVERY_TYPE:
        raise GPULack(f"{name}: of {odd}")


@contextmanager
def pretended_device() -> Iterator[torch.device]:
    """Let tensors be on the device."""
    with _Device(), _Making():
        yield torch.device(NAME)


def pretend(value: Any) -> Any:
    """Return a value on the device: a tensor, or each of a list; what is no tensor stays."""
    return tree_map_only(torch.Tensor, Pretended, value)


def pretend_module(module: nn.Module) -> None:
    """Put what a module stores on the device, parameters as such."""
    for part in module.modules():
        for stored in (part._parameters, part._buffers):
            for name, tensor in stored.items():
                if tensor is not None and not isinstance(tensor, Pretended):
                    there = Pretended(tensor.detach()).requires_grad_(tensor.requires_grad)
                    if isinstance(tensor, nn.Parameter):
                        there._is_param = True
                    stored[name] = there


def brought_back(value: Any) -> Any:
    """Return a value on the host, and raise an error for what was not on the device."""

    def back(tensor: torch.Tensor) -> torch.Tensor:
        if not isinstance(tensor, Pretended):
            raise GPULack(f"a result on the host, {tuple(tensor.shape)}")
        return tensor.held

    return tree_map_only(torch.Tensor, back, value)

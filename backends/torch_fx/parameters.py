"""Where a lowered model keeps what the model stores: parameters and buffers, named as the initializers."""

from __future__ import annotations

import functools
import keyword
import mmap
import operator
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import fx, nn

from graphopt.backend import Array
from graphopt.mapped import MappedFile, MappedTensor

from .tensors import to_torch

# What gradients are computed in. Floats of 8 bits and less are codes, of which there are none.
TRAINABLE = frozenset({ir.DataType.FLOAT, ir.DataType.DOUBLE, ir.DataType.FLOAT16, ir.DataType.BFLOAT16})
_BYTE = 8
# fx writes names into Python source between quotes.
_UNWRITABLE = re.compile(r"""[\\"'\n\r\0]""")


@dataclass(frozen=True)
class Lowered:
    """What a lowered module has to do with the model it was made of: `module.meta["graphopt"]`.

    A copy of the module shares it, and its nodes are then those of the original.

    Attributes:
        inputs: Names of the inputs, in the order of the module's arguments.
        outputs: Names of the model's outputs, which come first in the tuple the module returns.
        observed: Names of the values that follow them.
        parameters: Initializer, or value of a Constant, by `graphopt.constant_names`, to the path of its parameter
            (`module.get_parameter`).
        buffers: The same of those that are no floats, such as codes (`module.get_buffer`).
        values: Name of a value of the main graph to the node that computes it.
    """

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    observed: tuple[str, ...]
    parameters: Mapping[str, str]
    buffers: Mapping[str, str]
    values: Mapping[str, fx.Node]


@dataclass
class Store:
    """Everything stored, put into one module of modules by name.

    Attributes:
        root: The module that holds it.
        parameters: Name of what is stored to path, of parameters.
        buffers: Of buffers.
        shared: Whether what the model holds in memory is stored on that memory, or copied.
    """

    root: nn.Module = field(default_factory=nn.Module)
    parameters: dict[str, str] = field(default_factory=dict)
    buffers: dict[str, str] = field(default_factory=dict)
    shared: bool = True
    _mappings: dict[MappedFile, mmap.mmap | None] = field(default_factory=dict)

    def put(self, name: str, tensor: ir.TensorProtocol, *, is_constant: bool) -> str:
        """Store a tensor on the memory it lies in, and return its path: floats as parameters, the rest as buffers.

        A constant's name is its own, whatever else goes by it, such as a tensor that is the attribute of a node.
        """
        holder, path = self._place(name)
        field_name = path.rpartition(".")[2]
        held = to_torch(self._array(tensor))
        if tensor.dtype in TRAINABLE:
            holder.register_parameter(field_name, nn.Parameter(held, requires_grad=False))
            self.parameters[name] = path if is_constant else self.parameters.get(name, path)
        elif isinstance(held, torch.Tensor):
            holder.register_buffer(field_name, held)
            self.buffers[name] = path if is_constant else self.buffers.get(name, path)
        else:  # strings
            setattr(holder, field_name, held)
        return path

    def _array(self, tensor: ir.TensorProtocol) -> Array:
        """Return what a tensor holds, of a mapped file in memory that may be written without the file's being."""
        if not isinstance(tensor, MappedTensor) or tensor.dtype.bitwidth < _BYTE or not tensor.length:
            return tensor.numpy() if self.shared else np.array(tensor.numpy())
        if tensor.file not in self._mappings:
            self._mappings[tensor.file] = tensor.file.writable()
        mapping = self._mappings[tensor.file]
        return np.array(tensor.numpy()) if mapping is None else tensor.array_on(mapping)

    def put_buffer(self, name: str, tensor: torch.Tensor) -> str:
        """Store a tensor of ours, which is no part of the model, and return its path."""
        holder, path = self._place(name)
        holder.register_buffer(path.rpartition(".")[2], tensor, persistent=False)
        return path

    def put_module(self, name: str, module: nn.Module) -> str:
        """Store the module of a nested graph and return its path."""
        holder, path = self._place(name)
        holder.add_module(path.rpartition(".")[2], module)
        return path

    def get(self, path: str) -> Any:
        """Return what is stored at a path."""
        return operator.attrgetter(path)(self.root)

    def _place(self, name: str) -> tuple[nn.Module, str]:
        """Return the module a name leads to, made where it is missing, and the path: the name where that is free."""
        *modules, last = [_UNWRITABLE.sub("_", part) or "_" for part in name.split(".")]
        holder, path = self.root, []
        for part in modules:
            free = _free(holder, part, nn.Module)
            if free not in holder._modules:
                holder.add_module(free, nn.Module())
            holder = holder.get_submodule(free)
            path.append(free)
        return holder, ".".join([*path, _free(holder, last, None)])


def _free(holder: nn.Module, name: str, shared: Any) -> str:
    """Return the name, with underscores behind it until it is free or that of a module to share.

    It is not free where any module, or one of torch.fx, has something else of the name, such as `forward` or `graph`,
    and where Python has, as of `if`: torch.fx writes names into source as they are.
    """
    while True:
        if shared is not None and type(holder._modules.get(name)) is shared:
            return name
        if not hasattr(holder, name) and name not in _taken() and not keyword.iskeyword(name):
            return name
        name += "_"


@functools.cache
def _taken() -> frozenset[str]:
    """Return the names that every module of torch.fx has for itself, such as `forward`, `graph` and `meta`."""
    return frozenset(dir(fx.GraphModule(nn.Module(), fx.Graph())))

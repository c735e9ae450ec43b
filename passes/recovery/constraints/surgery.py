"""Constraint modules put into a lowered model: right behind what is stored, in front of all that reads it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import onnx_ir as ir
import torch
from torch import fx, nn

# What constraint modules are called in the lowered one.
_HELD = "held"


class Surgery:
    """Edits the graph of a lowered module.

    Args:
        module: The module, changed in place; call `finish` when done.
        names: What each constant of its model is called.
    """

    def __init__(self, module: fx.GraphModule, names: Mapping[ir.Value, str]) -> None:
        self._module, self._lowered, self._names = module, module.meta["graphopt"], names
        self._stored = {str(node.target): node for node in module.graph.nodes if node.op == "get_attr"}
        # What stands for a constant by now, where that is more than reading it.
        self._now: dict[str, fx.Node] = {}
        places = [node for node in module.graph.nodes if node.op == "placeholder"]
        self._last: fx.Node = places[-1] if places else module.graph._root
        self._count = 0

    def name(self, value: ir.Value) -> str:
        """Return what a constant is called in the whole model; nothing for one that is none."""
        return self._names.get(value, "")

    def path(self, value: ir.Value) -> str | None:
        """Return where the module stores a constant; None where no graph of it reads the constant."""
        name = self.name(value)
        path: str | None = self._lowered.parameters.get(name) or self._lowered.buffers.get(name)
        return path if path in self._stored else None

    def has(self, *values: ir.Value | None) -> bool:
        """Return whether the module stores all of some constants, None aside."""
        return all(value is None or self.path(value) is not None for value in values)

    def tensor(self, value: ir.Value) -> torch.Tensor:
        """Return a constant that stays as it is, where the module has it."""
        holder, _, name = (self.path(value) or "").rpartition(".")
        found: torch.Tensor = getattr(self._module.get_submodule(holder), name)
        return found

    def parameter(self, path: str) -> nn.Parameter:
        """Return a parameter as it is now; wrappers may have put another one in its place."""
        return self._module.get_parameter(path)

    def train(self, path: str, start: torch.Tensor, *, trains: bool) -> None:
        """Put a parameter in memory of its own in the place of what is stored."""
        holder, _, name = path.rpartition(".")
        setattr(self._module.get_submodule(holder), name, nn.Parameter(start, requires_grad=trains))

    def at_start(self, value: ir.Value, made_by: nn.Module | Callable[..., Any], *of: ir.Value | Any) -> None:
        """Compute a small constant anew at the start of each run, of others if need be.

        Args:
            value: The constant.
            made_by: What gives it.
            of: What that takes: constants as they are by then, and other things as they are.
        """
        arguments = tuple(self.read(one) if isinstance(one, ir.Value) else one for one in of)
        with self._module.graph.inserting_after(self._last):
            made = self._call(made_by, arguments)
        self._last = made
        self._replace(value, made)

    def read(self, value: ir.Value) -> fx.Node:
        """Return the node that gives a small constant, at the start of a run."""
        path = self.path(value)
        assert path is not None, "asked for constants that are read"
        if path not in self._now:
            node = self._stored[path]
            self._last.append(node)
            self._last = self._now[path] = node
        return self._now[path]

    def behind(self, value: ir.Value, module: nn.Module, *of: ir.Value | None) -> None:
        """Let all that reads a constant read what a module makes of it.

        Args:
            value: The constant.
            module: Takes it, float32 or as it is stored.
            of: What else the module takes: small constants.
        """
        node = self._stored[self.path(value) or ""]
        self._insert(value, node, module, (node, *(None if one is None else self.read(one) for one in of)))

    def instead(self, value: ir.Value, module: nn.Module, *of: ir.Value | None) -> None:
        """Let all that reads a constant read what a module gives; the constant itself leaves the module."""
        path = self.path(value) or ""
        node = self._stored[path]
        self._insert(value, node, module, tuple(None if one is None else self.read(one) for one in of))
        self._module.graph.erase_node(node)
        holder, _, name = path.rpartition(".")
        delattr(self._module.get_submodule(holder), name)

    def finish(self) -> None:
        """Check the graph and compile it."""
        self._module.graph.lint()
        self._module.recompile()

    def _insert(self, value: ir.Value, node: fx.Node, module: nn.Module, arguments: Sequence[Any]) -> None:
        users = set(node.users)
        first = next((one for one in self._module.graph.nodes if one in users), None)
        assert first is not None, "somebody reads it"
        with self._module.graph.inserting_before(first):
            made = self._call(module, tuple(arguments))
        self._replace(value, made)

    def _replace(self, value: ir.Value, made: fx.Node) -> None:
        path = self.path(value) or ""
        node = self._now.get(path, self._stored[path])
        node.replace_all_uses_with(made, delete_user_cb=lambda user: user is not made)
        self._now[path] = made

    def _call(self, made_by: nn.Module | Callable[..., Any], arguments: tuple[Any, ...]) -> fx.Node:
        if not isinstance(made_by, nn.Module):
            return self._module.graph.call_function(made_by, arguments)
        while hasattr(self._module, f"{_HELD}_{self._count}"):
            self._count += 1
        name = f"{_HELD}_{self._count}"
        self._module.add_submodule(name, made_by)
        return self._module.graph.call_module(name, arguments)

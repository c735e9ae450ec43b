"""What stays on the host when a module goes to a GPU: sizes, axes, and the arithmetic that finds them.

Reading such a number from a GPU means to wait for it. So whatever is computed of sizes and constants alone, and is
read as numbers somewhere (`Operator.sizes`), is computed by the CPU; a constant that is read so becomes part of the
module's code. Strings are always there, and what is computed of them. What is on the host and meets tensors of the
module's device is brought to that. On a CPU all of this does nothing.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeAlias

import torch
from torch import fx

from .known_numbers import Numbers
from .operators import Operator
from .ops_sequence import optional_has_element, sequence_length
from .ops_shapes import range_, shape, size

# A constant of more elements is no list of sizes.
_LONGEST = 1024
# Operators that read numbers and compute with the tensors they are in, too.
_OF_TENSORS: frozenset[Any] = frozenset({range_})
# Operators whose outputs are on the host by themselves.
_NUMBERS: frozenset[Any] = frozenset({optional_has_element, sequence_length, shape, size})

Constants: TypeAlias = Mapping[fx.Node, torch.Tensor]
Bodies: TypeAlias = Callable[[str], Any]


def numbers(values: Any, dtype: torch.dtype) -> torch.Tensor:
    """Return a constant of the host."""
    return torch.tensor(values, dtype=dtype)


def brought(value: Any, device: torch.device) -> Any:
    """Return a value of the host on a device: a tensor, or each of a sequence or of several; strings stay."""
    if isinstance(value, torch.Tensor):
        return value.to(device)
    return type(value)(brought(one, device) for one in value) if isinstance(value, list | tuple) else value


def place(graph: fx.Graph, anchor: fx.Node, constants: Constants, bodies: Bodies) -> None:
    """Settle for each value of a graph where it is computed, and the same in the graphs nested in it.

    Args:
        graph: The graph; calls have their operator as ``meta["operator"]``.
        anchor: The node of a tensor that lies where the module does.
        constants: Nodes that give tensors that are known.
        bodies: Gives the module of a nested graph by its path.
    """
    _Placing(graph, anchor, constants, bodies).settle()


class _Placing:
    def __init__(
        self,
        graph: fx.Graph,
        anchor: fx.Node,
        constants: Constants,
        bodies: Bodies,
        hosted: frozenset[fx.Node] = frozenset(),
    ) -> None:
        self._graph, self._anchor, self._bodies, self._hosted = graph, anchor, bodies, hosted
        self._constants = {node: one for node, one in constants.items() if _is_short(one)}
        self._host = self._on_host()
        while read_as_both := [node for node in self._constants if self._is_read_as_both(node)]:
            for node in read_as_both:
                del self._constants[node]
            self._host = self._on_host()
        self._elsewhere: dict[fx.Node, fx.Node] = {}
        arguments = [node for node in graph.nodes if node.op == "placeholder"]
        with graph.inserting_after(anchor if anchor.op != "placeholder" else arguments[-1]):
            self._device = graph.call_function(getattr, (anchor, "device"))

    def _is_read_as_both(self, node: fx.Node) -> bool:
        """Tell whether floats are numbers here and a tensor there, which may train: then they are no known numbers."""
        if not self._constants[node].is_floating_point():
            return False
        captures = sum(node in captured for user in node.users for _, captured in _nested(user))
        if captures:  # what one graph does with it, another one does not know
            return captures > 1 or len(node.users) > 1
        there = [user for user in node.users if user not in self._host]
        as_number = len(there) < len(node.users) or any(_reads_numbers(user, node) for user in there)
        return as_number and any(user.op == "output" or node in _tensors(user) for user in there)

    def settle(self) -> None:
        """Give every operator its inputs where it computes, and drop what nobody reads any more."""
        for node in list(self._graph.nodes):
            if "operator" in node.meta:
                self._settle(node)
            elif node.op == "output":  # whoever runs a graph expects everything on the module's device
                node.args = (tuple(self._as_tensor(one) for one in node.args[0]),)
        for node in reversed(self._graph.nodes):
            if not node.users and (node is self._device or node.op == "get_attr"):
                self._graph.erase_node(node)

    def _on_host(self) -> set[fx.Node]:
        """Return what the host computes: what it can and has all inputs of, and of which numbers are read."""
        able: set[fx.Node] = set(self._hosted) | set(self._constants)
        for node in self._graph.nodes:
            if self._is_able(node, able):
                able.add(node)
        wanted: set[fx.Node] = set()
        for node in reversed(self._graph.nodes):
            if node in self._hosted or node.target in _NUMBERS or (node in able and _is_wanted(node, wanted)):
                wanted.add(node)
        found: set[fx.Node] = set()
        for node in self._graph.nodes:
            free = node.op == "placeholder" or node.target in _NUMBERS
            if node.target is operator.getitem:
                is_there = node.args[0] in found  # one of several results is where all of them are, wanted or not
            else:
                known = all(one in found or one in self._constants for one in _tensors(node))
                is_there = node in wanted and (free or known)
            if is_there:
                found.add(node)
        return found - set(self._constants)

    @staticmethod
    def _is_able(node: fx.Node, able: set[fx.Node]) -> bool:
        if node.op == "placeholder":
            return bool(node.meta.get("numbers"))
        if node.op != "call_function" or any(True for _ in _nested(node)):
            return False
        return node.target in _NUMBERS or all(one in able for one in _tensors(node))

    def _settle(self, node: fx.Node) -> None:
        found: Operator = node.meta["operator"]
        on_host = node in self._host
        keywords = dict(node.kwargs)
        if "device" in found.keywords:
            keywords["device"] = torch.device("cpu") if on_host else self._device
        if on_host:
            keywords = {name: self._as_numbers(node, one) for name, one in keywords.items()}
        if node.target not in _NUMBERS:  # a shape is known wherever its tensor lies
            node.args = tuple(
                self._as_numbers(node, one, listed=index in found.sizes)
                if index in found.sizes or on_host
                else self._as_tensor(one)
                for index, one in enumerate(node.args)
            )
        node.kwargs = keywords
        for module, captured in _nested(node):
            self._place_nested(module, captured)
        of_numbers = not found.returns_tuple and "device" not in found.keywords and not _has_tensors(node)
        if node.meta.get("texts") or (of_numbers and not on_host):
            self._bring_result(node)

    def _as_numbers(self, reader: fx.Node, given: Any, *, listed: bool = False) -> Any:
        """Return what a reader on the host reads: of a constant, its numbers, in no tensor if it only lists them."""
        if not isinstance(given, fx.Node):
            return given
        if given in self._constants:
            known = self._constants[given]
            with self._graph.inserting_before(reader):
                if listed and reader.target not in _OF_TENSORS:
                    return self._graph.call_function(Numbers, (known.tolist(), known.dtype, tuple(known.shape)))
                return self._graph.call_function(numbers, (known.tolist(), known.dtype))
        return self._brought(given, torch.device("cpu")) if self._is_argument(given) else given

    def _as_tensor(self, given: Any) -> Any:
        """Return what an operator on the module's device reads."""
        if not isinstance(given, fx.Node) or given not in self._host or self._is_argument(given):
            return given
        return self._brought(given, self._device)

    def _is_argument(self, node: fx.Node) -> bool:
        """Return whether the host computes with an argument of the whole module, which comes where the module is."""
        return node.op == "placeholder" and node in self._host and node not in self._hosted

    def _brought(self, given: fx.Node, where: Any) -> fx.Node:
        """Return a value in the other place, brought there once, as soon as it is known."""
        if given not in self._elsewhere:
            with self._graph.inserting_after(self._device if given.op == "placeholder" else given):
                self._elsewhere[given] = self._graph.call_function(brought, (given, where))
        return self._elsewhere[given]

    def _bring_result(self, node: fx.Node) -> None:
        """Let the users of what is made of numbers alone, or of strings, find it on the module's device."""
        with self._graph.inserting_after(node):
            result = self._graph.call_function(brought, (node, self._device))
        node.replace_all_uses_with(result, delete_user_cb=lambda user: user is not result)

    def _place_nested(self, module: fx.Node, captured: tuple[fx.Node, ...]) -> None:
        body = self._bodies(str(module.meta["path"]))
        arguments = [node for node in body.graph.nodes if node.op == "placeholder"]
        pairs = list(zip(arguments[len(arguments) - len(captured) :], captured, strict=True))
        constants = {inner: self._constants[outer] for inner, outer in pairs if outer in self._constants}
        hosted = frozenset(inner for inner, outer in pairs if outer in self._host and not self._is_argument(outer))
        _Placing(body.graph, pairs[0][0], constants, self._bodies, hosted).settle()
        body.recompile()


def _is_short(tensor: torch.Tensor) -> bool:
    """Return whether a constant can be written as a list that keeps its shape."""
    return tensor.numel() <= _LONGEST and (tensor.numel() > 0 or tensor.ndim == 1) and not _is_odd(tensor)


def _is_odd(tensor: torch.Tensor) -> bool:
    """Return whether torch makes no tensors of this type from numbers."""
    return tensor.dtype.itemsize == 1 and tensor.dtype.is_floating_point


def _tensors(node: fx.Node) -> Iterator[fx.Node]:
    """Yield what an operator reads as tensors, not as numbers: these must all lie in one place."""
    sizes = node.meta["operator"].sizes if "operator" in node.meta else ()
    yield from (one for index, one in enumerate(node.args) if isinstance(one, fx.Node) and index not in sizes)


def _has_tensors(node: fx.Node) -> bool:
    return any(True for _ in _tensors(node)) or any(isinstance(one, fx.Node) for one in node.kwargs.values())


def _nested(node: fx.Node) -> Iterator[tuple[fx.Node, tuple[Any, ...]]]:
    """Yield the graphs an operator runs: the node of the module, and what it captures."""
    for given in node.kwargs.values():
        if isinstance(given, tuple):
            pair: Any = given
            yield pair


def _is_wanted(node: fx.Node, wanted: set[fx.Node]) -> bool:
    return any(user in wanted or _reads_numbers(user, node) for user in node.users)


def _reads_numbers(user: fx.Node, node: fx.Node) -> bool:
    """Return whether a user reads numbers of a node, whatever else it does with it."""
    sizes = user.meta["operator"].sizes if "operator" in user.meta else ()
    return any(one is node for index, one in enumerate(user.args) if index in sizes)

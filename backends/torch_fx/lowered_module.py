"""The module a model becomes: a GraphModule that can be pickled, and so saved whole or sent to another process."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from torch import fx, nn
from torch.fx.node import map_aggregate

from .parameters import Lowered

LOWERED = "graphopt"
"""Key of a module's `meta`: what it has to do with its model, a `Lowered`."""

# What nodes say of the model. Tools of torch leave things of theirs there, which may be anything.
_KEPT = ("onnx", "origins", "operator", "path", "numbers")


@dataclasses.dataclass(frozen=True)
class _Reference:
    """A node, by its name."""

    name: str


@dataclasses.dataclass(frozen=True)
class _Record:
    """A node as it is written down."""

    op: str
    name: str
    target: Any
    args: Any
    kwargs: Any
    meta: dict[str, Any]


class LoweredModule(fx.GraphModule):
    """A GraphModule that is pickled node by node.

    Torch's own is pickled as Python source, and traced when it is read: not by way of functions that ask for sizes.
    """

    def __reduce__(self) -> tuple[Any, ...]:
        """Write down the nodes, and all else as it is."""
        state = {name: one for name, one in self.__dict__.items() if name != "_graph"}
        state["meta"], values = dict(self.meta), {}
        lowered: Lowered | None = self.meta.get(LOWERED)
        if lowered is not None:
            values = {name: node.name for name, node in lowered.values.items()}
            state["meta"][LOWERED] = dataclasses.replace(lowered, values={})
        return _rebuilt, (type(self).__name__, [_record(node) for node in self.graph.nodes], state, values)


def _record(node: fx.Node) -> _Record:
    def by_name(value: Any) -> Any:
        return _Reference(value.name) if isinstance(value, fx.Node) else value

    meta = {key: node.meta[key] for key in _KEPT if key in node.meta}
    args, kwargs = map_aggregate(node.args, by_name), map_aggregate(node.kwargs, by_name)
    return _Record(node.op, node.name, node.target, args, kwargs, meta)


def _rebuilt(
    class_name: str, records: Sequence[_Record], state: dict[str, Any], values: dict[str, str]
) -> LoweredModule:
    """Return a module of what was written down."""
    graph, nodes = fx.Graph(), dict[str, fx.Node]()

    def as_node(value: Any) -> Any:
        return nodes[value.name] if isinstance(value, _Reference) else value

    for one in records:
        args, kwargs = map_aggregate(one.args, as_node), map_aggregate(one.kwargs, as_node)
        nodes[one.name] = graph.create_node(one.op, one.target, args, kwargs, one.name)
        nodes[one.name].meta.update(one.meta)
    module = LoweredModule(nn.Module(), fx.Graph(), class_name)
    module.__dict__.update(state)
    lowered = module.meta.get(LOWERED)
    if lowered is not None:
        known = {name: nodes[node] for name, node in values.items() if node in nodes}
        module.meta[LOWERED] = dataclasses.replace(lowered, values=known)
    module.graph = graph
    return module

"""Which nodes a pass may touch: globs over node names and operators."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import onnx_ir as ir

from graphopt import walk
from graphopt.errors import UsageError, did_you_mean


@dataclass(frozen=True)
class Selection:
    """Nodes chosen by globs that match a node's name or operator.

    Attributes:
        include: Only what one of these matches; empty for all.
        exclude: Never what one of these matches.
    """

    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()

    def allows(self, node: ir.Node) -> bool:
        """Return whether a node is chosen."""
        if any(_matches(node, glob) for glob in self.exclude):
            return False
        return not self.include or any(_matches(node, glob) for glob in self.include)


def select(model: ir.Model, include: Sequence[str], exclude: Sequence[str], *, where: str) -> Selection:
    """Return the selection after checking that each glob matches some node of the model.

    Args:
        model: The model, subgraphs and functions included.
        include: Globs over node names and operators.
        exclude: The same.
        where: How an error calls the place, for example ``pass `quant` ``.

    Raises:
        UsageError: A glob matches nothing; names it and the closest node.
    """
    nodes = list(walk.every_node(model))
    for option, globs in (("include", include), ("exclude", exclude)):
        for glob in globs:
            if not any(_matches(node, glob) for node in nodes):
                raise UsageError(f"{where}: `{option}={glob}` matches no node", hint=_hint(glob, nodes))
    return Selection(tuple(include), tuple(exclude))


def _hint(glob: str, nodes: Iterable[ir.Node]) -> str:
    operators = {node.op_type for node in nodes}
    close = did_you_mean(glob, operators | {node.name for node in nodes if node.name})
    if close.startswith("did you mean"):
        return close
    return f"a node's name, an operator ({', '.join(sorted(operators))}), or a glob such as `*conv1*`"


def _matches(node: ir.Node, glob: str) -> bool:
    return fnmatchcase(node.op_type, glob) or fnmatchcase(node.name or "", glob)

"""Where the time of a run goes: the kernels a runtime ran, the nodes each is for, and what they take at least."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import onnx_ir as ir

from graphopt import walk
from graphopt.backend import Feeds, Inspectable, Kernel
from graphopt.explaining.proof import kernels_by_node, numbered, state_of
from graphopt.kernel_nodes import nodes_of_kernels
from graphopt.node_costs import Cost, cost_of
from graphopt.shapes import infer_shapes

RUNS = 5
_UNKNOWN = Cost(None, None)


@dataclass(frozen=True)
class KernelTime:
    """One kernel of a run.

    Attributes:
        op: Operator it runs, as ``domain::op`` outside the ONNX domain.
        nodes: Names of the nodes of the model it runs, in graph order; none where the runtime put it in by itself.
        provider: Which part of the runtime ran it; empty where there is but one.
        integers: Whether it computes on codes.
        milliseconds: Of a run; of a control-flow operator, without what the graphs nested in it took.
        operations: Multiplications and additions of a run, or None where they are not known.
        bytes: What it must read and write in a run, or None likewise.
    """

    op: str
    nodes: tuple[str, ...]
    provider: str
    integers: bool
    milliseconds: float
    operations: int | None
    bytes: int | None

    @property
    def operations_per_second(self) -> float | None:
        """Multiplications and additions a second; None where it makes none, or their number is not known."""
        return self.operations / self.milliseconds * 1e3 if self.operations and self.milliseconds else None

    @property
    def bytes_per_second(self) -> float | None:
        """Bytes a second, by the least that it must move; None where that is not known."""
        return self.bytes / self.milliseconds * 1e3 if self.bytes and self.milliseconds else None


@dataclass(frozen=True)
class OpTime:
    """All kernels of one operator: how many there are and what they take together."""

    op: str
    count: int
    milliseconds: float
    operations: int | None


@dataclass(frozen=True)
class Profile:
    """The kernels of a run, the slowest first."""

    kernels: tuple[KernelTime, ...]

    @property
    def milliseconds(self) -> float:
        """What all kernels take."""
        return sum(one.milliseconds for one in self.kernels)

    @property
    def by_op(self) -> list[OpTime]:
        """Kernels by operator, those that take most first."""
        groups: defaultdict[str, list[KernelTime]] = defaultdict(list)
        for one in self.kernels:
            groups[one.op].append(one)
        rows = [OpTime(op, len(ran), sum(k.milliseconds for k in ran), _sum(ran)) for op, ran in groups.items()]
        return sorted(rows, key=lambda row: -row.milliseconds)

    @property
    def bytes(self) -> int:
        """What a run moves in and out of kernels at least, as far as it is known."""
        return sum(one.bytes or 0 for one in self.kernels)

    def as_dict(self) -> dict[str, Any]:
        """Return all of it as JSON values."""
        return {
            "milliseconds": self.milliseconds,
            "by_op": [asdict(one) for one in self.by_op],
            "kernels": [asdict(one) for one in self.kernels],
        }


def _sum(kernels: Sequence[KernelTime]) -> int | None:
    known = [one.operations for one in kernels if one.operations is not None]
    return sum(known) if len(known) == len(kernels) else None


def profile(model: ir.Model, backend: Inspectable, feeds: Feeds, *, threads: int = 0, runs: int = RUNS) -> Profile:
    """Run a model under the runtime's own profiler.

    Args:
        model: The model as loaded; it is left as it is.
        backend: What runs it.
        feeds: What it runs on.
        threads: Threads inside an operator; 0 leaves it to the runtime.
        runs: Runs to take the median of.

    Raises:
        BackendError: The runtime refuses the model or fails.
    """
    kernels, found = kernels_by_node(model.clone(), backend, feeds, threads=threads, runs=runs)
    nodes = numbered(sized(model, feeds))
    groups = nodes_of_kernels(kernels, nodes, found)
    of = {id(kernel): group for kernel, group in zip(kernels, groups, strict=True)}
    nesting = _Nesting.of(nodes)
    inner = nesting.times(kernels, of)
    ran = [kernel for kernel in kernels if kernel.milliseconds]
    rows = [_row(kernel, of[id(kernel)], nesting, inner) for kernel in ran]
    return Profile(tuple(sorted(rows, key=lambda row: -row.milliseconds)))


def sized(model: ir.Model, feeds: Feeds) -> ir.Model:
    """Return a copy whose inputs have the sizes of a feed, with all shapes that follow."""
    copy = model.clone()
    for value in copy.graph.inputs:
        feed = feeds.get(value.name or "")
        if feed is not None:
            value.shape = ir.Shape(feed.shape)
    # What outputs declare would stand, sizes that it leaves open as well.
    outputs = list(copy.graph.outputs)
    copy.graph.outputs.clear()
    infer_shapes(copy)
    copy.graph.outputs.extend(outputs)
    return copy


@dataclass(frozen=True)
class _Nesting:
    """Which node holds the graph that a node is nested in, by the identity of the inner one."""

    holders: dict[int, ir.Node]

    @classmethod
    def of(cls, nodes: Sequence[ir.Node]) -> _Nesting:
        return cls({id(inner): node for node in nodes for graph in walk.subgraphs(node) for inner in graph})

    def times(self, kernels: Sequence[Kernel], runs_nodes: Mapping[int, Sequence[ir.Node]]) -> dict[int, float]:
        """Return what the graphs nested right in each node took."""
        taken: defaultdict[int, float] = defaultdict(float)
        for kernel in kernels:
            held_by = (self.holders.get(id(node)) for node in runs_nodes[id(kernel)])
            for holder in {id(node) for node in held_by if node is not None}:
                taken[holder] += kernel.milliseconds
        return taken

    def runs_once(self, node: ir.Node) -> bool:
        """Return whether a node runs at most once in a run, and holds no graphs."""
        if any(True for _ in walk.subgraphs(node)):
            return False
        holder = self.holders.get(id(node))
        while holder is not None and holder.op_type == "If":
            holder = self.holders.get(id(holder))
        return holder is None


def _row(kernel: Kernel, nodes: Sequence[ir.Node], nesting: _Nesting, inner: Mapping[int, float]) -> KernelTime:
    cost = cost_of(nodes) if nodes and all(map(nesting.runs_once, nodes)) else _UNKNOWN
    own = kernel.milliseconds - sum(inner.get(id(node), 0.0) for node in nodes)
    return KernelTime(
        op=kernel.op,
        nodes=tuple(walk.label(node) for node in nodes),
        provider=kernel.provider,
        integers=state_of(kernel) == "integers",
        milliseconds=max(own, 0.0),
        operations=cost.operations,
        bytes=cost.bytes,
    )

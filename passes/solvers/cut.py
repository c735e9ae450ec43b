"""The minimum cut: two sides for the nodes of a network, so that what runs from one to the other costs least."""

from __future__ import annotations

import itertools
from collections import defaultdict, deque
from collections.abc import Hashable, Iterator

Node = Hashable
# Stands in for a capacity that no cut may include.
UNCUTTABLE = 1 << 40


class Network:
    """A directed network whose edges have capacities; parallel edges add up."""

    def __init__(self) -> None:
        self._residual: dict[Node, dict[Node, int]] = defaultdict(dict)

    def add(self, start: Node, end: Node, capacity: int) -> None:
        """Add an edge."""
        edges = self._residual[start]
        edges[end] = edges.get(end, 0) + capacity
        self._residual[end].setdefault(start, 0)

    def near_side(self, source: Node, sink: Node) -> set[Node]:
        """Return the nodes on the source's side of a cut of least capacity, the smallest such set.

        The flow is augmented along shortest paths, level by level (Dinitz, 1970); the network is left saturated.
        """
        while sink in (levels := self._levels(source)):
            tried = {node: iter(list(edges)) for node, edges in self._residual.items()}
            while self._augment(source, sink, levels, tried):
                pass
        return set(self._levels(source))

    def _levels(self, source: Node) -> dict[Node, int]:
        """Return how far each node lies behind the source, of those that can still be reached."""
        levels, queue = {source: 0}, deque([source])
        while queue:
            node = queue.popleft()
            for other, capacity in self._residual[node].items():
                if capacity > 0 and other not in levels:
                    levels[other] = levels[node] + 1
                    queue.append(other)
        return levels

    def _augment(self, source: Node, sink: Node, levels: dict[Node, int], tried: dict[Node, Iterator[Node]]) -> bool:
        """Send what one more path takes from source to sink, and return whether there was one."""
        path = [source]
        while path[-1] != sink:
            node = path[-1]
            step = next((other for other in tried[node] if self._leads_on(node, other, levels)), None)
            if step is not None:
                path.append(step)
            elif len(path) == 1:
                return False
            else:
                path.pop()
        edges = list(itertools.pairwise(path))
        flow = min(self._residual[start][end] for start, end in edges)
        for start, end in edges:
            self._residual[start][end] -= flow
            self._residual[end][start] += flow
        # Edges with capacity left may carry the next path too: they are looked at again.
        for start, end in edges:
            if self._residual[start][end] > 0:
                tried[start] = iter([end, *tried[start]])
        return True

    def _leads_on(self, node: Node, other: Node, levels: dict[Node, int]) -> bool:
        return self._residual[node][other] > 0 and levels.get(other) == levels[node] + 1

"""The minimum cut: two sides for the nodes of a network, so that what runs from one to the other costs least."""

from __future__ import annotations

from collections.abc import Hashable

import networkx

Node = Hashable


class Network:
    """A directed network whose edges have capacities; parallel edges add up."""

    def __init__(self) -> None:
        self._graph = networkx.DiGraph()

    def add(self, start: Node, end: Node, capacity: int | None) -> None:
        """Add an edge; None for a capacity that no cut may include."""
        known = self._graph.get_edge_data(start, end)
        if capacity is None:
            self._graph.add_edge(start, end)
            if known is not None:
                known.pop("capacity", None)
        elif known is None:
            self._graph.add_edge(start, end, capacity=capacity)
        elif "capacity" in known:
            known["capacity"] += capacity

    def near_side(self, source: Node, sink: Node) -> set[Node]:
        """Return the nodes on the source's side of a cut of least capacity, the smallest such set."""
        if source not in self._graph or sink not in self._graph:
            return {source}
        residual = networkx.algorithms.flow.boykov_kolmogorov(self._graph, source, sink)
        left = [(a, b) for a, b, edge in residual.edges(data=True) if edge["flow"] < edge["capacity"]]
        reached = networkx.DiGraph(left)
        return {source, *(networkx.descendants(reached, source) if source in reached else ())}

"""Layered drawings of directed graphs: which row each vertex is in, and where in its row.

After Sugiyama, Tagawa and Toda, "Methods for Visual Understanding of Hierarchical System Structures" (1981): rows by
longest path, order within rows by barycentres, positions by the least squares that keep the order. It is written for
graphs of networks, which are thousands of rows deep and few vertices wide, with edges that skip hundreds of rows:
what libraries spend their time on (fast-sugiyama: 105 s for the 4,031 nodes of a language model) and what nobody can
follow in a picture. Such edges are left out of the drawing (`Layout.far`); a viewer shows them on demand.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

Edge = tuple[int, int]

# An edge over more rows than this is far, unless nothing else leaves its start or nothing else enters its end.
_FAR_ROWS = 24
# With more bends than this on edges that skip rows, every edge over `_FAR_ROWS` is far: keeps the cost linear.
_MOST_BENDS = 40_000
_TIGHTENING_ROUNDS = 4
# Sweeps down and up that order the rows; the order with the fewest crossings is kept. More changed next to nothing.
_ORDER_SWEEPS = 10
# Sweeps in which rows follow the row before them, then both rows beside them.
_ALIGNING_SWEEPS, _BALANCING_SWEEPS = 8, 4
# How far a bend of an edge keeps from its neighbours, in widths of a vertex.
_BEND_ROOM = 0.3
# How strongly edges are pulled straight, others by 1: with a bend at one end, at both; along a trunk.
_PULL_ONE_BEND, _PULL_BENDS, _PULL_IN_TRUNK = 0.5, 2.0, 8.0
# The longest way through the graph is a straight line at 0: without it, deep graphs lean to one side, row by row.
_PULL_OF_SPINE = 1e6
# How many other vertices a main one counts for where it is asked what is longest.
_WEIGHT_OF_MAIN = 4
# How weakly what nothing leads to, such as a weight that is prepared, pulls what it leads to.
_PULL_OF_SOURCES = 0.1
# Bends nearer than this to the straight line between others are left out, in widths of a vertex.
_STRAIGHT_ENOUGH = 0.3


@dataclass(frozen=True)
class Layout:
    """Where the vertices of a graph are.

    Attributes:
        rows: The row of each vertex, from 0 at the top.
        x: The middle of each vertex; neighbours in a row are at least 1 apart.
        bends: Of each edge that skips rows, where it bends: rows below its start, and x, in turn.
        far: Edges that skip too many rows to be drawn.
    """

    rows: list[int]
    x: list[float]
    bends: dict[Edge, list[tuple[int, float]]]
    far: set[Edge]


def layered(vertices: int, edges: Iterable[Edge], main: Container[int] = ()) -> Layout:
    """Lay out a directed graph, edges downwards; the same graph always gets the same layout.

    Args:
        vertices: How many there are, called 0, 1, ...; in about the order in which they are to be seen.
        edges: Pairs of vertices. Of a circle, the edges that contradict the order of the vertices go upwards.
        main: Vertices that the straight line through the middle is rather to go through than others.
    """
    every = sorted({edge for edge in edges if edge[0] != edge[1]})
    order = _topological(vertices, every)
    place = {vertex: index for index, vertex in enumerate(order)}
    down = [edge for edge in every if place[edge[0]] < place[edge[1]]]
    rows = _rows(order, down)
    far = _far(down, rows)
    drawn = _Drawing(rows, [edge for edge in down if edge not in far], main)
    drawn.put_in_order()
    x = drawn.positions()
    bends = {
        edge: _straightened([x[edge[0]], *(x[bend] for bend in chain), x[edge[1]]])
        for edge, chain in drawn.chains.items()
        if chain
    }
    return Layout(rows, [round(x[vertex], 2) for vertex in range(vertices)], bends, far)


def _neighbours(vertices: int, edges: Iterable[Edge]) -> tuple[list[list[int]], list[list[int]]]:
    """Return what each vertex is reached from, and what it leads to."""
    above: list[list[int]] = [[] for _ in range(vertices)]
    below: list[list[int]] = [[] for _ in range(vertices)]
    for start, end in edges:
        below[start].append(end)
        above[end].append(start)
    return above, below


def _topological(vertices: int, edges: Sequence[Edge]) -> list[int]:
    """Return the vertices, each behind what leads to it; where there is a circle, its first vertex comes first."""
    above, below = _neighbours(vertices, edges)
    missing = [len(starts) for starts in above]
    ready = [vertex for vertex in range(vertices) if not missing[vertex]]
    done = [False] * vertices
    order: list[int] = []
    next_stuck = 0
    while len(order) < vertices:
        if ready:
            vertex = ready.pop(0)
        else:
            while done[next_stuck]:
                next_stuck += 1
            vertex = next_stuck
        if done[vertex]:
            continue
        done[vertex] = True
        order.append(vertex)
        for end in below[vertex]:
            missing[end] -= 1
            if not missing[end] and not done[end]:
                insort(ready, end)
    return order


def _rows(order: Sequence[int], edges: Sequence[Edge]) -> list[int]:
    """Return the row of each vertex: as high as possible, then moved to where its edges are short."""
    above, below = _neighbours(len(order), edges)
    rows = [0] * len(order)
    for vertex in order:
        rows[vertex] = max((rows[start] + 1 for start in above[vertex]), default=0)
    for _ in range(_TIGHTENING_ROUNDS):
        for vertex in reversed(order):
            if len(below[vertex]) > len(above[vertex]) or (below[vertex] and len(below[vertex]) == len(above[vertex])):
                rows[vertex] = min(rows[end] for end in below[vertex]) - 1
        for vertex in order:
            if len(above[vertex]) > len(below[vertex]):
                rows[vertex] = max(rows[start] for start in above[vertex]) + 1
    return rows


def _far(edges: Sequence[Edge], rows: Sequence[int]) -> set[Edge]:
    """Return the edges that skip too many rows to be drawn."""
    above, below = _neighbours(len(rows), edges)
    long = {edge for edge in edges if rows[edge[1]] - rows[edge[0]] > _FAR_ROWS}
    only = {(start, end) for start, end in long if len(below[start]) == 1 or len(above[end]) == 1}
    bends = sum(rows[end] - rows[start] - 1 for start, end in edges if (start, end) not in long or (start, end) in only)
    return long if bends > _MOST_BENDS else long - only


class _Drawing:
    """Rows of vertices and of bends of the edges that cross them."""

    def __init__(self, rows: Sequence[int], edges: Sequence[Edge], main: Container[int]) -> None:
        self.vertices = len(rows)
        self.chains: dict[Edge, list[int]] = {}
        self.levels: list[list[int]] = [[] for _ in range(max(rows, default=-1) + 1)]
        for vertex, row in enumerate(rows):
            self.levels[row].append(vertex)
        pieces: list[Edge] = []
        made = self.vertices
        for start, end in edges:
            chain = list(range(made, made + rows[end] - rows[start] - 1))
            made += len(chain)
            self.chains[start, end] = chain
            for bend, row in zip(chain, range(rows[start] + 1, rows[end]), strict=True):
                self.levels[row].append(bend)
            pieces += zip([start, *chain], [*chain, end], strict=True)
        self.above, self.below = _neighbours(made, pieces)
        self._trunk, self._spine = self._find_trunks(main)
        self._begin_depth_first(made)

    def _find_trunks(self, main: Container[int]) -> tuple[list[int], set[int]]:
        """Return what each item follows, and the longest way through the graph.

        An item follows the start with most above it, if that start leads to nothing deeper; -1 stands for nothing.
        """
        weights = [_WEIGHT_OF_MAIN if item in main else int(item < self.vertices) for item in range(len(self.above))]
        depth, height = [0] * len(self.above), [0] * len(self.above)
        for item in (item for level in self.levels for item in level):
            depth[item] = max((depth[start] for start in self.above[item]), default=0) + weights[item]
        for item in (item for level in reversed(self.levels) for item in level):
            height[item] = max((height[end] for end in self.below[item]), default=0) + weights[item]
        deepest = [_best(starts, depth, self.vertices) for starts in self.above]
        tallest = [_best(ends, height, self.vertices) for ends in self.below]
        trunk = [start if start >= 0 and tallest[start] == item else -1 for item, start in enumerate(deepest)]
        spine: set[int] = set()
        item = max(range(self.vertices), key=lambda one: (height[one], -one), default=-1)
        while item >= 0:
            spine.add(item)
            item = tallest[item]
        return trunk, spine

    def _begin_depth_first(self, made: int) -> None:
        """Order the rows as a walk along the edges comes by: what hangs together starts out together."""
        seen = [False] * made
        met: list[int] = []
        for level in self.levels:
            for root in level:
                stack = [root]
                while stack:
                    item = stack.pop()
                    if seen[item]:
                        continue
                    seen[item] = True
                    met.append(item)
                    stack.extend(reversed(self.above[item] + self.below[item]))
        rank = {item: index for index, item in enumerate(met)}
        for level in self.levels:
            level.sort(key=rank.__getitem__)

    def put_in_order(self) -> None:
        """Order each row so that few edges cross: each item at the mean place of those it hangs on."""
        best, fewest = [list(level) for level in self.levels], self._crossings()
        for sweep in range(_ORDER_SWEEPS):
            if not fewest:
                break
            self._order_by(self.above if sweep % 2 == 0 else self.below, downwards=sweep % 2 == 0)
            crossings = self._crossings()
            if crossings < fewest:
                best, fewest = [list(level) for level in self.levels], crossings
        self.levels = best

    def _order_by(self, neighbours: list[list[int]], *, downwards: bool) -> None:
        levels = self.levels if downwards else self.levels[::-1]
        for fixed, level in pairwise(levels):
            # Places as shares of the row, so that what hangs on nothing keeps its share.
            share = {item: (index + 0.5) / len(fixed) for index, item in enumerate(fixed)}
            own = {item: (index + 0.5) / len(level) for index, item in enumerate(level)}
            for item in level:
                if neighbours[item]:
                    own[item] = sum(share[other] for other in neighbours[item]) / len(neighbours[item])
            level.sort(key=own.__getitem__)

    def _crossings(self) -> int:
        """Count the crossings between neighbouring rows."""
        count = 0
        for upper, lower in pairwise(self.levels):
            place = {item: index for index, item in enumerate(lower)}
            seen: list[int] = []
            for item in upper:
                ends = sorted(place[end] for end in self.below[item])
                count += sum(len(seen) - bisect_left(seen, end + 1) for end in ends)
                for end in ends:
                    insort(seen, end)
        return count

    def positions(self) -> list[float]:
        """Return where each item of each row is: as near to those it hangs on as the order and the room allow."""
        x = [0.0] * len(self.above)
        for level in self.levels:
            places = self._places(level)
            for item, place in zip(level, places, strict=True):
                x[item] = place - places[-1] / 2
        for sweep in range(_ALIGNING_SWEEPS + _BALANCING_SWEEPS):
            upwards, both = sweep % 2, sweep >= _ALIGNING_SWEEPS
            for level in reversed(self.levels) if upwards else self.levels:
                self._settle(level, x, [self._pulling(item, upwards=bool(upwards), both=both) for item in level])
        return x

    def _places(self, level: Sequence[int]) -> list[float]:
        """Return the items of a row packed as close as they may be."""
        places = [0.0]
        for left, right in pairwise(level):
            places.append(places[-1] + (self._room(left) + self._room(right)) / 2)
        return places

    def _room(self, item: int) -> float:
        return 1.0 if item < self.vertices else _BEND_ROOM

    def _pulling(self, item: int, *, upwards: bool, both: bool) -> list[int]:
        """Return what an item is drawn to."""
        if both:
            return self.above[item] + self.below[item]
        return (self.below[item] or self.above[item]) if upwards else (self.above[item] or self.below[item])

    def _settle(self, level: Sequence[int], x: list[float], pulling: Sequence[list[int]]) -> None:
        """Move a row to where its edges pull it, in order: an isotonic regression on what is left of the room."""
        packed = self._places(level)
        wanted, weights = [], []
        for item, place, others in zip(level, packed, pulling, strict=True):
            if item in self._spine:
                wanted.append(-place)
                weights.append(_PULL_OF_SPINE)
                continue
            pulls = [(self._pull(item, other), x[other]) for other in others]
            weight = sum(pull for pull, _ in pulls)
            wanted.append((sum(pull * there for pull, there in pulls) / weight if weight else x[item]) - place)
            weights.append(weight or 1.0)
        for item, place, shift in zip(level, packed, _isotonic(wanted, weights), strict=True):
            x[item] = place + shift

    def _pull(self, item: int, other: int) -> float:
        """Return how strongly an item is drawn to be straight above or below another."""
        if not self.above[other] or not self.above[item]:
            return _PULL_OF_SOURCES
        bends = (item >= self.vertices) + (other >= self.vertices)
        if bends:
            return _PULL_BENDS if bends > 1 else _PULL_ONE_BEND
        # A trunk follows its head.
        return _PULL_IN_TRUNK if self._trunk[item] == other else 1.0


def _best(items: Sequence[int], rank: Sequence[int], vertices: int) -> int:
    """Return the middle one of the vertices with the highest rank, else of the bends; -1 of none."""
    if not items:
        return -1
    top = max((item < vertices, rank[item]) for item in items)
    equals = [item for item in items if (item < vertices, rank[item]) == top]
    return equals[len(equals) // 2]


def _straightened(line: Sequence[float]) -> list[tuple[int, float]]:
    """Return the inner points of a line, one a row, that it takes to tell its course (Ramer, Douglas and Peucker)."""
    kept: list[tuple[int, float]] = []
    parts = [(0, len(line) - 1)]
    while parts:
        first, last = parts.pop()
        slope = (line[last] - line[first]) / (last - first)
        away = [abs(line[first] + slope * (at - first) - line[at]) for at in range(first + 1, last)]
        if not away or max(away) <= _STRAIGHT_ENOUGH:
            continue
        worst = first + 1 + away.index(max(away))
        kept.append((worst, round(line[worst], 2)))
        parts += [(first, worst), (worst, last)]
    return sorted(kept)


def _isotonic(values: Sequence[float], weights: Sequence[float]) -> list[float]:
    """Return the non-decreasing numbers nearest to some values by weighted squares (pool adjacent violators)."""
    blocks: list[tuple[float, float, int]] = []
    for value, weight in zip(values, weights, strict=True):
        mean, total, count = value, weight, 1
        while blocks and blocks[-1][0] > mean:
            other, more, length = blocks.pop()
            mean = (mean * total + other * more) / (total + more)
            total, count = total + more, count + length
        blocks.append((mean, total, count))
    return [mean for mean, _, count in blocks for _ in range(count)]

"""What ONNX Runtime ran, read from the graph it optimized and from its own profile."""

from __future__ import annotations

import json
import re
import statistics
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx

from graphopt.backend import Kernel

_SUFFIX = "_kernel_time"
_MICROSECONDS = 1000.0  # in a millisecond
# How the profile calls dtypes, where numpy calls them otherwise.
_DTYPES = {"float": "float32", "double": "float64"}

_Key = tuple[str, str]  # name and operator of a node
_Event = dict[str, Any]
_Ran = tuple[list[_Event], int]  # events, and how many nodes share them


def read_kernels(optimized: Path, profile: Path, runs: int) -> list[Kernel]:
    """Return the kernels of a model that ran once without being counted, and then so many times.

    Args:
        optimized: The graph ONNX Runtime wrote after its optimizations.
        profile: Its profile of all runs.
        runs: How many of them count.
    """
    nodes = list(_nodes(onnx.load(optimized, load_external_data=False).graph))
    alike = Counter((node.name, node.op_type) for node in nodes)
    events = _events(profile)
    nameless = _of_nameless(nodes, events)
    kernels = []
    for place, node in enumerate(nodes):
        key = node.name, node.op_type
        ran, share = nameless.get(place) or (events.get(key, []), alike[key])
        kernels.append(_kernel(node, ran, share, runs))
    return kernels


def read_profile(profile: Path, runs: int) -> list[Kernel]:
    """Return the kernels a profile tells of, without what they read and make: parts that no graph is written of.

    Args:
        profile: ONNX Runtime's profile of all runs.
        runs: How many of them count, after one that does not.
    """
    return [
        Kernel(op, name, (), (), _dtypes(events[0]), _time(events, runs), _provider(events))
        for (name, op), events in _events(profile).items()
    ]


def _events(profile: Path) -> defaultdict[_Key, list[_Event]]:
    events: defaultdict[_Key, list[_Event]] = defaultdict(list)
    for event in json.loads(profile.read_text()):
        if event.get("cat") == "Node" and event["name"].endswith(_SUFFIX):
            events[event["name"].removesuffix(_SUFFIX), event["args"]["op_name"]].append(event)
    return events


def _of_nameless(nodes: Sequence[onnx.NodeProto], events: Mapping[_Key, list[_Event]]) -> dict[int, _Ran]:
    """Return the events of nodes without a name, by place: those of functions that were inlined, for one.

    The profile calls them by operator and a number that the written graph does not tell. Both are in the order in
    which nodes run; where some did not run, what the others took is given to all alike.
    """
    named = {(node.name, node.op_type) for node in nodes}
    places: defaultdict[str, list[int]] = defaultdict(list)
    for place, node in enumerate(nodes):
        if not node.name:
            places[node.op_type].append(place)
    found: dict[int, _Ran] = {}
    for op, of_op in places.items():
        numbered = re.compile(rf"{re.escape(op)}_\d+")
        ran = [own for key, own in events.items() if key[1] == op and key not in named and numbered.fullmatch(key[0])]
        if len(ran) == len(of_op):
            found |= {place: (own, 1) for place, own in zip(of_op, ran, strict=True)}
        else:
            pooled = sorted((event for own in ran for event in own), key=lambda event: float(event["ts"]))
            found |= dict.fromkeys(of_op, (pooled, len(of_op)))
    return found


def _nodes(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs):
                yield from _nodes(inner)


def _kernel(node: onnx.NodeProto, events: list[_Event], alike: int, runs: int) -> Kernel:
    domain = "" if node.domain in ("", "ai.onnx") else f"{node.domain}::"
    return Kernel(
        op=f"{domain}{node.op_type}",
        name=node.name,
        inputs=tuple(node.input),
        outputs=tuple(node.output),
        reads=_dtypes(events[0]) if events else (),
        milliseconds=_time(events, runs) / alike,
        provider=_provider(events),
    )


def _provider(events: list[_Event]) -> str:
    return str(events[0]["args"].get("provider", "")) if events else ""


def _dtypes(event: _Event) -> tuple[str, ...]:
    kinds = [next(iter(one), "") for one in event["args"].get("input_type_shape", [])]
    return tuple(_DTYPES.get(kind, kind) for kind in kinds)


def _time(events: list[_Event], runs: int) -> float:
    """Return the milliseconds of a run: the median over runs, where each holds as many events as the next."""
    times = [float(event["dur"]) / _MICROSECONDS for event in events]
    each, rest = divmod(len(times), runs + 1)
    if rest or not each:
        return sum(times) / (runs + 1)
    return statistics.median(sum(times[run * each : (run + 1) * each]) for run in range(1, runs + 1))

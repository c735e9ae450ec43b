"""The proof: which kernels a runtime ran for which nodes of a model."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from graphopt import walk
from graphopt.backend import Feeds, Inspectable, Kernel
from graphopt.errors import BackendError
from graphopt.explaining.rules import WEIGHT_KERNELS, State

# Names by which kernels are told apart: runtimes make the names of their own nodes from those of nodes or outputs.
_NAME = "graphopt{}_{}"
_NUMBER = re.compile(r"graphopt(\d+)_")
_CONVERSIONS = (
    "QuantizeLinear",
    "DequantizeLinear",
    "com.microsoft::QuantizeLinear",
    "com.microsoft::DequantizeLinear",
)
# What runtimes put between kernels of different layouts.
_LAYOUTS = frozenset(
    {"Reshape", "Transpose", "Cast", "com.microsoft.nchwc::ReorderOutput", "openvino::Reorder", *_CONVERSIONS}
)
_CODES = frozenset({"uint8", "int8", "uint16", "int16", "uint4", "int4", "uint2", "int2"})
_PRODUCTS_OF_FLOATS = frozenset({"openvino::FullyConnected", "openvino::MatMul"})
_INTEGER_KERNELS = re.compile(
    r"(com\.microsoft(\.nhwc)?::)?(QLinear\w+|QGemm|QAttention|QEmbedLayerNormalization|DynamicQuantize(MatMul|LSTM)"
    r"|MatMulInteger(ToFloat|16)?|ConvInteger)"
)


@dataclass(frozen=True)
class Ran:
    """What a runtime made of a node.

    Attributes:
        state: As predicted ones, and ``gone``: it was folded, or did nothing.
        kernel: The operator that runs for it, without domain; empty where it is gone.
        milliseconds: Of a run; what several nodes share is counted for each.
    """

    state: State | None
    kernel: str
    milliseconds: float


@dataclass(frozen=True)
class Proof:
    """What a runtime ran.

    Attributes:
        ran: By the number of the node, in the order of `numbered`.
        milliseconds: Of all kernels in a run.
        conversions: How many Q and DQ are left.
        conversion_milliseconds: Their share of the time.
        parts: Kernels and milliseconds of each part of the runtime that says it ran some, by its name.
    """

    ran: Mapping[int, Ran]
    milliseconds: float
    conversions: int
    conversion_milliseconds: float
    parts: Mapping[str, tuple[int, float]]


def numbered(model: ir.Model) -> list[ir.Node]:
    """Return the nodes of the main graph and of those nested in it; their places are their numbers."""
    return [node for graph in walk.graphs_within(model.graph) for node in graph]


def prove(model: ir.Model, backend: Inspectable, feeds: Feeds, *, threads: int, runs: int) -> Proof:
    """Run a model and find out what ran for each of its nodes.

    Args:
        model: The model as loaded; its nodes and inner values are renamed.
        backend: What runs it.
        feeds: What it runs on.
        threads: Threads inside an operator; 0 leaves it to the runtime.
        runs: Runs to average over.

    Raises:
        BackendError: The runtime refuses the model or fails.
    """
    nodes = numbered(model)
    kernels, standing = kernels_by_node(model, backend, feeds, threads=threads, runs=runs)
    if kernels and not any(kernel.outputs for kernel in kernels):
        raise BackendError(
            "the runtime runs whole parts of the model at once, and does not tell as what",
            hint="`graphopt bench --profile` shows the time of each part",
        )
    left = [kernel for kernel in kernels if kernel.op in _CONVERSIONS]
    return Proof(
        ran={number: _verdict(nodes[number], standing.get(number, ())) for number in range(len(nodes))},
        milliseconds=sum(kernel.milliseconds for kernel in kernels),
        conversions=len(left),
        conversion_milliseconds=sum(kernel.milliseconds for kernel in left),
        parts=_parts(kernels),
    )


def _parts(kernels: Iterable[Kernel]) -> dict[str, tuple[int, float]]:
    parts: dict[str, tuple[int, float]] = {}
    for kernel in kernels:
        if kernel.provider:
            count, milliseconds = parts.get(kernel.provider, (0, 0.0))
            parts[kernel.provider] = count + 1, milliseconds + kernel.milliseconds
    return parts


def kernels_by_node(
    model: ir.Model, backend: Inspectable, feeds: Feeds, *, threads: int, runs: int
) -> tuple[list[Kernel], dict[int, list[Kernel]]]:
    """Run a model and return all kernels of it, and those of each node that has any, by its number.

    Args:
        model: The model as loaded; its nodes and inner values are renamed.
        backend: What runs it.
        feeds: What it runs on.
        threads: Threads inside an operator; 0 leaves it to the runtime.
        runs: Runs to average over.

    Raises:
        BackendError: The runtime refuses the model or fails.
    """
    nodes = numbered(model)
    outputs = {id(value) for value in model.graph.outputs}
    for number, node in enumerate(nodes):
        node.name = _NAME.format(number, node.op_type)
        for index, value in enumerate(node.outputs):
            if value.name and id(value) not in outputs:
                value.name = _NAME.format(number, index)
    kernels = backend.kernels(model, feeds, threads=threads, runs=runs)
    return kernels, _standing_for(nodes, kernels)


def _standing_for(nodes: Sequence[ir.Node], kernels: Sequence[Kernel]) -> dict[int, list[Kernel]]:
    """Return the kernels of each node: by their names, by what they make, and by what lies between.

    A kernel that a runtime put together is named after one of its nodes and makes what the last of them made. The
    others lie on the way back from there to what the kernel reads, or to nodes that have a kernel of their own.
    """
    numbers = {id(node): number for number, node in enumerate(nodes)}
    makers = {value.name: number for number, node in enumerate(nodes) for value in node.outputs}
    found: dict[int, list[Kernel]] = {}
    for kernel in kernels:
        for number in map(int, _NUMBER.findall(kernel.name)):
            if kernel.op not in _LAYOUTS or kernel.op == nodes[number].op_type:
                found.setdefault(number, []).append(kernel)
    named = set(found)
    made_by = {name: kernel for kernel in kernels for name in kernel.outputs}
    for kernel in kernels:
        for name in kernel.outputs:
            if name in makers:
                worker = _worker(kernel, made_by)
                for inner in _between(nodes[makers[name]], set(worker.inputs), named, numbers):
                    found.setdefault(inner, []).append(worker)
    for number in named:
        for kernel in list(found[number]):
            before = _before(nodes[number], kernel)
            if before is not None and numbers[id(before)] not in found:
                found[numbers[id(before)]] = [kernel]
    return found


def _before(node: ir.Node, kernel: Kernel) -> ir.Node | None:
    """Return the operator that a kernel is of, where it is named after the activation behind it."""
    if node.op_type == kernel.op.rpartition("::")[2] or not node.inputs or node.inputs[0] is None:
        return None
    maker = node.inputs[0].producer()
    return maker if maker is not None and maker.op_type == kernel.op.rpartition("::")[2] else None


def _worker(kernel: Kernel, made_by: Mapping[str, Kernel]) -> Kernel:
    """Return the kernel whose result a node of the runtime's own only hands on in another layout."""
    while kernel.op in _LAYOUTS and not _NUMBER.search(kernel.name) and kernel.inputs[0] in made_by:
        kernel = made_by[kernel.inputs[0]]
    return kernel


def _between(last: ir.Node, reads: set[str], named: set[int], numbers: Mapping[int, int]) -> Iterable[int]:
    """Return the numbers of the nodes without a kernel of their own that lead from what is read to a last node."""
    seen: set[int] = set()
    waiting = [last]
    while waiting:
        node = waiting.pop()
        number = numbers.get(id(node))
        if number is None or number in seen or number in named:
            continue
        seen.add(number)
        for value in node.inputs:
            maker = value.producer() if value is not None and value.name not in reads else None
            if maker is not None:
                waiting.append(maker)
    return seen


def _verdict(node: ir.Node, kernels: Sequence[Kernel]) -> Ran:
    own = [kernel for kernel in kernels if kernel.op not in _CONVERSIONS and kernel.op != "Transpose"]
    if node.op_type == "Transpose":
        own = [kernel for kernel in kernels if kernel.op not in _CONVERSIONS]
    if not own:
        return Ran(None, "", 0.0)
    best = max(own, key=lambda kernel: (state_of(kernel) == "integers", kernel.milliseconds))
    return Ran(state_of(best), best.op.rpartition("::")[2], best.milliseconds)


def state_of(kernel: Kernel) -> State:
    """Return what a kernel computes on: codes, floats, or codes of weights and floats."""
    name = kernel.op.rpartition("::")[2]
    if name in WEIGHT_KERNELS:
        return "weights"
    first, second, *_ = (*kernel.reads, "", "")
    if first in _CODES or _INTEGER_KERNELS.fullmatch(kernel.op):
        return "integers"
    # A product of floats with codes decodes them as it reads them.
    return "weights" if second in _CODES and kernel.op in _PRODUCTS_OF_FLOATS else "float"

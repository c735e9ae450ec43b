"""What factored layers take by the clock, against the layers as they are: timed in turn, before anything is solved."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from contextlib import ExitStack

import numpy as np
import onnx_ir as ir

from graphopt import latency, walk
from graphopt.authoring import Context
from graphopt.backend import Array, is_timed
from graphopt.data import open_data
from graphopt.errors import BackendError, DataError
from graphopt.fragment import constant_content, fragment, values_read
from graphopt.generated import generated_feeds
from graphopt.walkthrough import Walkthrough

from ..analyses.linear_layers import LinearLayer
from ..analyses.second_moments import inputs_of
from .factor_forms import Candidate, Level
from .factored_convolutions import Convolution
from .factored_products import Product
from .split_products import rows_run_down
from .stacked_layers import Stack

# Seconds that a layer and what stands for it are timed for, in turn; and where they are nearly equal.
_SECONDS, _MORE_SECONDS = 0.15, 0.5
_LEAST_RUNS = 10
_NEARLY = 0.1
# What is not faster by this share is not faster.
_MARGIN = 0.02
# What weights hold that are only timed: no zero, and no number that is slow.
_FILL = 0.01


class PairClock:
    """Times what candidates would be written as.

    Shapes are those of one sample, the first of the calibration data or a made-up one; weights are made up. What is
    alike in operator, sizes and shapes is timed once.

    Args:
        ctx: The model as it is, what runs it, and data.
        candidates: What may be asked for.
    """

    def __init__(self, ctx: Context, candidates: Sequence[Candidate]) -> None:
        self._ctx = ctx
        self._known: dict[Hashable, float | None] = {}
        nodes = [node for candidate in candidates for node in candidate.nodes]
        self._inputs = _observed(_read_by(nodes), ctx) if is_timed(ctx.backend) else {}

    def pays(self, candidate: Candidate, level: Level) -> bool:
        """Return whether a candidate is faster so; what cannot be timed is taken to be."""
        ratio = self.ratio(candidate, level)
        return ratio is None or ratio < 1 - _MARGIN

    def ratio(self, candidate: Candidate, level: Level) -> float | None:
        """Return the time of a candidate at a level against that as it is; None where it cannot be timed.

        Args:
            candidate: One of those given.
            level: One of its levels.
        """
        if level.form == "whole":
            return 1.0
        read = _read_by(candidate.nodes)
        if any(value not in self._inputs for value in read):
            return None
        shapes = tuple(self._inputs[value] for value in read)
        key = (candidate.kind, shapes, level.form, level.ranks, level.plan)
        if key not in self._known:
            self._known[key] = self._timed(candidate, level, read)
        return self._known[key]

    def _timed(self, candidate: Candidate, level: Level, read: Sequence[ir.Value]) -> float | None:
        drawn = _drawn(candidate, level)
        if drawn is None:
            return None
        outputs = [node.outputs[0] for node in candidate.nodes]
        models = [self._model(candidate.nodes, outputs, read), self._model(*drawn, read)]
        _let_go(drawn[0])
        feeds = {f"in{place}": self._content(value) for place, value in enumerate(read)}
        try:
            with ExitStack() as stack:
                open_one = self._ctx.backend.open
                sessions = [stack.enter_context(open_one(model, threads=self._ctx.threads)) for model in models]
                ratio = 1.0
                for seconds in (_SECONDS, _MORE_SECONDS):
                    taken = latency.measure(sessions, [feeds, feeds], seconds=seconds, min_runs=_LEAST_RUNS)
                    ratio = taken[1].ratio
                    if abs(ratio - 1) > _NEARLY:
                        break
                return ratio
        except BackendError:
            return None

    def _model(self, nodes: Iterable[ir.Node], outputs: Sequence[ir.Value], read: Sequence[ir.Value]) -> ir.Model:
        model = fragment(nodes, outputs, read, walk.all_imports(self._ctx.model), self._ctx.model.functions)
        for declared, value in zip(model.graph.inputs, read, strict=True):
            dtype, shape = self._inputs[value]
            declared.type, declared.shape = ir.TensorType(ir.DataType.from_numpy(dtype)), ir.Shape(shape)
        return model

    def _content(self, value: ir.Value) -> Array:
        dtype, shape = self._inputs[value]
        return np.random.default_rng(self._ctx.seed).standard_normal(shape).astype(dtype)


def _read_by(nodes: Iterable[ir.Node]) -> list[ir.Value]:
    """Return the computed values that nodes read, each once."""
    return list(dict.fromkeys(one for node in nodes for one in values_read(node) if constant_content(one) is None))


def _observed(
    values: Sequence[ir.Value], ctx: Context
) -> Mapping[ir.Value, tuple[np.dtype[np.generic], tuple[int, ...]]]:
    """Return dtypes and shapes of values of the main graph in a run of one sample; nothing where that fails."""
    made = {*ctx.model.graph.inputs, *(value for node in ctx.model.graph for value in node.outputs)}
    seen = [value for value in values if value in made]
    try:
        if ctx.data is not None:
            data = ctx.data.take(1)
        else:
            data = open_data(generated_feeds(ctx.model, ctx.seed, sets=1, batch=1), ctx.model)
        with Walkthrough(ctx.model, data, ctx.backend, threads=ctx.threads) as run:
            arrays = next(iter(run.batches(*seen)))
    except (BackendError, DataError):
        return {}
    return {value: (array.dtype, array.shape) for value, array in zip(seen, arrays, strict=True)}


Drawn = tuple[list[ir.Node], list[ir.Value]]


def _drawn(candidate: Candidate, level: Level) -> Drawn | None:
    """Return nodes in no graph that stand for a candidate at a level, and what they give; None for other kinds."""
    match candidate:
        case Convolution():
            return _drawn_convolution(candidate, level)
        case Product():
            return _drawn_products(candidate.readers, level.ranks[0])
        case Stack():
            return _drawn_stack(candidate, level)
    return None


def _drawn_convolution(candidate: Convolution, level: Level) -> Drawn:
    layer = candidate.layer
    nodes: list[ir.Node] = []
    read = layer.input
    outline = candidate.outline(level)
    for place, (op_type, dims, attributes) in enumerate(outline):
        bias = list(layer.node.inputs)[2:] if place + 1 == len(outline) else []
        inputs = [read, _weight(dims, layer), *bias]
        nodes.append(_free("", op_type, inputs, ir.convenience.convert_attributes(attributes), place))
        read = nodes[-1].outputs[0]
    return nodes, [read]


def _drawn_products(layers: Sequence[LinearLayer], rank: int) -> Drawn:
    """Return a first product for layers that read the same, or one for each, and the second ones."""
    nodes: list[ir.Node] = []
    firsts: dict[tuple[ir.Value, bool], ir.Value] = {}
    outputs = []
    for layer in layers:
        down = rows_run_down(layer)
        rows = layer.dims[layer.output_axis]
        columns = inputs_of(layer)
        if (layer.input, down) not in firsts:
            factor = _weight((rank, columns) if down else (columns, rank), layer)
            nodes.append(_free("", "MatMul", [factor, layer.input] if down else [layer.input, factor], [], len(nodes)))
            firsts[layer.input, down] = nodes[-1].outputs[0]
        inputs = list(layer.node.inputs)
        inputs[layer.weight_index] = _weight((rows, rank) if layer.output_axis == 0 else (rank, rows), layer)
        inputs[1 - layer.weight_index] = firsts[layer.input, down]
        attributes = list(layer.node.attributes.values())
        nodes.append(_free(layer.node.domain, layer.node.op_type, inputs, attributes, len(nodes)))
        outputs.append(nodes[-1].outputs[0])
    return nodes, outputs


def _drawn_stack(candidate: Stack, level: Level) -> Drawn:
    assert isinstance(level.plan, tuple), "levels of a stack say what becomes of its layers"
    layers = [product.layer for product in candidate.products]
    nodes: list[ir.Node] = []
    given: dict[int, ir.Value] = {}
    for part in level.plan:
        chosen = [layers[member] for member in part.members]
        if part.rank is None:
            nodes += [layer.node for layer in chosen]
            made = [layer.node.outputs[0] for layer in chosen]
        else:
            own, made = _drawn_products(chosen, part.rank)
            nodes += own
        given.update(zip(part.members, made, strict=True))
    return nodes, [given[member] for member in sorted(given)]


def _free(
    domain: str, op_type: str, inputs: Sequence[ir.Value | None], attributes: Sequence[ir.Attr], place: int
) -> ir.Node:
    node = ir.Node(domain, op_type, inputs, attributes, num_outputs=1)
    node.outputs[0].name = f"drawn{place}"
    return node


def _let_go(nodes: Iterable[ir.Node]) -> None:
    """Take nodes that are in no graph from the readers of the values they read."""
    for node in nodes:
        if node.graph is None:
            for index in range(len(node.inputs)):
                node.replace_input_with(index, None)


def _weight(dims: Sequence[int], layer: LinearLayer) -> ir.Value:
    dtype = layer.weight.dtype or ir.DataType.FLOAT
    content = ir.Tensor(np.full(tuple(dims), _FILL, dtype.numpy()), dtype=dtype)
    return ir.Value(name="weight", type=ir.TensorType(dtype), shape=content.shape, const_value=content)

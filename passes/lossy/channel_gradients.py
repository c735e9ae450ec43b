"""What the loss of a model changes by when a channel is turned down, measured: the Taylor criterion."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from graphopt import walk
from graphopt.authoring import Context
from graphopt.backend import Array, Session
from graphopt.data import Batch, Dataset
from graphopt.errors import DataError, PassError
from graphopt.fragment import constant_content, fragment, nodes_between, values_read
from graphopt.metrics import cross_entropies, own_answers
from graphopt.shapes import forget_inferred
from graphopt.summary import count_macs

from ..analyses.channel_groups import Axis, ChannelGroup, input_axis
from .channel_choice import order_by_weights, true_readers

# Enough to tell channels apart; each unit takes two runs over all of them. Where that would be more multiplications
# than these, some minutes of a core, there are fewer samples.
_SAMPLES, _FEWEST_SAMPLES = 32, 4
_MOST_MACS = 2e13
# Samples run at once: what a language model says of each is a whole vocabulary per token.
_BATCH = 8
# How far a gate is turned, up and down: wide enough that rounding (1e-6 of a logit, 1e-3 in half precision) is little
# of what is measured. One side would do with half the runs, but add the second derivative, which is larger than the
# first near an optimum.
_STEP = 0.1


def orders_by_gradient(groups: Iterable[ChannelGroup], ctx: Context) -> dict[ChannelGroup, Array]:
    """Return all units of each group, the least first, by how much the loss changes with their gates.

    A group that cannot be gated is ordered by the size of its weights, and the report says so.

    Args:
        groups: Groups of the model as it is.
        ctx: The model, not changed, and the data.

    Raises:
        PassError: The first output holds no score per class, or the labels are not for it.
    """
    groups = list(groups)
    assert ctx.data is not None, "the pass did not declare that it needs calibration data"
    samples = ctx.data.sample(_affordable(groups, ctx.data, ctx.model), ctx.seed)
    batches = list(samples.batches(_BATCH))
    found, orders, units = _gradients(groups, batches, ctx), {}, 0
    for group in groups:
        known = found.get(group)
        orders[group] = order_by_weights(group, "l2") if known is None else np.argsort(known, kind="stable")
        units += group.size if known is not None else 0
    if len(found) < len(groups):
        missing = len(groups) - len(found)
        ctx.left(f"groups ordered by their weights: {missing}, as the first output shows nothing of them", left=missing)
    against = "the labels" if samples.has_labels else "what the model answers itself, as the samples have no labels"
    ctx.note(
        f"channels chosen by gradients of the cross-entropy against {against}: {units} units, each in two runs of "
        f"{len(samples)} samples",
        runs=2 * units * len(batches),
        labels=samples.has_labels,
    )
    return orders


def _affordable(groups: Iterable[ChannelGroup], data: Dataset, model: ir.Model) -> int:
    """Return how many samples to measure on."""
    first = next(data.take(1).batches(1))
    trial = model.clone()
    forget_inferred(trial)
    for value in trial.graph.inputs:
        if (given := first.feeds.get(value.name or "")) is not None:
            value.shape = ir.Shape(given.shape)
    each = 2 * sum(group.size for group in groups) * count_macs(trial) / max(first.count, first.padded_to)
    return int(np.clip(_MOST_MACS / max(each, 1.0), _FEWEST_SAMPLES, _SAMPLES))


def _gradients(groups: Sequence[ChannelGroup], batches: Sequence[Batch], ctx: Context) -> dict[ChannelGroup, Array]:
    try:
        known = {group: gate_gradients(group, batches, ctx) for group in groups}
    except DataError as error:
        raise PassError(
            f"pass `{ctx.rewriter.pass_name}`: `criterion=taylor`: {error.message}",
            hint="it is for scores of classes; `criterion=obs` is for any output",
        ) from error
    return {group: importance for group, importance in known.items() if importance is not None}


def gate_gradients(group: ChannelGroup, batches: Sequence[Batch], ctx: Context) -> Array | None:
    """Return the mean over samples of |dL/dg| of each unit, float64 [size], or None where it cannot be measured.

    L is the cross-entropy of a sample, the mean over its positions where it has several, and g multiplies the unit in
    all layers that read it: 1 as it is, 0 as it would be removed. Molchanov et al., Importance Estimation for Neural
    Network Pruning, 2019, with the magnitude taken sample by sample, as in their paper of 2017: over all samples of a
    trained model the gradients cancel out.

    No runtime for inference gives gradients: each gate is turned up and down by a tenth, which takes two runs of
    what comes behind the group.

    Args:
        group: A group of the model as it is.
        batches: Samples; without labels, the model's own answers are taken for right.
        ctx: The model and its backend.

    Raises:
        DataError: The first output holds no score per class, or the labels are not for it.
    """
    halves = _halves(group, ctx.model)
    if halves is None:
        return None
    total, count = np.zeros(group.size), 0
    with (
        ctx.backend.open(halves.before, threads=ctx.threads) as before,
        ctx.backend.open(halves.behind, threads=ctx.threads) as behind,
    ):
        for batch in batches:
            given = before.run(_feeds(ctx.model, batch))
            loss = _Loss(halves, behind, batch, list(given.values()))
            for unit in range(group.size):
                slopes = (loss.at(unit, 1 + _STEP) - loss.at(unit, 1 - _STEP)) / (2 * _STEP)
                total[unit] += np.abs(slopes).sum()
            count += loss.samples
    return total / count


@dataclass(frozen=True)
class _Halves:
    """A model cut in two where layers read a group; their weights are inputs of the second half.

    Attributes:
        before: Computes what the second half reads, from the inputs of the model.
        behind: Computes the first output, from the weights, in the order of `gates`, and then that.
        gates: Which unit each element of an axis of a weight belongs to.
    """

    before: ir.Model
    behind: ir.Model
    gates: Mapping[Axis, Array]


def _halves(group: ChannelGroup, model: ir.Model) -> _Halves | None:
    """Return a model cut in two, or None where the first output does not hang on layers that read the group."""
    gates = {input_axis(layer): group.axes[input_axis(layer)] for layer in true_readers(group)}
    weights = list(dict.fromkeys(axis.value for axis in gates))
    end = model.graph.outputs[0] if model.graph.outputs else None
    if not gates or end is None or any(weight.graph is not model.graph for weight in weights):
        return None
    nodes = nodes_between([end], _hanging_on(weights, model))
    if not nodes:
        return None
    made = {value for node in nodes for value in node.outputs}
    read = dict.fromkeys(value for node in nodes for value in values_read(node))
    cut = [value for value in read if value not in made and value not in weights and constant_content(value) is None]
    if any(value.type is None for value in (*cut, *weights)):
        return None
    imports, functions = walk.all_imports(model), model.functions
    return _Halves(
        fragment(nodes_between(cut, set(model.graph)), cut, list(model.graph.inputs), imports, functions),
        fragment(nodes, [end], [*weights, *cut], imports, functions),
        gates,
    )


def _hanging_on(weights: Sequence[ir.Value], model: ir.Model) -> set[ir.Node]:
    reached, nodes = set(weights), set()
    for node in model.graph:
        if any(value in reached for value in values_read(node)):
            nodes.add(node)
            reached.update(node.outputs)
    return nodes


def _feeds(model: ir.Model, batch: Batch) -> dict[str, Array]:
    """Return what the first half reads: inputs of a batch, and what an input is that was not given."""
    feeds = {}
    for place, value in enumerate(model.graph.inputs):
        given = batch.feeds.get(value.name or "")
        if given is None and value.const_value is not None:
            given = value.const_value.numpy()
        if given is not None:
            feeds[f"in{place}"] = given
    return feeds


class _Loss:
    """The cross-entropy of each sample of a batch, with one gate turned.

    Args:
        halves: The model.
        behind: Runs its second half.
        batch: The samples.
        given: What the first half gives for them.
    """

    def __init__(self, halves: _Halves, behind: Session, batch: Batch, given: Sequence[Array]) -> None:
        self._gates, self._behind, self._batch = halves.gates, behind, batch
        self._weights = {axis.value: _content(axis.value) for axis in halves.gates}
        first = len(self._weights)
        self._given = {f"in{first + place}": array for place, array in enumerate(given)}
        output = self._output(self._weights)
        self._labels = batch.labels if batch.labels is not None else own_answers(output)
        self.samples = len(self._of(output))

    def at(self, unit: int, gate: float) -> Array:
        """Return the losses where the layers that read a unit read so much of it, float64 [samples]."""
        weights = dict(self._weights)
        for axis, units in self._gates.items():
            weight = weights[axis.value].copy()
            weight[(slice(None),) * axis.axis + (units == unit,)] *= np.asarray(gate, weight.dtype)
            weights[axis.value] = weight
        return self._of(self._output(weights))

    def _output(self, weights: Mapping[ir.Value, Array]) -> Array:
        feeds = {f"in{place}": weight for place, weight in enumerate(weights.values())}
        return np.asarray(self._batch.real(self._behind.run({**feeds, **self._given})["out0"]))

    def _of(self, output: Array) -> Array:
        losses = cross_entropies(output, self._labels)
        return np.asarray(losses.reshape(len(losses), -1).mean(axis=1))


def _content(value: ir.Value) -> Array:
    tensor = walk.constant_tensor(value)
    assert tensor is not None, "a linear layer has a constant weight"
    return tensor.numpy()

"""Ranges tuned one by one: each chosen by what rounding that value alone does to the outputs of the model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from graphopt import walk
from graphopt.authoring import Context
from graphopt.backend import Array
from graphopt.candidates import Tally
from graphopt.data import Batch, Dataset
from graphopt.ranges import Range
from graphopt.target import IntegerScheme
from graphopt.walkthrough import Walkthrough

from .static_formats import activation_grid, dtype_of, is_float

# Samples looked at, half to choose by and half to check the choice: a range is one number or two, and on ResNet-20
# those chosen on 16 images lose on others hardly more than those chosen on 32.
_SAMPLES = 64
# Shares of the widest range that are tried: below the last, clipping has cost more wherever it was measured.
_SHARES = (1.0, 0.85, 0.72, 0.61, 0.52, 0.44)
# How the best is moved then: a single end a little, each of two ends by more, as one may matter less than the other.
_MOVES_OF_ONE_END = (0.92, 1.08)
_MOVES_OF_AN_END = (0.64, 0.8, 1.25, 1.56)
_SCORES_RANK = 2
# Of its own loss on the samples that check it, a choice must save this share: on SqueezeNet one that saved 6 % made
# the scored split no better.
_LEAST_GAIN = 0.1
# Scores are compared at this temperature, as distillation does (Hinton et al., 2015): as they are, the few samples
# that a model is in doubt about make all of the divergence, and a choice by 32 samples would be one by two or three.
_TEMPERATURE = 4.0
_SUM_TOLERANCE, _LEAST_PROBABILITY = 1e-2, 1e-12

Spans = Mapping[ir.Value, Range]


@dataclass(frozen=True, eq=False)
class _Group:
    """Values that share a scale.

    Attributes:
        names: What they are called, in graph order.
        starts: Ranges to try first; the first is kept where nothing is better.
        widest: The range of all that was seen of them.
    """

    names: tuple[str, ...]
    starts: tuple[Range, ...]
    widest: Range


def tuned_spans(ctx: Context, spans: Sequence[Spans], widest: Spans, scheme: IntegerScheme) -> dict[ir.Value, Range]:
    """Return for each value in integers the range that, of those tried, changes the outputs of the model least.

    Each is tried with every other value left in float, which is the less noisy measure and the cheaper one. What that
    leaves out: errors of rounding that add up, above all means, which the bias takes up later (`layer_rounding`). On
    SqueezeNet the losses of values rounded one at a time sum up to 0.0034, and all rounded lose 0.011.

    The loss is KL(float ‖ rounded), softened, where the first output has two axes, which is then taken for scores of
    classes; else noise power over signal power, or KL of what holds probabilities. All ranges together are checked on
    samples that were not chosen by, and the first ones kept unless the others are clearly better.

    Args:
        ctx: Calibration data and the model, not lowered yet.
        spans: Ranges to start from, by value; values that share a scale share a `Range` object.
        widest: All that was seen, likewise.
        scheme: What grids are like.
    """
    assert ctx.data is not None, "static quantization needs calibration data"
    groups = _groups(ctx.model, spans, widest)
    choosing, checking = ctx.data.sample(_SAMPLES, ctx.seed).halves(ctx.seed)
    probe = _Probe(ctx, choosing, scheme)
    with ctx.walkthrough(probe.model, data=choosing) as steps:
        chosen = [_best(probe, steps, group, scheme) for group in groups]
    before, after = _compared(_Probe(ctx, checking, scheme), groups, [[one.starts[0] for one in groups], chosen])
    text = f"ranges tuned on {len(choosing)} samples: loss on {len(checking)} others {before:.3g} → {after:.3g}"
    found = dict(spans[0])
    if not after < (1 - _LEAST_GAIN) * before:
        ctx.left(f"{text}, so that they are kept as they were", before=before, after=after)
        return found
    ctx.note(text, before=before, after=after)
    by_name = {name: span for group, span in zip(groups, chosen, strict=True) for name in group.names}
    return {value: by_name.get(value.name or "", span) for value, span in found.items()}


def _groups(model: ir.Model, spans: Sequence[Spans], widest: Spans) -> list[_Group]:
    """Return the values that share a scale, together, as the graph first makes one of them."""
    made = {value: place for place, node in enumerate(model.graph, 1) for value in node.outputs}
    shared: dict[int, list[ir.Value]] = {}
    varying = [value for value in widest if walk.constant_tensor(value) is None]
    for value in sorted(varying, key=lambda one: made.get(one, 0)):
        shared.setdefault(id(spans[0][value]), []).append(value)
    return [
        _Group(
            tuple(value.name or "" for value in values),
            tuple(_hull(each, values) for each in spans),
            _hull(widest, values),
        )
        for values in shared.values()
    ]


def _hull(spans: Spans, values: Iterable[ir.Value]) -> Range:
    found = [spans[value] for value in values]
    return Range(min(one.low for one in found), max(one.high for one in found))


def _best(probe: _Probe, steps: Walkthrough, group: _Group, scheme: IntegerScheme) -> Range:
    """Return the best of what is tried for one group: shares of the widest range, then about the best of them."""
    if group.widest.low == group.widest.high:
        return group.starts[0]
    for _ in steps.batches(probe.values[group.names[0]]):
        pass  # run up to here
    two_ends = group.widest.low < 0 < group.widest.high and not scheme.activation_symmetric
    two_ends &= not is_float(scheme.activation)
    shares = [Range(group.widest.low * share, group.widest.high * share) for share in _SHARES]
    tried = list(dict.fromkeys([*group.starts, *shares]))
    losses: dict[Range, float] = {}
    with probe.rounded([group]) as feeds:
        losses.update(zip(tried, probe.losses(steps, [feeds([one]) for one in tried]), strict=True))
        best = min(losses, key=losses.__getitem__)
        about = [one for one in _about(best, group.widest, two_ends=two_ends) if one not in losses]
        losses.update(zip(about, probe.losses(steps, [feeds([one]) for one in about]), strict=True))
    return min(losses, key=losses.__getitem__)


def _about(best: Range, widest: Range, *, two_ends: bool) -> list[Range]:
    """Return ranges near one, none wider than the widest."""
    if two_ends:
        moved = [Range(best.low * move, best.high) for move in _MOVES_OF_AN_END]
        moved += [Range(best.low, best.high * move) for move in _MOVES_OF_AN_END]
    else:
        moved = [Range(best.low * move, best.high * move) for move in _MOVES_OF_ONE_END]
    inside = [Range(max(one.low, widest.low), min(one.high, widest.high)) for one in moved]
    return list(dict.fromkeys(inside))


def _compared(probe: _Probe, groups: Sequence[_Group], choices: Sequence[Sequence[Range]]) -> list[float]:
    """Return the loss of each choice of a range for every group, all of them rounded."""
    with probe.walkthrough() as steps, probe.rounded(groups) as feeds:
        return probe.losses(steps, [feeds(choice) for choice in choices])


class _Probe:
    """A copy of the model in which values can be rounded, and what its outputs are while none is.

    Args:
        ctx: The model, in float, and what runs it.
        data: Samples to run it on.
        scheme: What grids are like.

    Attributes:
        model: The copy.
        values: Its values by name.
    """

    def __init__(self, ctx: Context, data: Dataset, scheme: IntegerScheme) -> None:
        self.model, self._scheme, self._ctx, self._data = ctx.model.clone(), scheme, ctx, data
        self.values = {value.name or "": value for value in self.model.graph.inputs}
        self.values.update({value.name or "": value for node in self.model.graph for value in node.outputs})
        self._outputs = [value for value in self.model.graph.outputs if walk.constant_tensor(value) is None]
        with self.walkthrough() as steps:
            self._reference = [self._named(batch) for batch in steps.batches(*self._outputs)]
        first = next(iter(self._reference[0].values())) if self._reference else None
        self._of_classes = isinstance(first, np.ndarray) and first.ndim == _SCORES_RANK and first.shape[1] > 1
        if self._of_classes:
            self._reference = [_softened(batch) for batch in self._reference]

    def walkthrough(self) -> Walkthrough:
        """Return a walkthrough of the copy over the samples, from the start."""
        return self._ctx.walkthrough(self.model, data=self._data)

    @contextmanager
    def rounded(self, groups: Sequence[_Group]) -> Iterator[_Feeds]:
        """Put quantization behind the values of some groups, and take it away again."""
        feeds, readers, outputs = _Feeds(self._scheme), [], list(self._outputs)
        for group in groups:
            scale, zero_point = feeds.add()
            for value in (self.values[name] for name in group.names):
                uses = [(use.node, use.idx) for use in value.uses()]
                codes = ir.Node("", "QuantizeLinear", [value, scale, zero_point])
                back = ir.Node("", "DequantizeLinear", [codes.outputs[0], scale, zero_point])
                codes.outputs[0].name, back.outputs[0].name = f"{value.name}_codes", f"{value.name}_rounded"
                self._outputs = [back.outputs[0] if one is value else one for one in self._outputs]
                for node, index in uses:
                    node.replace_input_with(index, back.outputs[0])
                readers.append((value, codes, uses))
        try:
            yield feeds
        finally:
            self._outputs = outputs
            for value, codes, uses in readers:
                for node, index in uses:
                    node.replace_input_with(index, value)
                codes.replace_input_with(0, None)

    def losses(self, steps: Walkthrough, feeds: Sequence[Mapping[ir.Value, Array]]) -> list[float]:
        """Return how far the outputs are from what they were, for each of several grids."""
        if not feeds:
            return []
        tallies = [Tally((), self._of_classes) for _ in feeds]
        for reference, trials in zip(self._reference, steps.trials(self._outputs, feeds), strict=True):
            for tally, results in zip(tallies, trials, strict=True):
                outputs = self._named(results)
                count = max((len(one) for one in results if np.ndim(one)), default=1)
                tally.update(_softened(outputs) if self._of_classes else outputs, reference, Batch({}, None, count))
        return [tally.standing().divergence for tally in tallies]

    def _named(self, results: Iterable[Any]) -> dict[str, Any]:
        return {f"out{place}": result for place, result in enumerate(results)}


def _softened(outputs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the outputs, the first as logits at a higher temperature."""
    name = next(iter(outputs))
    scores = np.asarray(outputs[name], np.float32)
    if bool((scores >= 0).all()) and np.allclose(scores.sum(axis=-1), 1.0, atol=_SUM_TOLERANCE):
        scores = np.log(np.maximum(scores, _LEAST_PROBABILITY))
    return {**outputs, name: scores / np.float32(_TEMPERATURE)}


class _Feeds:
    """Scales and zero points as values that are given when the model runs.

    Args:
        scheme: What grids are like.
    """

    def __init__(self, scheme: IntegerScheme) -> None:
        self._scheme = scheme
        self._grids: list[tuple[ir.Value, ir.Value]] = []

    def add(self) -> tuple[ir.Value, ir.Value]:
        """Return the scale and zero point of one more group."""
        place, dtype = len(self._grids), dtype_of(self._scheme.activation)
        scale = ir.Value(name=f"scale{place}", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([]))
        zero_point = ir.Value(name=f"zero{place}", type=ir.TensorType(dtype), shape=ir.Shape([]))
        self._grids.append((scale, zero_point))
        return scale, zero_point

    def __call__(self, spans: Sequence[Range]) -> dict[ir.Value, Array]:
        """Return what they hold for a range of each group, in the order these were added."""
        contents: dict[ir.Value, Array] = {}
        for (scale, zero_point), span in zip(self._grids, spans, strict=True):
            grid = activation_grid(span, self._scheme)
            contents[scale] = np.array(grid.scale, np.float32)
            contents[zero_point] = np.array(grid.zero_point, dtype_of(self._scheme.activation).numpy())
        return contents

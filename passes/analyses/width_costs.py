"""What a model costs at other widths of its channel groups: MACs, parameters and bytes, without shrinking it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import onnx_ir as ir

from graphopt import walk
from graphopt.backend import Array
from graphopt.summary import Dimension, count_parameters, extent, holds_weights, mac_terms

from .channel_groups import Axis, ChannelGroup

Measure = Literal["macs", "parameters", "bytes"]


@dataclass(frozen=True)
class _Length:
    """The length of a dimension: a constant, and for some groups the elements that each of their units has there."""

    fixed: float
    units: Mapping[int, float]


@dataclass(frozen=True)
class _Term:
    """A product of lengths, some of which vary."""

    factor: float
    lengths: Sequence[_Length]


class WidthCosts:
    """MACs, parameters or bytes of a model as a function of how many units each group keeps.

    A unit counts as the mean of its group, which is exact wherever the units are alike; `cost_of_cuts` is exact always.
    Dynamic dimensions count as 1, as in `graphopt.summary`.

    Args:
        model: The model, shapes inferred.
        groups: Its channel groups, those whose widths vary.
        widths: For each group the widths it may have, the present one first: what levels are indices of.
        measure: What is counted.
    """

    def __init__(
        self,
        model: ir.Model,
        groups: Sequence[ChannelGroup],
        widths: Sequence[Sequence[int]],
        measure: Measure = "macs",
    ) -> None:
        self._widths = [np.asarray(one, np.float64) for one in widths]
        lengths = _lengths(groups)
        self._fixed, self._terms = 0.0, list[_Term]()
        for factor, dimensions in _products(model, groups, measure):
            varying = [lengths[dimension] for dimension in dimensions if dimension in lengths]
            constant = factor * float(np.prod([extent(one) for one in dimensions if one not in lengths]))
            if varying:
                self._terms.append(_Term(constant, varying))
            else:
                self._fixed += constant
        self._of_item: list[list[_Term]] = [[] for _ in groups]
        for term in self._terms:
            for item in {item for length in term.lengths for item in length.units}:
                self._of_item[item].append(term)

    def __call__(self, levels: Sequence[int]) -> float:
        """Return what the model costs where each group has the width of its level."""
        return self.at([widths[level] for widths, level in zip(self._widths, levels, strict=True)])

    def at(self, kept: Sequence[float]) -> float:
        """Return what the model costs where groups keep so many units."""
        return self._fixed + float(sum(_value(term, kept) for term in self._terms))

    def along(self, item: int, levels: Sequence[int]) -> Array:
        """Return what the model costs at each level of one group, the others where they are: [levels]."""
        kept = [widths[level] for widths, level in zip(self._widths, levels, strict=True)]
        own = sum(_value(term, kept) for term in self._of_item[item])
        rest = self.at(kept) - own
        varied = [*kept[:item], self._widths[item], *kept[item + 1 :]]
        return np.asarray(rest + sum((_value(term, varied) for term in self._of_item[item]), np.zeros(1)))


def cost_of_cuts(model: ir.Model, cuts: Mapping[ChannelGroup, Array], measure: Measure = "macs") -> int:
    """Return what a model will cost once groups are cut, exactly.

    Args:
        model: The model, shapes inferred.
        cuts: For each group to be cut which units stay, bool [size].
        measure: What is counted.
    """
    removed: dict[Dimension, int] = {}
    for group, kept in cuts.items():
        for axis, units in group.axes.items():
            gone = int(np.count_nonzero(~kept[units[units >= 0]]))
            dimension = (axis.value, axis.axis)
            removed[dimension] = removed.get(dimension, 0) + gone
    total = 0.0
    for factor, dimensions in _products(model, cuts, measure):
        total += factor * float(np.prod([extent(one) - removed.get(one, 0) for one in dimensions]))
    return round(total)


def _value(term: _Term, kept: Sequence[float | Array]) -> float | Array:
    """Return a product where groups keep so many units; one of them may be an array of widths."""
    value: float | Array = term.factor
    for length in term.lengths:
        value = value * (length.fixed + sum(each * kept[item] for item, each in length.units.items()))
    return value


def _lengths(groups: Sequence[ChannelGroup]) -> dict[Dimension, _Length]:
    """Return the dimensions that vary with the groups; one that holds several of them varies with each."""
    units: dict[Axis, dict[int, float]] = {}
    fixed: dict[Axis, float] = {}
    for item, group in enumerate(groups):
        for axis, numbers in group.axes.items():
            own = int(np.count_nonzero(numbers >= 0))
            units.setdefault(axis, {})[item] = own / group.size
            fixed[axis] = fixed.get(axis, len(numbers)) - own
    return {(axis.value, axis.axis): _Length(fixed[axis], by_item) for axis, by_item in units.items()}


def _products(
    model: ir.Model, groups: Iterable[ChannelGroup], measure: Measure
) -> Iterator[tuple[float, Sequence[Dimension]]]:
    """Yield what is counted, as products of dimensions, each with a factor."""
    if measure == "macs":
        for node in walk.every_node(model):
            for term in mac_terms(node) or ():
                yield 1.0, term
        return
    of_bytes = measure == "bytes"
    rest = float(sum(tensor.nbytes for tensor in walk.stored_tensors(model)) if of_bytes else count_parameters(model))
    tensors = {axis.value: walk.constant_tensor(axis.value) for group in groups for axis in group.axes}
    for value, tensor in tensors.items():
        if tensor is None or not (of_bytes or holds_weights(tensor.dtype)):
            continue
        each = tensor.nbytes / max(tensor.size, 1) if of_bytes else 1.0
        rest -= each * tensor.size
        yield each, [(value, axis) for axis in range(len(tensor.shape))]
    yield rest, ()
